"""One training step after another: config, loop, optimizer, checkpoint, tracking, export. Nothing is imported
here, so that --help is quick."""
