"""`arm demo`: the demonstration, its runs and its report."""

from arm_cli.demo.command import demo

__all__ = ["demo"]
