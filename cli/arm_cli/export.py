"""`arm export`: a model as a file that runs without this package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from arm_cli.options import EngineChoice, json_option, weights_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_cli.opening import Opened
    from arm_convert.exported import Comparison, ExportedFile, ProgramBackend
    from arm_core.data.decode import Pixels

FORMATS = {".onnx": "onnx", ".html": "browser", ".pt2": "torch", ".mlpackage": "coreml"}
"""Formats by the suffix of OUT."""

NO_COREML = (
    "Core ML files cannot be written: coremltools 9.0 converts neither ONNX files nor torch's scan operator "
    "(docs/export.md); export .onnx instead, which onnxruntime runs on Apple devices"
)

NOISE_IMAGES = 4
"""The number of images for the comparison if --data is not given."""


@click.command(short_help="Write a model as ONNX, torch.export or a web page.")
@click.argument("model")
@click.argument("out", required=False)
@click.option("--to", type=click.Choice(tuple(FORMATS.values())), help="Format. [default: OUT's suffix]")
@click.option("--browser", metavar="OUT.HTML", help="Write a web page that runs the model; same as OUT.html.")
@click.option("--features", is_flag=True, help="Output features instead of logits.")
@click.option("--dynamic-batch", is_flag=True, help="Accept any number of images at a time.")
@click.option("--precision", type=click.Choice(("float32", "float16")), default="float32", show_default=True,
              help="Type of weights and matrix products; the recurrence stays float32.")  # fmt: skip
@click.option("--quantize", type=click.Choice(("int8",)), help="int8 weights of the matrix products.")
@click.option("--opset", type=int, help="ONNX operator set.  [default: 18]")
@click.option("--preprocess", is_flag=True, help="Accept uint8 images; resize, crop and normalize inside.")
@click.option("--scan", type=click.Choice(("portable", "cpu")), default="portable", show_default=True,
              help="Scan of a .pt2 file: torch operators, or the kernel of this package.")  # fmt: skip
@click.option(
    "--compile", "compiled", is_flag=True, help="Compile a .pt2 file with AOTInductor for this CPU."
)
@click.option("--runtime", metavar="FOLDER", help="An unpacked onnxruntime-web package, for a web page.")
@click.option("--draw", is_flag=True, help="Make a page for drawing, instead of photos and the camera.")
@click.option("--title", help="Heading of a web page.")
@click.option("--check", metavar="FILE", help="Only compare an exported FILE with MODEL.")
@click.option("--no-check", is_flag=True, help="Do not compare the file with the model.")
@click.option("--data", metavar="FOLDER", help="Images to compare on: a folder, or `digits`.")
@click.option("--limit", type=click.IntRange(min=1), default=256, show_default=True,
              help="Number of images of --data to compare on, evenly spaced.")  # fmt: skip
@click.option("--backend", metavar="torch|mlx|auto", default="auto", help="Engine to compare with.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the comparison.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@weights_option
@json_option
@click.pass_context
def export(
    ctx: click.Context, /, model: str, out: str | None, to: str | None, browser: str | None,
    check: str | None, no_check: bool, as_json: bool, weights: str, **settings: Any,
) -> None:  # fmt: skip
    """Write MODEL to OUT as a file that runs without this package.

    OUT.onnx is a plain ONNX model, OUT.html a web page that runs it, OUT.pt2 a program of torch.export
    that only needs torch. The file is then compared with the model: the largest difference of an output
    relative to the model's largest value, the share of equal answers, and the latency of one image.
    Without --data the comparison uses noise images, which show differences but not accuracy. The exit
    code is 1 if the difference exceeds the tolerance.
    """
    from arm_cli.opening import open_model

    if check is not None and (out or browser):
        raise ValueError("--check compares an existing file; drop OUT")
    opened = open_model(model, weights=weights)
    report: dict[str, Any] = {"model": str(opened.folder)}
    if check is not None:
        path, kind = Path(check), _format(check, to)
    else:
        path = Path(_target(out, browser))
        kind = "browser" if browser else _format(str(path), to)
        report |= _write(kind, opened, path, settings)
    report["file"] = str(path)
    comparison = None
    if kind in ("onnx", "torch") and not no_check:
        comparison = _compare(opened, path, settings)
        plain = asdict(comparison)
        if comparison.tolerance == float("inf"):
            plain["tolerance"] = None  # JSON has no infinity
        report["comparison"] = {**plain, "within": comparison.within}
    elif check is not None:
        raise ValueError(f"{check}: expected an .onnx or .pt2 file; a page holds an .onnx file")
    _show(report, comparison, settings["data"], as_json)
    if comparison is not None and not comparison.within:
        ctx.exit(1)


def _target(out: str | None, browser: str | None) -> str:
    if out is not None and browser is not None:
        raise ValueError("pass either OUT or --browser OUT.html")
    name = out or browser
    if name is None:
        raise ValueError("expected OUT, a file to write (OUT.onnx or OUT.html), or --check FILE")
    return name


def _format(name: str, to: str | None) -> str:
    kind = to or FORMATS.get(Path(name).suffix)
    if kind is None:
        raise ValueError(f"{name}: expected a name that ends in {', '.join(FORMATS)}; or pass --to")
    return kind


def _write(kind: str, opened: Opened, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the file; returns facts for the report."""
    if kind != "torch" and (settings["compiled"] or settings["scan"] != "portable"):
        raise ValueError(f"--compile and --scan are for .pt2 files, found {path.name}")
    match kind:
        case "onnx":
            return _write_onnx(opened, path, settings)
        case "browser":
            return _write_page(opened, path, settings)
        case "torch":
            return _write_program(opened, path, settings)
        case _:
            raise ValueError(NO_COREML)


