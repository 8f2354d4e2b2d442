"""Every `arm` command that the documentation, help texts and messages print parses; tests/docs runs them."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from arm_cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")])

SOURCES = sorted(
    file
    for folder in ("arm_core", "arm_vision", "backends", "convert", "cli", "benchmarks")
    for file in (ROOT / folder).rglob("*.py")
)

COMMAND = re.compile(rf"\barm (?:{'|'.join(COMMANDS)}|X(?= --))\b[^`\n]*")
"""X stands for a stage, pretrain or finetune, that a message fills in."""

END_OF_WORDS = re.compile(r"\s{2,}|\s[#&;>|(]|[,;:)](?:\s|$)|\.(?=\s+[A-Z]|$)|['\"]\)?$")
"""The end of a command in running text: a column of explanations, a shell operator, punctuation."""


def commands_in(text: str) -> list[str]:
    """The commands in a text, without the text after them."""
    found = []
    for line in text.splitlines():
        quoted = re.findall(r"`+(?:[a-z.]+ [^`]*)?(arm [^`]*)`+", line)
        for code in quoted if "`" in line else [line]:
            found += [END_OF_WORDS.split(match)[0].strip() for match in COMMAND.findall(code)]
    return found


def strings_of(source: str) -> list[str]:
    """The strings of a Python file; a value inside an f-string becomes X."""
    tree, texts, inside = ast.parse(source), [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside.update(map(id, node.values))
            texts.append("".join(v.value if isinstance(v, ast.Constant) else "X" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            texts.append(node.value)
    return texts


def printed() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        found += [(str(page.relative_to(ROOT)), command) for command in commands_in(page.read_text("utf-8"))]
    for source in SOURCES:
        for text in strings_of(source.read_text("utf-8")):
            found += [(str(source.relative_to(ROOT)), command) for command in commands_in(text)]
    return list(dict.fromkeys(found))


def check(command: str) -> None:
    """ValueError unless the command's words parse; missing arguments are accepted, since text shortens."""
    words = [re.sub(r"^\[|\]$|\.\.\.$", "", word.split("|")[0]) for word in shlex.split(command)[1:]]
    words[0] = "pretrain" if words[0] == "X" else words[0]
    group: click.Command = main
    context = click.Context(main, info_name="arm")
    while isinstance(group, click.Group):
        if not words:
            return  # the group itself
        name = words.pop(0)
        found = group.get_command(context, name)
        if found is None:
            raise ValueError(f"{command}: no command {name!r}")
        group = found
        context = click.Context(group, info_name=name, parent=context)
    known = {flag for parameter in group.params for flag in parameter.opts} | {"--help", "-h"}
    if unknown := [word for word in words if word.startswith("-") and word.split("=")[0] not in known]:
        raise ValueError(f"{command}: no option {unknown[0]}")
    try:
        group.make_context(group.name, words, parent=context.parent)
    except click.MissingParameter:
        pass
    except click.exceptions.Exit:
        pass  # --help
    except click.BadParameter as error:
        if not re.search(r"'X'|'N'|'LR'|'K'", error.format_message()):  # placeholders for numbers
            raise ValueError(f"{command}: {error.format_message()}") from None
    except click.UsageError as error:
        if "requires an argument" not in error.format_message():
            raise ValueError(f"{command}: {error.format_message()}") from None


@pytest.mark.parametrize(("place", "command"), printed())
def test_every_printed_command_parses(place, command):
    check(command)


def test_commands_are_found_in_documents_help_and_messages():
    places = {place for place, _ in printed()}
    assert {"README.md", "docs/convert.md", "docs/scaling.md", "cli/arm_cli/pretrain.py"} <= places
    assert "arm_core/training/run_folder.py" in places  # messages
    assert len(printed()) > 60


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("    arm info base      its parts", ["arm info base"]),
        ("resume with: arm pretrain --resume X, or not", ["arm pretrain --resume X"]),
        ("say `arm doctor` and `arm finetune --from`.", ["arm doctor", "arm finetune --from"]),
        ("torchrun -n 8 arm evaluate RUN2", ["arm evaluate RUN2"]),
        ("the arm of a robot", []),
    ],
)
def test_commands_are_extracted_from_running_text(text, commands):
    assert commands_in(text) == commands


@pytest.mark.parametrize(
    "command",
    [
        "arm pretrain tiny --dta IMAGES",
        "arm pretrain tiny --compile everything",
        "arm convert imprt a b",
        "arm info base large",
        "arm info --cost",
        "arm X --resum X",
    ],
)
def test_a_wrong_command_is_detected(command):
    with pytest.raises(ValueError, match="arm "):
        check(command)
