"""`minrnn report`: all results on one page.

    PATHs -> sources.gather -> compare (seeds pooled, published rows beside them) -> quality, others (Markdown), pictures -> page (HTML)

command.py is the entry.
"""
