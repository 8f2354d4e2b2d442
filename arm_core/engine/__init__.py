"""The protocol of engines, and how backends are found. Imports model and files."""
