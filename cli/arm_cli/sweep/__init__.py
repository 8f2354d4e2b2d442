"""`arm sweep`: many runs that differ in a few settings, and a table of their results."""

from arm_cli.sweep.command import sweep

__all__ = ["sweep"]
