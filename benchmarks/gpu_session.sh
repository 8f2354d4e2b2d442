#!/bin/bash
# Everything that a machine with an NVIDIA GPU has to show, in about eight minutes, for a rented or borrowed one:
#
#     bash benchmarks/gpu_session.sh FOLDER [COMMIT]
#
# Needs torch, triton, numpy and pytest; installs nothing. Peers are built from the sdists in peers/ in the
# background, while the tests run. FOLDER gets a log of each part and the result files; a part that takes too long
# is ended, and the others still run. PYTHON is the interpreter.
set -u
folder=$(realpath -m "${1:?a folder for the results}")
commit=${2:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." && mkdir -p "$folder"
export PYTHONPATH=.:backends/cuda:backends/mlx:convert:cli PYTHONUNBUFFERED=1

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$folder/$name.log" 2>&1
    echo "== $name: exit status $?, $((SECONDS - started)) s"
    tail -n "${LINES_SHOWN:-15}" "$folder/$name.log"
}
benchmark() { # benchmark NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" "benchmarks/$name.py" --output "$folder" --commit "$commit" "$@"
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader
benchmark cuda_kernels 100 --sweep --shapes finetuning pretraining
"$python" -c 'import sys; sys.path.insert(0, "benchmarks"); from pathlib import Path
from cuda_builds import build_peers; print(build_peers(Path("peers")))' >"$folder/peers.log" 2>&1 &
part tests 200 make test-cuda PYTHON="$python"
wait
cat "$folder/peers.log"
benchmark cuda_scan 90
benchmark cuda_step 200 --models base
part sanitizer 400 make test-cuda-sanitizer PYTHON="$python"
