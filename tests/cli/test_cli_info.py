"""`arm`, `arm info` and `arm doctor` on the command line."""

import json
import warnings

import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_cli.options import PRECISIONS
from arm_core.engine.protocol import Precision
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import PRESETS
from arm_core.model.spec import from_json


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("base", ("99,243,008 (99,427,328", "85,031,656")),
        ("large", ("303,721,696 (303,942,880", "297,035,720")),
        ("huge", ("659,128,064 (659,422,976", "662,682,088")),
    ],
)
def test_info_prints_the_official_counts(name, counts):
    result = arm("info", name)
    assert result.exit_code == 0
    lines = [line for line in result.output.splitlines() if "trainable parameters" in line]
    assert [
        line.split("parameters")[1].strip().removesuffix(" with the fixed position tables)") for line in lines
    ] == [*counts]


@pytest.mark.parametrize("name", PRESETS)
def test_info_as_json_describes_both_models_and_its_parts_add_up(name):
    report = json.loads(arm("info", name, "--json").output)
    assert [from_json(model["config"]).encoder.width for model in report["models"]] == [
        PRESETS[name].width
    ] * 2
    for model in report["models"]:
        assert sum(part["parameters"] for part in model["parts"]) == model["parameters"]["trainable"]
        assert sum(part["multiply_adds"] for part in model["parts"]) == model["multiply_adds_per_image"]


def test_info_reads_a_model_folder(tmp_path, classifier_spec):
    folder = tmp_path / "model"
    write_model(
        folder, classifier_spec, initial_parameters(classifier_spec, 0), metadata={"origin": "a test"}
    )
    result = arm("info", folder)
    assert result.exit_code == 0
    assert "F32" in result.output
    assert "origin=a test" in result.output
    assert "10 classes; scans row, row_reverse, column, column_reverse" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "bsae"], "'bsae' is neither a preset nor a model on disk; did you mean 'base'?"),
        (["inof"], "no command 'inof'; did you mean 'info'?"),
        (["frobnicate"], "no command 'frobnicate'; known are "),
        (["info"], "Missing argument 'PRESET|MODEL'. (see "),
        (["info", "base", "--jsno"], "--json"),
        (["--verbos", "info", "base"], "No such option '--verbos'"),
        (["info", "."], "found no config.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = arm(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_traceback_shows_the_origin_of_an_error():
    result = arm("--traceback", "info", "bsae")
    assert isinstance(result.exception, ValueError)


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("arm_cli.info.describe", lambda spec: {}["absent"])
    assert isinstance(arm("info", "tiny").exception, KeyError)


def test_a_warning_of_the_core_is_one_line_on_stderr(monkeypatch):
    def describe(spec):
        warnings.warn("step-00000002 is corrupt", stacklevel=1)
        return {}

    monkeypatch.setattr("arm_cli.info.describe", describe)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # undone afterwards
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = arm("info", "tiny", "--json")
    assert "Warning: step-00000002 is corrupt\n" in result.stderr


def test_doctor_names_every_backend_device_and_scan():
    report = json.loads(arm("doctor", "--json").output)
    assert set(report["backends"]) == set(installed_backends())
    assert report["auto"] in report["backends"]
    for found in report["backends"].values():
        if found["missing"] is None:
            assert found["cpu_products"]
            assert None in found["devices"]["cpu"].values()
    text = arm("doctor").output
    assert f"--backend auto means {report['auto']}" in text
    assert "scan cpu" in text


class Broken:
    name = "broken"

    def missing(self):
        return None

    def bfloat16_units(self):
        return None

    def cpu_products(self):
        raise OSError("libmissing.so: cannot open shared object file")


class Absent:
    name = "absent"

    def missing(self):
        return "it is not installed; pip install absent"


def test_doctor_reports_broken_and_missing_backends_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(
        "arm_core.engine.registry.installed_backends", lambda: {"broken": Broken(), "absent": Absent()}
    )
    result = arm("doctor")
    assert result.exit_code == 1
    assert "--backend auto means broken, which is broken." in result.output
    assert "installed but broken (OSError: libmissing.so" in result.output
    assert "- for the backend absent: it is not installed; pip install absent" in result.output


def test_doctor_without_any_engine_ends_with_exit_code_1(monkeypatch):
    monkeypatch.setattr("arm_core.engine.registry.installed_backends", lambda: {"absent": Absent()})
    result = arm("doctor")
    assert result.exit_code == 1
    assert "No engine can run here." in result.output


@pytest.mark.parametrize("command", ["pretrain", "finetune", "info"])
def test_the_help_names_every_preset(command):
    text = " ".join(arm(command, "--help").stdout.split())
    assert ", ".join([*PRESETS][:-1]) + f" or {[*PRESETS][-1]}" in text


def test_choices_of_the_command_line_are_those_of_the_core():
    assert set(PRECISIONS) == {str(precision) for precision in Precision}
