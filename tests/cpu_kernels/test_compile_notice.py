"""The kernels say once that they are compiled, and nothing when they come from the disk cache."""

import os
import subprocess
import sys

CALL = """
import numpy as np
from arm_core import cpu_kernels
values = np.ones((3, 64), np.float32)
cpu_kernels.swiglu_forward(values, values)
cpu_kernels.swiglu_forward(values, values)
"""


def test_the_first_compilation_is_announced_once_and_the_cache_is_silent(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    expected = "compiling the CPU kernels for this machine; this happens once and can take a minute\n"
    assert said == [expected, ""]
