"""The torch backend as the core finds it; importing this module does not import torch."""

from __future__ import annotations

import re
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

if TYPE_CHECKING:
    from arm_core.data.model_config import ModelConfig


class TorchBackend:
    """Implements `arm_core.engine.protocol.Backend`; torch is imported by the methods that need it."""

    name = "torch"

    def missing(self) -> str | None:
        return None if find_spec("torch") else "torch is not installed; pip install 'arm-vision[torch]'"

    def version(self) -> str:
        return f"torch {version('torch')}"

    def devices(self) -> list[str]:
        from arm_cuda.devices import devices

        return devices()

    def cpu_products(self) -> tuple[str, str | None]:
        import torch

        names = {"mkl": "MKL", "open": "OpenBLAS", "accelerate": "Accelerate"}
        built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
        return names.get(built[1], built[1]) if built else "a library built into torch", None

    def bfloat16_units(self) -> str | None:
        import torch

        found = torch.cpu.get_capabilities()
        names = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
        return next((name for key, name in names.items() if found.get(key)), None)

    def scans(self, device: str) -> Mapping[str, str | None]:
        from arm_cuda.scan import scans

        return scans(device)

    def scan_timer(self, device: str) -> ScanTimer:
        from arm_cuda.scan_timer import TorchScanTimer

        return TorchScanTimer(device)

    def join(self, device: str) -> Ranks:
        from arm_cuda.distributed import join

        return join(device)

    def create_engine(
        self,
        spec: ModelSpec,
        state: TrainingState,
        *,
        optimizer: OptimizerSettings | None = None,
        options: EngineOptions | None = None,
        ranks: Ranks = ALONE,
    ) -> Engine:
        from arm_cuda.engine import TorchEngine

        return TorchEngine(
            spec,
            state,
            optimizer=optimizer,
            options=options or EngineOptions(),
            ranks=ranks,
        )

    def create_module(
        self, spec: ModelSpec, parameters: Mapping[str, Array], config: ModelConfig, **options: Any
    ) -> Any:
        from arm_cuda.library import create_module

        return create_module(spec, parameters, config, **options)

    def write_program(
        self, spec: ModelSpec, parameters: Mapping[str, Array], path: Path, **options: Any
    ) -> int:
        """Write a .pt2 file of torch.export; see `arm_cuda.program.write_program`."""
        from arm_cuda.program import write_program

        return write_program(spec, parameters, path, **options)

    def open_program(self, path: Path) -> Any:
        """A .pt2 file as an `arm_convert.exported.ExportedFile`."""
        from arm_cuda.program_file import ProgramFile

        return ProgramFile(path)
