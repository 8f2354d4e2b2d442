"""`arm report`: a page about one run."""

from arm_cli.report.command import report

__all__ = ["report"]
