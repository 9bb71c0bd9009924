"""`minrnn report`: all results on one page.

    PATHs -> sources.gather_sources -> compare (seeds pooled, published rows beside them)
      -> quality_tables, others (Markdown), pictures -> page (HTML)

The entry point is command.py.
"""
