"""Entry point of `arm`: loads subcommands by name and turns a user error into one line."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

COMMANDS = (
    "demo",
    "pretrain",
    "finetune",
    "sweep",
    "evaluate",
    "predict",
    "explain",
    "complete",
    "embed",
    "probe",
    "models",
    "pull",
    "data",
    "convert",
    "export",
    "runs",
    "report",
    "recipe",
    "config",
    "info",
    "bench",
    "doctor",
)
"""Commands in the order of the help. `arm_cli.NAME` holds the command NAME and is imported on demand."""


ARGUMENTS = "arm_cli.arguments"
"""Key of a click context's `meta`: the words of the command line after `arm`."""


class UserError(click.ClickException):
    """An error that the user can correct: one line, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """Loads a subcommand's module on demand, so that no command waits for the imports of another."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"arm_cli.{cmd_name}"), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            import difflib

            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(COMMANDS)}"
            raise UserError(f"no command {in_short(name)!r}; {hint}")
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        with in_one_line():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        # The core raises ValueError for bad input, and files raise OSError; anything else is a bug.
        try:
            with in_one_line():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader of a pipe has closed it; click exits without a message
        except (ValueError, OSError, MemoryError) as error:
            if ctx.params["traceback"]:
                raise
            raise UserError(one_line(error)) from error


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise click's own usage errors, which print a paragraph, as a `UserError`."""
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        where = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise UserError(in_short(error.format_message()) + where) from error


def one_line(error: ValueError | OSError | MemoryError) -> str:
    """An error's message as one printable line of limited length; for an OSError, it starts with the file."""
    if isinstance(error, MemoryError):
        text = f"not enough memory ({error})" if str(error) else "not enough memory"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return in_short(text)


def in_short(text: str) -> str:
    """Text as one line, with control characters escaped; the middle of a long text is omitted."""
    from arm_core.files.errors import shown

    return shown(" ".join(text[:100_000].split()))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"Warning: {in_short(str(message))}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--traceback", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="arm-vision", message="%(package)s %(version)s")
def main(traceback: bool) -> None:
    """Autoregressive pretraining for Vision Mamba (ARM), on Apple silicon, NVIDIA GPUs and CPUs."""
    warnings.showwarning = _show_warning
