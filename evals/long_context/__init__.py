"""Measurements on one long document: `minrnn long-context`, and `minrnn rolling` through lm-eval."""
