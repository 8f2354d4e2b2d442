"""Says once that the kernels are being compiled: the first call takes up to a minute."""

from __future__ import annotations

import logging
from typing import Any

from numba.core import event

MESSAGE = "compiling the CPU kernels for this machine; this happens once and can take a minute"

_logger = logging.getLogger("arm_core.cpu_kernels")


class _Notice(event.Listener):
    """Logs a warning, which Python prints by default, when the first kernel is compiled."""

    def __init__(self) -> None:
        self.said = False

    def on_start(self, event: Any) -> None:
        function = event.data["dispatcher"].py_func
        if not self.said and function.__module__.startswith("arm_core.cpu_kernels"):
            self.said = True
            _logger.warning(MESSAGE)

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Notice())  # type: ignore[no-untyped-call]
