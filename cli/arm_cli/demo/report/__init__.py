"""A self-contained HTML page about a run: figures, pictures and tables."""
