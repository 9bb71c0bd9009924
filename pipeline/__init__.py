"""Training: recipe, loop, optimizer, checkpoints, tracking, export. Imports nothing, to keep --help fast."""
