"""The training loop and what it leaves on the disk. Imports every other room of the core."""
