"""Shared parts of the engines' scans: the table of implementations, the choice, and the check of shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, kw_only=True)
class Implementation(Generic[Tensor]):
    """One implementation of the mixer's two sequence operators, on the tensors of one framework.

    The signatures are those of the engine's `scan` module, without `impl`.
    """

    directional_conv: Callable[..., Tensor]
    selective_scan: Callable[..., Tensor]
    half_precision: bool = True
    """Whether it takes float16 and bfloat16; False: the engine converts its operands to float32."""
    unusable: Callable[[str], str | None] = lambda device: None
    """Device, such as `cpu` or `cuda:1` -> None, or the reason why it cannot run there."""
    note: Callable[[int], str | None] = lambda conv_width: None
    """Convolution width -> a note in the printed name of the scan, such as a substitute for a kernel."""


class Implementations(dict[str, Implementation[Tensor]]):
    """Implementations by the name that `--scan` takes, in the order in which `auto` tries them."""

    def __missing__(self, name: str) -> Implementation[Tensor]:
        raise ValueError(f"unknown scan {name!r}; expected {', '.join(self)}")

    def usable(self, device: str) -> dict[str, str | None]:
        """For a device such as `cpu` or `cuda:1`: None if usable, else the reason why not."""
        return {name: implementation.unusable(device) for name, implementation in self.items()}

    def label(self, name: str, conv_width: int) -> str:
        """The name that is printed and recorded."""
        note = self[name].note(conv_width)
        return f"{name} ({note})" if note else name


def choose_scan(scans: Mapping[str, str | None], requested: str) -> str:
    """The scan to use: the requested one, or for `auto` the first usable one.

    scans: usability by name, from `Backend.scans`. Raises ValueError if no such scan can run.
    """
    if requested == "auto":
        usable = [name for name, why in scans.items() if why is None]
        if not usable:
            raise ValueError("no scan can run here: " + "; ".join(f"{n}: {why}" for n, why in scans.items()))
        return usable[0]
    if requested not in scans:
        raise ValueError(f"unknown scan {requested!r} for this backend; expected auto, {', '.join(scans)}")
    if why := scans[requested]:
        raise ValueError(f"scan {requested!r} cannot run here: {why}")
    return requested


class HasShape(Protocol):
    """A tensor of any framework."""

    @property
    def shape(self) -> Any: ...


def check_axes(prefix: str = "", /, **tensors: tuple[HasShape, str]) -> dict[str, int]:
    """Compare shapes with axes that are named by one letter each; returns the size of every letter.

    The first tensor that has a letter sets its size: `check_axes(u=(u, "KBLD"), D=(D, "KD"))`.
    Raises ValueError that names the first tensor that does not fit. prefix: put before its name.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in tensors.items():
        shape = tuple(tensor.shape)
        expected = tuple(sizes.get(letter, size) for letter, size in zip(axes, shape, strict=False))
        if len(axes) != len(shape) or shape != expected:
            known = ", ".join(f"{letter}={sizes[letter]}" if letter in sizes else letter for letter in axes)
            raise ValueError(f"{prefix}{name}: expected ({known}), found {shape}")
        sizes |= zip(axes, shape, strict=True)
    return sizes
