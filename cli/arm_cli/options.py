"""Options that several commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from arm_cli.declare import option, options_of

if TYPE_CHECKING:
    from arm_core.engine.protocol import Array, Backend, Engine, EngineOptions
    from arm_core.engine.ranks import Ranks
    from arm_core.model.spec import ModelSpec

F = TypeVar("F", bound=Callable[..., Any])

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The values of --backend, --device, --scan, --precision and --threads."""

    # No fixed choice of backends: another package can add one.
    backend: str = option("--backend", metavar="torch|mlx|auto", default="auto", help="Engine to use.")
    device: str = option("--device", default="auto", help="cpu, gpu (MLX), cuda or cuda:1 (torch).")
    scan: str = option("--scan", default="auto", help="Scan implementation; `arm doctor` lists them.")
    precision: str | None = option(
        "--precision", type=click.Choice(PRECISIONS), help="Type of the matrix products (training.precision)."
    )
    """None: the recipe's precision, or float32 without a recipe."""
    threads: int | None = option("--threads", type=click.IntRange(min=1), help="CPU threads.")

    def find(self) -> Backend:
        from arm_core.engine.registry import choose_backend

        return choose_backend(self.backend)

    def options(self) -> EngineOptions:
        from arm_core.engine.protocol import EngineOptions, Precision

        return EngineOptions(
            device=self.device,
            scan=self.scan,
            precision=Precision(self.precision or Precision.FLOAT32),
            threads=self.threads,
        )

    def create_module(self, spec: ModelSpec, parameters: Mapping[str, Array]) -> Any:
        """A library module (`arm_vision.load_model`) with these values."""
        from arm_core.data.model_config import ModelConfig

        device = None if self.device == "auto" else self.device
        return self.find().create_module(spec, parameters, ModelConfig(), device=device, scan=self.scan)

    @contextmanager
    def join(self) -> Iterator[tuple[Backend, Ranks]]:
        """The backend, and the job of this process.

        Inside the block only rank 0 prints. An error on all ranks is reported by rank 0, an error on a
        single rank by that rank.
        """
        from arm_core.engine.ranks import FailedElsewhere, PeerFailed, title
        from arm_core.training.nonfinite import NonFiniteError

        backend = self.find()
        ranks = backend.join(self.device)
        try:
            with ExitStack() as stack:
                if ranks.rank > 0:
                    nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123
                    stack.enter_context(redirect_stdout(nowhere))
                    stack.enter_context(redirect_stderr(nowhere))
                yield backend, ranks
        except (FailedElsewhere, NonFiniteError, PeerFailed) as error:
            if ranks.rank > 0:
                raise SystemExit(1) from error
            raise click.ClickException(str(error)) from error  # exit code 1: the command itself was valid
        except (ValueError, OSError) as error:
            if ranks.rank == 0:
                raise
            raise ValueError(f"{title(ranks)}: {error}") from error
        except SystemExit:
            ranks.close()
            raise
        else:
            ranks.close()

    def create(self, spec: ModelSpec, parameters: Mapping[str, Array], ranks: Ranks | None = None) -> Engine:
        """An engine for inference, in one of the processes of a job. Prints what `auto` selected."""
        from arm_core.engine.protocol import TrainingState
        from arm_core.engine.ranks import ALONE

        backend = self.find()
        ranks = ranks or ALONE
        state = TrainingState(parameters=parameters)
        engine = backend.create_engine(spec, state, options=self.options(), ranks=ranks)
        announce(backend, engine, ranks)
        return engine


def announce(backend: Backend, engine: Engine, ranks: Ranks) -> None:
    """Print the engine in use on stderr."""
    several = f", {ranks.world} processes" if ranks.world > 1 else ""
    click.echo(
        f"backend {backend.name} ({backend.version()}), device {engine.device}, scan {engine.scan}{several}",
        err=True,
    )


def engine_options(command: F) -> F:
    """Add the options of an engine; the command receives them as one argument, `engine`."""
    return options_of(EngineChoice, "engine")(command)


def json_option(command: F) -> F:
    """Add --json; the command receives it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for other programs.")(command)


class WeightsChoice(click.Choice[str]):
    """`raw` or `ema`; `model`, the earlier word for `raw`, is still accepted."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert("raw" if value == "model" else value, param, ctx)


def weights_option(command: F) -> F:
    """Add --weights; the command receives `weights`, `raw` or `ema`. --ema is a hidden alias."""

    @functools.wraps(command)
    def wrapped(*args: Any, weights: str, ema: bool, **others: Any) -> Any:
        return command(*args, weights="ema" if ema else weights, **others)

    choice = click.option(
        "--weights",
        type=WeightsChoice(("raw", "ema")),
        default="raw",
        show_default=True,
        help="The trained weights, or their moving average (optimizer.ema_decay).",
    )
    return choice(click.option("--ema", is_flag=True, hidden=True)(wrapped))  # type: ignore[return-value]


def batch_size_option(default: int) -> Callable[[F], F]:
    """Add --batch-size."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="Images at a time.",
    )


DATA_FORMATS = ("auto", "folder", "table", "parquet", "arrow", "tar")

data_format_option = click.option(
    "--data-format", type=click.Choice(DATA_FORMATS), help="How images are stored; detected if not given."
)
"""Add --data-format; the command receives it as `data_format`, None if not given."""
