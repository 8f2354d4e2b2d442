"""Exported files compared with the engine and with a ViT-B of the same input, one image on a CPU.

    python benchmarks/export.py [--presets tiny base] [--threads 1 2] [--repeats 15] [--browser]

For each preset's classifier (224 x 224, four directions, random weights): the ONNX file in onnxruntime,
float32 and int8, and the torch engine. The ViT-B is plain ONNX with the same patches (12 blocks of width
768, 12 heads, GELU, class token; random weights). Outputs are compared first. All are timed in turn, so that
a busy machine slows all of them: compare ratios, and with one thread the CPU time. --browser adds images per
second of the tiny page in a headless Chromium.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hardware import header

from arm_convert.onnx_model.builder import FLOAT, Builder, value
from arm_convert.onnx_model.file import OnnxOptions, build
from arm_convert.onnx_model.quantize import write_int8
from arm_convert.onnx_model.session import OnnxFile
from arm_core.data.transforms import EvalTransform
from arm_core.engine.protocol import EngineOptions, TrainingState
from arm_core.engine.registry import choose_backend
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset

WARM_UP = 2


def vit(path: Path, width: int = 768, depth: int = 12, heads: int = 12) -> None:
    """A ViT-B/16 as an ONNX file: pixel_values (1, 3, 224, 224) -> logits (1, 1000)."""
    import onnx
    from onnx import helper, numpy_helper

    g, rng, tokens = Builder(), np.random.default_rng(0), 197

    def weight(*shape: int) -> str:
        array = (rng.standard_normal(shape) * 0.02).astype(np.float32)
        return g.constant(f"weight.{len(g.constants)}", array)

    def linear(x: str, fan_in: int, fan_out: int) -> str:
        return g("Add", g("MatMul", x, weight(fan_in, fan_out)), weight(fan_out))

    def norm(x: str) -> str:
        return g("LayerNormalization", x, weight(width), weight(width), axis=-1, epsilon=1e-6)

    def split_heads(x: str) -> str:
        return g("Transpose", g("Reshape", x, g.ints(1, tokens, heads, width // heads)), perm=[0, 2, 1, 3])

    x = g("Conv", "pixel_values", weight(width, 3, 16, 16), kernel_shape=[16, 16], strides=[16, 16])
    x = g("Transpose", g("Reshape", x, g.ints(1, width, 196)), perm=[0, 2, 1])
    x = g("Add", g("Concat", weight(1, 1, width), x, axis=1), weight(1, tokens, width))
    for _ in range(depth):
        query, key, other = g.several(
            "Split", linear(norm(x), width, 3 * width), outputs=3, axis=-1, num_outputs=3
        )
        key = g("Transpose", split_heads(key), perm=[0, 1, 3, 2])
        scale = g.shared(np.array((width // heads) ** -0.5, np.float32))
        scores = g("Softmax", g("Mul", g("MatMul", split_heads(query), key), scale), axis=-1)
        mixed = g("Transpose", g("MatMul", scores, split_heads(other)), perm=[0, 2, 1, 3])
        x = g("Add", x, linear(g("Reshape", mixed, g.ints(1, tokens, width)), width, width))
        hidden = linear(norm(x), width, 4 * width)
        gate = g("Erf", g("Mul", hidden, g.shared(np.array(2**-0.5, np.float32))))
        half = g("Mul", hidden, g.shared(np.array(0.5, np.float32)))
        hidden = g("Mul", half, g("Add", gate, g.shared(np.array(1, np.float32))))
        x = g("Add", x, linear(hidden, 4 * width, width))
    x = g("Gather", norm(x), g.shared(np.array(0, np.int64)), axis=1)
    g.nodes.append(helper.make_node("Identity", [linear(x, width, 1000)], ["logits"]))
    constants = [numpy_helper.from_array(array, name) for name, array in g.constants.items()]
    entry, result = value("pixel_values", FLOAT, (1, 3, 224, 224)), value("logits", FLOAT, (1, 1000))
    graph = helper.make_graph(g.nodes, "vit", [entry], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)


def session(path: Path, threads: int) -> Callable[[], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    run = onnxruntime.InferenceSession(path, options).run
    image = np.zeros((1, 3, 224, 224), np.float32)
    return lambda: run(None, {"pixel_values": image})[0]


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds of every call, interleaved: (elapsed, CPU time of all its threads)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(WARM_UP + repeats):
        for name, call in calls.items():
            began, busy = time.perf_counter(), time.process_time()
            call()
            if repeat >= WARM_UP:
                passed = time.perf_counter() - began, time.process_time() - busy
                times[name].append((1e3 * passed[0], 1e3 * passed[1]))
    return times


def preset_rows(name: str, threads: int, repeats: int, folder: Path) -> None:
    import torch

    torch.set_num_threads(threads)
    spec = classifier_preset(name)
    parameters = initial_parameters(spec, 0)
    model = build(spec, parameters, options=OnnxOptions())
    full, int8, transformer = (folder / f"{name}.{kind}.onnx" for kind in ("float32", "int8", "vit"))
    model.write(full, force=True)
    write_int8(model, int8, force=True)
    options = EngineOptions(device="cpu", threads=threads)
    engine = choose_backend("torch").create_engine(
        spec, TrainingState(parameters=parameters), options=options
    )
    image = np.random.default_rng(0).standard_normal((1, 224, 224, 3)).astype(np.float32)
    files = {"ONNX float32": OnnxFile(full, threads=threads), "ONNX int8": OnnxFile(int8, threads=threads)}
    calls: dict[str, Callable[[], object]] = {"torch engine": lambda: engine.forward(image)}
    expected = engine.forward(image)["logits"]
    print(f"\n{name}, {threads} threads, {model.nodes} nodes")
    for kind, file in files.items():
        found = file.run(image)["logits"]
        difference = np.abs(found - expected).max() / np.abs(expected).max()
        size, load = file.facts["bytes"] / 1e6, file.facts["load_seconds"]
        print(f"  {kind}: {size:.1f} MB, loads in {load:.2f} s, largest difference {difference:.1e}")
        assert kind != "ONNX float32" or difference < 1e-4, (
            "the file and the engine compute different results"
        )
        calls[kind] = lambda file=file: file.run(image)
    if name == "base":
        vit(transformer)
        calls["ViT-B, ONNX float32"] = session(transformer, threads)
    times = measure(calls, repeats)
    engine_ms = [statistics.median(column) for column in zip(*times["torch engine"], strict=True)]
    print(f"  {'':22s}  median  fastest   / engine     CPU time  / engine")
    for kind, values in times.items():
        elapsed, busy = zip(*values, strict=True)
        middle, cpu = statistics.median(elapsed), statistics.median(busy)
        ratios = middle / engine_ms[0], cpu / engine_ms[1]
        print(f"  {kind:22s}{middle:8.1f} {min(elapsed):8.1f} {ratios[0]:10.2f} {cpu:12.1f} {ratios[1]:9.2f}")


def browser_row(folder: Path) -> None:
    from arm_convert.browser.page import PageSettings, write_page
    from arm_convert.browser.runtime import find_runtime

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import chromium

    if reason := chromium.missing():
        print(f"\nbrowser: {reason}")
        return
    spec = classifier_preset("tiny")
    options = OnnxOptions(preprocess=EvalTransform())
    settings = PageSettings(title="tiny", classes=tuple(map(str, range(spec.classes))))
    model = build(spec, initial_parameters(spec, 0), options=options)
    write_page(folder / "tiny.html", model, spec, settings, find_runtime(), force=True)
    with chromium.Page(folder / "tiny.html") as page:
        page.wait_for("document.body?.dataset.ready", timeout=200)
        rates = [page.evaluate("arm.benchmark(30)", timeout=300) for _ in range(3)]
        print(f"\ntiny in Chromium, {page.evaluate('arm.threads')} workers: {max(rates):.1f} images/s", rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["tiny", "base"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--browser", action="store_true")
    words = parser.parse_args()
    print(header("torch", "onnx", "onnxruntime", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        for name in words.presets:
            for threads in words.threads:
                preset_rows(name, threads, words.repeats, Path(folder))
        if words.browser:
            browser_row(Path(folder))


if __name__ == "__main__":
    main()
