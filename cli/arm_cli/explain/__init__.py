"""`arm explain`: what a model looks at, and what its features tell apart."""

from arm_cli.explain.command import explain

__all__ = ["explain"]