def _build(opened: Opened, settings: dict[str, Any], **changes: Any) -> Any:
    from arm_convert.onnx_model.file import DEFAULT_OPSET, OnnxOptions, build
    from arm_convert.onnx_model.session import require

    require()
    values: dict[str, Any] = {
        "features": settings.get("features", False),
        "dynamic_batch": settings.get("dynamic_batch", False),
        "half": settings["precision"] == "float16",
        "opset": settings["opset"] or DEFAULT_OPSET,
        "preprocess": opened.transform if settings.get("preprocess") else None,
    }
    options = OnnxOptions(**{**values, **changes})
    if options.half and settings["quantize"]:
        raise ValueError("--quantize int8 starts from float32; drop --precision float16")
    classes = opened.classes if opened.named else ()
    return build(opened.spec, opened.parameters, options=options, classes=classes, metadata=opened.metadata)


def _write_onnx(opened: Opened, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from arm_convert.onnx_model.quantize import write_int8

    built = _build(opened, settings)
    if settings["quantize"]:
        write_int8(built, path, force=settings["force"])
    else:
        built.write(path, force=settings["force"])
    return {"nodes": built.nodes, "opset": built.opset}


def _torch() -> ProgramBackend:
    from arm_core.engine.registry import choose_backend

    return cast("ProgramBackend", choose_backend("torch"))


def _write_program(opened: Opened, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    for option in ("quantize", "opset", "preprocess"):
        if settings[option]:
            raise ValueError(f"--{option} is for ONNX files; a .pt2 file takes normalized float32 images")
    if settings["precision"] != "float32":
        raise ValueError("--precision float16 is for ONNX files; convert the loaded program instead")
    nodes = _torch().write_program(
        opened.spec, opened.parameters, path,
        features=settings["features"], dynamic_batch=settings["dynamic_batch"], force=settings["force"],
        scan=settings["scan"], compiled=settings["compiled"],
    )  # fmt: skip
    return {"nodes": nodes}


def _write_page(opened: Opened, path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    from arm_convert.browser.page import PageSettings, write_page
    from arm_convert.browser.runtime import find_runtime
    from arm_core.model.spec import ClassifierSpec

    runtime = find_runtime(settings["runtime"])
    if not isinstance(opened.spec, ClassifierSpec):
        raise ValueError("a pretraining model has no classes to show in a page; finetune it first")
    draw, title = settings["draw"], settings["title"]
    page = PageSettings(
        title=title or ("Draw something" if draw else "What is in the picture?"),
        classes=opened.classes,
        crop_fraction=opened.transform.fraction(opened.spec.image_size),
        draw=draw,
        int8=bool(settings["quantize"]),
    )
    built = _build(
        opened, settings, preprocess=opened.transform, features=False, dynamic_batch=False,
        influence=not draw and settings["precision"] == "float32",
    )  # fmt: skip
    write_page(path, built, opened.spec, page, runtime, force=settings["force"])
    return {"runtime": runtime.version, "bytes": path.stat().st_size}


def write_drawing_page(opened: Opened, path: Path, title: str) -> None:
    """Write a page that classifies drawings; ValueError says which package is not installed."""
    settings = {"runtime": None, "draw": True, "title": title, "quantize": None, "force": False}
    _write_page(opened, path, {**settings, "precision": "float32", "opset": None})


def _compare(opened: Opened, path: Path, settings: dict[str, Any]) -> Comparison:
    from arm_convert.exported import compare, noise_images
    from arm_convert.onnx_model.session import OnnxFile

    file: ExportedFile
    if path.suffix == ".pt2":
        file = _torch().open_program(path)
    else:
        file = OnnxFile(path, threads=settings["threads"])
    if opened.spec.encoder.channels != 3:
        raise ValueError(f"the comparison needs images of 3 colours; pass --no-check to write {path} alone")
    choice = EngineChoice(
        backend=settings["backend"], device="cpu", scan="auto", precision=None, threads=settings["threads"]
    )
    engine = choice.create(opened.spec, opened.parameters)
    labels: list[int] | None = None
    if settings["data"]:
        images, labels = _read(settings["data"], opened, settings["limit"])
    else:
        images = noise_images(opened.spec, NOISE_IMAGES)
    return compare(file, engine.forward, images, spec=opened.spec, transform=opened.transform, labels=labels)


def _read(data: str, opened: Opened, limit: int) -> tuple[list[Pixels], list[int] | None]:
    """Decoded images, evenly spaced, and their labels if the model has classes."""
    import numpy as np

    from arm_cli.evaluation_job import open_data
    from arm_core.data.decode import decode
    from arm_core.model.spec import ClassifierSpec

    source = open_data(data, opened)
    items = [source.item(i) for i in np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int)]
    images = [np.asarray(decode(item.image, item.name)) for item in items]
    labelled = isinstance(opened.spec, ClassifierSpec)
    return images, [item.label for item in items] if labelled else None


def _show(report: dict[str, Any], found: Comparison | None, data: str | None, as_json: bool) -> None:
    from arm_cli.show import print_json

    if as_json:
        print_json(report)
        return
    name = report["file"]
    size = (found.facts if found else report).get("bytes") or Path(name).stat().st_size
    parts = [f"{size / 1e6:.1f} MB"]
    if "nodes" in report:
        parts.append(f"{report['nodes']} nodes")
    if "opset" in report:
        parts.append(f"opset {report['opset']}")
    if "runtime" in report:
        parts.append(f"with onnxruntime-web {report['runtime']}; open it in a browser")
    if found is None:
        echo(f"{name}: {', '.join(parts)}")
        return
    echo(f"{name}: {', '.join(parts)}, loads in {found.facts['load_seconds']:.1f} s")
    many = f"{found.images} images" if data else f"{found.images} noise images"
    for output, difference in found.differences.items():
        echo(f"{output}: largest difference {difference:.1e} of the largest value ({many})")
    if found.same_answers is not None:
        echo(f"same answer: {100 * found.same_answers:.1f} % of {many}")
    if found.accuracy is not None:
        echo(f"top-1: file {100 * found.accuracy[0]:.2f} %, model {100 * found.accuracy[1]:.2f} %")
    file, engine = (1e3 * seconds for seconds in found.latency)
    echo(f"latency of one image: file {file:.1f} ms, engine {engine:.1f} ms ({file / engine:.2f} times)")
    if not found.within:
        echo(f"the differences exceed the tolerance for {found.precision}")
