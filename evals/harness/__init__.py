"""lm-eval with recurrent models: `minrnn eval` and `minrnn lm-eval`."""
