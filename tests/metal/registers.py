"""Whether a kernel fits the registers: its code is compiled for another GPU with SIMD groups of 32 lanes.

    python tests/metal/registers.py      registers and spills for the constants worth considering

Apple's GPUs have 128 registers of 32 bits per lane. Only Apple's compiler knows how many a kernel needs.
AMD's RDNA 3, for which clang compiles, replaces it: with the same limit, clang reports the spills.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from cost import Shape, optimised, traced_calls
from emulator import Launch
from emulator.strict import NEEDED, compiler

from arm_mlx.metal.tuning import TABLE

LIMIT = 124
"""Four of the 128 are reserved for the compiler."""

LAYOUT = (
    "e-p:64:64-p1:64:64-p2:32:32-p3:32:32-p4:64:64-p5:32:32-p6:32:32-p7:160:256:256:32-p8:128:128-"
    "p9:192:256:256:32-i64:64-v16:16-v24:32-v32:32-v48:64-v96:128-v192:256-v256:256-v512:512-v1024:1024-"
    "v2048:2048-n32:64-S32-A5-G1-ni:7:8:9"
)
INTRINSICS = """
declare float @llvm.amdgcn.exp2.f32(float)
declare float @llvm.amdgcn.log.f32(float)
declare void @llvm.amdgcn.s.barrier()
declare i32 @llvm.amdgcn.ds.bpermute(i32, i32)
define internal i32 @shuffle_i32(i32 %value, i16 %from) alwaysinline {
  %lane = zext i16 %from to i32
  %result = call i32 @llvm.amdgcn.ds.bpermute(i32 %lane, i32 %value)
  ret i32 %result
}
define internal float @shuffle_float(float %value, i16 %from) alwaysinline {
  %bits = bitcast float %value to i32
  %moved = call i32 @shuffle_i32(i32 %bits, i16 %from)
  %result = bitcast i32 %moved to float
  ret float %result
}
"""


@dataclass(frozen=True)
class Fit:
    registers: int
    spilled_bytes: int
    code_bytes: int


def fit(kernel: Launch, limit: int = LIMIT) -> Fit:
    """The kernel with at most `limit` registers per lane. Raises RuntimeError with clang's message."""
    with tempfile.TemporaryDirectory() as folder:
        source, assembly = Path(folder, "kernel.ll"), Path(folder, "kernel.s")
        source.write_text(_for_amd(optimised(kernel), limit))
        command = [str(compiler()), "--target=amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib", "-O2", "-S"]
        command += ["-x", "ir", str(source), "-o", str(assembly)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        text = assembly.read_text()

    def number(name: str) -> int:
        found = re.search(rf"; {name}\D+(\d+)", text)
        assert found, name
        return int(found[1])

    return Fit(number("NumVgprs"), number("ScratchSize"), number("codeLenInByte"))


def _for_amd(code: str, limit: int) -> str:
    """LLVM's code for the host, converted to a kernel for the GPU: layout, intrinsics, attributes."""
    changes = [
        (r"^declare .*metal.*$", ""),
        (r"^target datalayout.*$", f'target datalayout = "{LAYOUT}"'),
        (r"^target triple.*$", 'target triple = "amdgcn-amd-amdhsa"'),
        (r"^\$.*$|,? comdat", ""),
        (r"linkonce_odr dso_local local_unnamed_addr addrspace\(3\)", "internal addrspace(3)"),
        (r"zeroinitializer, align", "poison, align"),
        (r"^define [^@]*void @(\w*custom_kernel)", r"define amdgpu_kernel void @\1"),
        (r"byval\([^)]*\) align \d+", ""),
        (r"@_ZN5metal(?:4exp2|3exp)Ef\(", "@llvm.amdgcn.exp2.f32("),
        (r"@_ZN5metal3logEf\(", "@llvm.amdgcn.log.f32("),
        (r"@_ZN5metal\d+(?:simd|quad)_shuffle\w*I([fi])EET_S1_t", r"@shuffle_\1"),
        (r"@shuffle_f\b", "@shuffle_float"),
        (r"@shuffle_i\b", "@shuffle_i32"),
        (r"call void @_ZN5metal19threadgroup_barrier\S+\([^)]*\)", "call void @llvm.amdgcn.s.barrier()"),
        (r'"target-features"="[^"]*"|"tune-cpu"="[^"]*"', ""),
        (
            r'"target-cpu"="[^"]*"',
            f'"target-cpu"="gfx1100" "amdgpu-flat-work-group-size"="256,256" "amdgpu-num-vgpr"="{limit}"',
        ),
    ]
    for pattern, replacement in changes:
        code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
    return code + INTRINSICS


def main() -> None:
    if compiler() is None:
        sys.exit(f"counting registers {NEEDED}")
    base = TABLE["any"][16]
    choices = [base, replace(base, keep_decays=True), replace(base, chunk=4), replace(base, chunk=16)]
    choices += [
        replace(base, lanes=2),
        replace(base, lanes=2, chunk=4),
        *(TABLE["any"][n] for n in (8, 32, 64)),
    ]
    print("| states | lanes | chunk | decays | forward | backward | spilled | code |")
    print("|---|---|---|---|---|---|---|---|")
    for choice in choices:
        calls = traced_calls(Shape(1, 1024, states=choice.states), choice)
        forward, backward = (fit(calls[name][0]) for name in ("scan_forward_saving", "scan_backward"))
        decays = "kept" if choice.keep_decays else "computed again"
        print(
            f"| {choice.states} | {choice.lanes} | {choice.chunk} | {decays} | {forward.registers} "
            f"| {backward.registers} | {backward.spilled_bytes} B | {backward.code_bytes / 1024:.1f} KB |"
        )


if __name__ == "__main__":
    main()
