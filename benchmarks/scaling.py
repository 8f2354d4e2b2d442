"""Plans the paper's runs for 8 to 512 GPUs from the cost model; nothing here is measured.

python benchmarks/scaling.py            prints the table of docs/scaling.md
python benchmarks/scaling.py --write    writes it to the page
"""

from __future__ import annotations

import sys
from pathlib import Path

from arm_core.model.cost import EMA_BYTES, OPTIMIZER_BYTES, cost_table, step_memory
from arm_core.model.spec import ModelSpec, PretrainSpec
from arm_core.recipe.recipe import Recipe, load_recipe
from arm_core.recipe.toml import Span

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- table: python benchmarks/scaling.py --write -->\n", "<!-- end of table -->\n"

PEAK = 989e12
"""Dense bfloat16 operations per second of an H100 or H200."""
BANDWIDTH = 4.3e12
"""Bytes per second of an H200's memory in a device-to-device copy."""
PRODUCTS = 0.6
"""Estimate: fraction of the peak rate that matrix products reach."""
SCAN_FLOOR = {1: 28.9e-12, 4: 25.9e-12}
"""Seconds of one GPU per token, channel and direction, by the number of directions: scan, convolution and
gate, forward and backward, at their lower bounds (`python tests/cuda/cost.py`)."""
SCAN = 1.85
"""Estimate: time of a kernel relative to its lower bound."""
ELEMENTWISE = 400
"""Estimate: bytes per token, channel and block that norms, activations, casts, residuals and their gradients
move, without compiled blocks."""
LINKS = {8: 450e9, 512: 400e9}
"""Bytes per second around a ring, by the largest number of GPUs: within a machine (NVLink); through the eight
network cards of 400 Gbit/s of each machine."""
IMAGES = 1_281_167
"""ImageNet-1k's training split."""
IMAGE_BYTES = 110e3
"""Mean size of its JPEG files."""
GPUS = (8, 32, 128, 512)
RUNS = tuple(f"{stage}-{size}" for stage in ("pretrain", "finetune") for size in ("base", "large", "huge"))
COLUMNS = (
    "run", "GPUs", "images per update", "per GPU at a time", "accumulation", "state GB", "sharded GB",
    "with activations GB", "sent GB per update",
    "products ms", "scan ms", "elementwise ms", "computing ms", "sending ms", "images/s", "read MB/s",
    "hours",
)  # fmt: skip


def plan(name: str, gpus: int) -> tuple[str, ...] | None:
    """One row; None if an update has fewer images than there are GPUs."""
    recipe: Recipe = load_recipe(name)
    spec = recipe.spec(1000)
    batch, average = recipe.training.batch_size, recipe.optimizer.ema_decay is not None
    accumulation = max(recipe.training.accumulation, gpus)
    if batch % accumulation:
        return None
    micro, parts = batch // accumulation, cost_table(spec)
    parameters = sum(part.parameters for part in parts)
    memory = step_memory(spec, value_bytes=2, average=average)
    shards = (OPTIMIZER_BYTES + (EMA_BYTES if average else 0)) * parameters / gpus
    sent = 2 * 4 * parameters * (gpus - 1) / gpus  # float32 gradients, reduced and distributed in a ring
    shares = [batch / gpus * seconds for seconds in image_seconds(spec)]
    computing = sum(shares)
    sending = sent / next(speed for most, speed in LINKS.items() if gpus <= most)
    rate = batch / max(computing, sending)  # gradients are sent during the backward pass
    seconds = epochs(recipe.training.length) * IMAGES / rate
    return (
        name, str(gpus), str(batch), str(micro), str(accumulation), f"{memory.state / 1e9:.1f}",
        f"{shards / 1e9:.2f}", f"{memory.total(micro) / 1e9:.0f}", f"{sent / 1e9:.1f}",
        *(f"{1e3 * share:.1f}" for share in shares),
        f"{1e3 * computing:.1f}", f"{1e3 * sending:.0f}", f"{rate:,.0f}",
        f"{rate * IMAGE_BYTES / 1e6:,.0f}", f"{seconds / 3600:,.1f}",
    )  # fmt: skip


def image_seconds(spec: ModelSpec) -> tuple[float, float, float]:
    """Estimated seconds of one GPU per image in a training step: products, scan, elementwise."""
    parts = {part.name: part.multiply_adds for part in cost_table(spec)}
    scanned = ("mixer scan", "mixer convolution")
    operations = 6 * sum(n for name, n in parts.items() if name not in scanned)  # twice as many backward
    encoder = spec.encoder
    values = spec.tokens * encoder.width * encoder.depth
    scan = SCAN * SCAN_FLOOR[spec.directions] * spec.directions * values
    if isinstance(spec, PretrainSpec):
        values += spec.tokens * spec.decoder_width * spec.decoder_depth
    return operations / (PRODUCTS * PEAK), scan, ELEMENTWISE * values / BANDWIDTH


def epochs(length: Span) -> float:
    if not length.unit.startswith("epoch"):
        raise ValueError(f"expected a run's length in epochs, found {length}")
    return float(length.amount)


def table() -> str:
    rows = [row for name in RUNS for gpus in GPUS if (row := plan(name, gpus))]
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print(table(), end="")
        return
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
