"""The MLX backend as the core finds it; importing this module does not import MLX."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Array, Engine, EngineOptions, TrainingState
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scan_timing import ScanTimer
from arm_core.model.spec import ModelSpec
from arm_mlx import blas

if TYPE_CHECKING:
    from arm_core.data.model_config import ModelConfig


class MlxBackend:
    """Implements `arm_core.engine.protocol.Backend`; MLX is imported by the methods that need it."""

    name = "mlx"

    def missing(self) -> str | None:
        found = find_spec("mlx")
        if found is None:
            return "MLX is not installed; pip install 'arm-vision[mlx]'"
        # On Linux the package `mlx` contains only the bindings; `mlx-cpu` or `mlx-cuda` contain the library.
        folders = [Path(folder, "lib") for folder in found.submodule_search_locations or []]
        if sys.platform == "linux" and not any((folder / "libmlx.so").exists() for folder in folders):
            return "MLX is installed without its library libmlx.so; pip install 'arm-vision[mlx]'"
        return None

    def version(self) -> str:
        return f"mlx {version('mlx')}"

    def devices(self) -> list[str]:
        blas.load()
        from arm_mlx.devices import devices

        return devices()

    def cpu_products(self) -> tuple[str, str | None]:
        found = blas.load()
        return found.library, found.advice

    def bfloat16_units(self) -> str | None:
        return None  # MLX converts bfloat16 matrices to float32 on a CPU

    def scans(self, device: str) -> Mapping[str, str | None]:
        blas.load()
        from arm_mlx.scan import scans

        return scans(device)

    def scan_timer(self, device: str) -> ScanTimer:
        blas.load()
        from arm_mlx.scan_timer import MlxScanTimer

        return MlxScanTimer(device)

    def join(self, device: str) -> Ranks:
        blas.load()
        from arm_mlx.devices import resolve_device
        from arm_mlx.distributed import join

        resolve_device(device)
        return join()

    def create_engine(
        self,
        spec: ModelSpec,
        state: TrainingState,
        *,
        optimizer: OptimizerSettings | None = None,
        options: EngineOptions | None = None,
        ranks: Ranks = ALONE,
    ) -> Engine:
        options = options or EngineOptions()
        if options.shard:
            raise ValueError("backend 'mlx' cannot shard; use --backend torch")
        blas.load()
        from arm_mlx.engine import MlxEngine

        return MlxEngine(spec, state, optimizer=optimizer, options=options, ranks=ranks)

    def create_module(
        self, spec: ModelSpec, parameters: Mapping[str, Array], config: ModelConfig, **options: Any
    ) -> Any:
        blas.load()
        from arm_mlx.library import create_module

        return create_module(spec, parameters, config, **options)
