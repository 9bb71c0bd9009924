"""How a run is started: the command line and the recipes."""
