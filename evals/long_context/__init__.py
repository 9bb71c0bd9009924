"""One long document: `minrnn long-context`, and the same through lm-eval."""
