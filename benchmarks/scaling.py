"""Plans the paper's runs for 8 to 512 GPUs from the cost model; nothing here is measured.

python benchmarks/scaling.py            prints the table of docs/scaling.md
python benchmarks/scaling.py --write    writes it to the page
"""

from __future__ import annotations

import sys
from pathlib import Path

from arm_core.model.machines import MACHINES, estimate, state_bytes
from arm_core.recipe.recipe import Recipe, load_recipe
from arm_core.recipe.toml import Span

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- table: python benchmarks/scaling.py --write -->\n", "<!-- end of table -->\n"

MACHINE = MACHINES["h200"]
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
    if batch % max(recipe.training.accumulation, gpus):
        return None
    found = estimate(
        spec, MACHINE, gpus, batch_size=batch, accumulation=recipe.training.accumulation, average=average
    )
    shards = state_bytes(spec, average=average) / gpus
    shares, micro = (found.products, found.scan, found.elementwise), found.micro_batch
    rate = batch / found.seconds
    seconds = epochs(recipe.training.length) * IMAGES / rate
    return (
        name, str(gpus), str(batch), str(micro), str(found.accumulation), f"{found.memory.state / 1e9:.1f}",
        f"{shards / 1e9:.2f}", f"{found.memory.total(micro) / 1e9:.0f}", f"{found.sent / 1e9:.1f}",
        *(f"{1e3 * share:.1f}" for share in shares),
        f"{1e3 * found.computing:.1f}", f"{1e3 * found.sending:.0f}", f"{rate:,.0f}",
        f"{rate * IMAGE_BYTES / 1e6:,.0f}", f"{seconds / 3600:,.1f}",
    )  # fmt: skip


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
