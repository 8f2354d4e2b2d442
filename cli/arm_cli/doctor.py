"""`arm doctor`: lists what this machine can run and what to install."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import json_option
from arm_cli.show import print_json

if TYPE_CHECKING:
    from arm_core.engine.protocol import Backend

PACKAGES = ("numpy", "numba", "pillow", "safetensors", "torch", "triton", "mamba-ssm", "mlx")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@click.command(short_help="Show what this machine can run and what to install.")
@json_option
def doctor(as_json: bool) -> None:
    """Print the engines, devices, scan implementations and libraries of this machine, and what to install.

    The exit code is 1 if `--backend auto` cannot run.
    """
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print(report)
    if report["auto"] is None or report["backends"][report["auto"]]["missing"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """The whole report as plain values."""
    from arm_core.engine.registry import choose_backend, installed_backends

    # MLX first: its library of CPU matrix products must be loaded before it.
    backends = {name: _backend(found) for name, found in sorted(installed_backends().items())}
    try:
        auto = choose_backend("auto").name
    except ValueError:
        auto = None
    return {
        "arm-vision": version("arm-vision"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpus": _cpus(),
        "thread_variables": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "packages": {name: _version(name) for name in PACKAGES},
        "auto": auto,
        "backends": backends,
    }


def _backend(backend: Backend) -> dict[str, Any]:
    if (reason := backend.missing()) is not None:
        return {"missing": reason}
    try:
        library, advice = backend.cpu_products()
        return {
            "missing": None,
            "version": backend.version(),
            "cpu_products": library,
            "bfloat16_units": backend.bfloat16_units(),
            "advice": advice,
            "devices": {device: dict(backend.scans(device)) for device in backend.devices()},
        }
    except Exception as error:  # a broken installation is reported, not raised
        return {"missing": f"installed but broken ({type(error).__name__}: {error})"}


def _cpus() -> int:
    """Number of CPUs available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    click.echo(f"arm-vision {report['arm-vision']}, Python {report['python']} ({report['executable']})")
    threads = "".join(f", {name}={value}" for name, value in report["thread_variables"].items())
    click.echo(f"{report['platform']}, {report['cpus']} CPUs{threads}")
    packages = (f"{name} {found or '-'}" for name, found in report["packages"].items())
    click.echo(f"packages: {', '.join(packages)}")
    todo = []
    for name, found in report["backends"].items():
        click.secho(f"\nbackend {name}", bold=True)
        if found["missing"]:
            click.echo(f"  cannot run: {found['missing']}")
            todo.append(f"for the backend {name}: {found['missing']}")
            continue
        units = f"; bfloat16 products by {found['bfloat16_units']}" if found["bfloat16_units"] else ""
        click.echo(f"  {found['version']}; matrix products on the CPU by {found['cpu_products']}{units}")
        if found["advice"]:
            todo.append(f"for the backend {name}: {found['advice']}")
        for device, scans in found["devices"].items():
            click.echo(f"  device {device}")
            chosen = next((scan for scan, why in scans.items() if why is None), None)
            for scan, why in scans.items():
                state = f"cannot run: {why}" if why else "usable" + (" (auto)" if scan == chosen else "")
                click.echo(f"    scan {scan:<12} {state}")
    click.echo()
    if report["auto"] is None:
        click.secho("No engine can run here.", fg="red")
    elif report["backends"][report["auto"]]["missing"]:
        click.secho(f"--backend auto means {report['auto']}, which is broken.", fg="red")
    else:
        device = next(iter(report["backends"][report["auto"]]["devices"]))
        click.echo(f"--backend auto means {report['auto']}, --device auto means {device}.")
    for line in todo:
        click.echo(f"- {line}")
