"""Our models in lm-eval: `minrnn eval`."""
