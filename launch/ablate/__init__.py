"""`minrnn ablate`: variants of a recipe, each at its own best learning rate, compared seed by seed."""
