"""The training loop and its files. May import every other room of the core."""
