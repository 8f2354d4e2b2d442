"""The plan in docs/scaling.md matches its script."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_page_is_up_to_date(scaling):
    page = scaling.PAGE.read_text()
    assert page.split(scaling.BEGIN)[1].split(scaling.END)[0] == scaling.table(), (
        "python benchmarks/scaling.py --write"
    )


def test_more_gpus_need_less_memory_and_less_time_each(scaling):
    rows = [scaling.plan("pretrain-huge", gpus) for gpus in scaling.GPUS]
    column = dict(zip(scaling.COLUMNS, zip(*rows, strict=True), strict=True))
    for name in ("sharded GB", "computing ms", "with activations GB"):
        values = [float(value.replace(",", "")) for value in column[name]]
        assert values == sorted(values, reverse=True), name
    assert all(int(a) >= int(g) for a, g in zip(column["accumulation"], column["GPUs"], strict=True))
