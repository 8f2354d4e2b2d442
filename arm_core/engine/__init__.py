"""What the core asks of an engine, and how backends are found. Imports model and files."""
