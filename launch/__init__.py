"""The command line, the plan of a run, recipes, and configurations for Accelerate and Slurm."""
