"""`arm explain`: which tokens a model uses, and which patches its features distinguish."""

from arm_cli.explain.command import explain

__all__ = ["explain"]
