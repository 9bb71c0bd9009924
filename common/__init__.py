"""What every folder but models/ may import: errors, files, locks, output. Imports no other folder and no torch."""
