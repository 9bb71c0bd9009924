"""What every folder but models/ may import. Imports no other folder, and no torch or transformers.

errors.py    UserError, NonFiniteError, StorageError
output.py    exit status of commands; output that cannot stop a run
files.py     atomic writes, sync, SHA-256, reading again after an I/O error
locks.py     file locks
names.py     suggestions for an unknown name
checks.py    minimums of command-line options
"""
