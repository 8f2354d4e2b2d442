"""From the generated Metal source to a C++ program. The kernel's own text is changed in two places only:
declarations of threadgroup variables, and the instantiation at the end."""

from __future__ import annotations

import re
from pathlib import Path

from emulator.trace import Launch

HERE = Path(__file__).parent
POSITION = "position"
THREADGROUP_VARIABLE = re.compile(r"\bthreadgroup\s+([\w:]+)\s+(\w+)\s*((?:\[[^\]]*\])+)\s*;")
PARAMETER = re.compile(r"(?P<type>.*?)\s*(?P<name>\w+) \[\[(?P<attribute>\w+)(?:\((?P<index>\d+)\))?\]\]")
INSTANTIATION = re.compile(r"\ntemplate \[\[host_name\(.*", re.DOTALL)


def program(launch: Launch) -> str:
    """C++ that runs the launch when linked with the runtime: the kernel, and its call for one thread."""
    body = INSTANTIATION.sub("", _with_threadgroup_variables(launch.source))
    calls = ", ".join(_argument(parameter) for parameter in _parameters(launch))
    return f"""#include <metal_stdlib>
#line 1 "generated.metal"
{body}
#undef device
#undef constant
#undef threadgroup
#undef thread
#line 1 "launch"
static void** buffers;
void emulator::call_kernel(const Position& {POSITION}) {{
  {launch.name}{_template_arguments(launch)}({calls});
}}
extern "C" void emulator_bind(void** given) {{ buffers = given; }}
"""


def strict_program(launch: Launch) -> str:
    """C++ that clang can check: address spaces kept, the template instantiated."""
    body = _with_threadgroup_variables(launch.source)
    body = re.sub(r"template \[\[host_name\([^\n]*?\)\]\] \[\[kernel\]\] decltype", "template decltype", body)
    return f'#define METAL_STRICT\n#include <metal_stdlib>\n#line 1 "generated.metal"\n{body}'


def _with_threadgroup_variables(source: str) -> str:
    return THREADGROUP_VARIABLE.sub(r"THREADGROUP_VARIABLE(\1, \2, \3)", source)


def _parameters(launch: Launch) -> list[re.Match[str]]:
    signature = re.search(
        rf"\[\[kernel\]\] void {re.escape(launch.name)}\(\n(.*?)\) \{{\n", launch.source, re.S
    )
    assert signature, "MLX generates the signature of a kernel in an unexpected form"
    found = [PARAMETER.fullmatch(line.strip()) for line in signature[1].split(",\n")]
    return [match for match in found if match]


def _argument(parameter: re.Match[str]) -> str:
    if parameter["attribute"] != "buffer":
        return f"{POSITION}.{parameter['attribute']}"
    pointer = re.sub(r"\b(device|constant)\b ?", "", parameter["type"])
    assert pointer.endswith("*"), f"{parameter[0]}: the kernels take only arrays"
    return f"reinterpret_cast<{pointer}>(buffers[{parameter['index']}])"


def _template_arguments(launch: Launch) -> str:
    found = re.search(rf"decltype\({re.escape(launch.name)}(<.*?>)\)", launch.source)
    return found[1] if found else ""
