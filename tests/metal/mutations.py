"""Mistakes that the tests must detect, planted in the kernels one at a time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    breaks: str
    file: str
    old: str
    new: str
    equivalent: str = ""
    """The reason why the results do not change, if they do not."""

    def __str__(self) -> str:
        return f"{self.file}: {self.breaks}"


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"

MUTATIONS = [
    # helpers.metal
    Mutation("sums of the wrong lanes", "helpers", "send, ushort(MASK)", "send, ushort(MASK / 2)"),
    Mutation("each half keeps the other's sums", "helpers", "keep = upper ? high : low", "keep = low"),
    Mutation(
        "values of a neighbouring channel",
        "helpers",
        "(lane & 3u & ~uint(LANES - 1)) + uint(j)",
        "lane + uint(j)",
    ),
    Mutation(
        "softplus without its correction", "helpers", "x * (metal::log(y) / (y - 1.0f))", "metal::log(y)"
    ),
    Mutation(
        "sigmoid overflows", "helpers", "(x >= 0.0f ? 1.0f : e) / (1.0f + e)", "1.0f / (1.0f + metal::exp(x))"
    ),
    # scan_setup.metal
    Mutation("lanes beyond the last channel read on", "scan_setup", "live ? wanted : CHANNELS - 1", "wanted"),
    Mutation(
        "lanes beyond the last channel write",
        "scan_setup",
        "live = wanted < CHANNELS",
        "live = wanted < CHANNELS + 4",
    ),
    Mutation(
        "directions and images change places",
        "scan_setup",
        "direction * int(threadgroups_per_grid.z) + image",
        "image * int(threadgroups_per_grid.y) + direction",
    ),
    Mutation(
        "one SIMD group does the work of another", "scan_setup", "* SIMDGROUPS + simd)", "* SIMDGROUPS)"
    ),
    Mutation("decays with an error of 4e-5", "scan_setup", "1.44269504088896341f", "1.4427f"),
    # scan_forward.metal
    Mutation(
        "idle lanes leave before SIMD operations",
        "scan_forward",
        "float h[OWN_STATES];",
        "if (!live) return; float h[OWN_STATES];",
    ),
    Mutation("order is read past its end", "scan_forward", "metal::min(t, LENGTH - 1)", "t"),
    Mutation(
        "tokens past the end overwrite the last", "scan_forward", "if (t < LENGTH && live)", "if (live)"
    ),
    Mutation("the skip D u is lost", "scan_forward", "metal::fma(skip, own_u, y_part[0])", "y_part[0]"),
    Mutation(
        "B of another direction",
        "scan_forward",
        "drive * float(B[row + i])",
        "drive * float(B[row - tokens * STATES + i])",
    ),
    Mutation("states are kept one place late", "scan_forward", "after / CHUNK - 1", "after / CHUNK"),
    Mutation("a state is kept after the last token", "scan_forward", "&& after < LENGTH", ""),
    Mutation("an uninitialised state is kept", "scan_forward", "h[i] = 0.0f", ""),
    # scan_backward.metal
    Mutation(
        "sums are read before all are written", "scan_backward", f"{BARRIER}\n  for (int e", "for (int e"
    ),
    Mutation("sums are overwritten before all are read", "scan_backward", f"  {BARRIER}\n}}\n", "}\n"),
    Mutation(
        "half of the lanes pass a barrier",
        "scan_backward",
        f"{BARRIER}\n  for (int e",
        f"if (lane < 16) {BARRIER}\n  for (int e",
    ),
    Mutation("a chunk starts from the state after it", "scan_backward", "+ chunk - 1)", "+ chunk)"),
    Mutation("idle lanes count in dB and dC", "scan_backward", "t < LENGTH && live ?", "t < LENGTH ?"),
    Mutation("tokens past the end count", "scan_backward", "t < LENGTH && live ?", "live ?"),
    Mutation(
        "later tokens' gradient does not decay", "scan_backward", "g[i] = grad_h * decay;", "g[i] = grad_h;"
    ),
    Mutation("the first gradient is what was in the register", "scan_backward", "g[i] = 0.0f;", ""),
    Mutation(
        "A's gradient without the step",
        "scan_backward",
        "metal::fma(grad_exponent, step, chunk_A[i])",
        "grad_exponent + chunk_A[i]",
    ),
    Mutation(
        "C's gradient from the state before",
        "scan_backward",
        "grad * h[now + 1][i]",
        "grad * h[now][i]",
    ),
    Mutation("exponents of 2 taken for those of e", "scan_backward", "0.693147180559945309f", "1.0f"),
    Mutation("dt's gradient without softplus", "scan_backward", "grad_step * own_slope[q]", "grad_step"),
    Mutation("dD is not written", "scan_backward", "dD[at] = grad_D;", ""),
    Mutation(
        "threadgroups write to one place", "scan_backward", " + int(threadgroup_position_in_grid.x);", ";"
    ),
    Mutation("one SIMD group's sums are missing", "scan_backward", "int w = 0;", "int w = 1;"),
    Mutation(
        "dt_bias' gradient of a single lane",
        "scan_backward",
        "grad_bias += metal::simd_shuffle_xor(grad_bias, ushort(m));",
        "",
    ),
    Mutation(
        "every lane writes a shared sum",
        "scan_backward",
        "if (column % SHARED == 0)",
        "",
        equivalent="the lanes that share a sum hold the same bits and write them to the same place",
    ),
    # conv_forward.metal
    Mutation("a run does not see the one before", "conv_forward", "t >= 0 ?", "t >= start ?"),
    Mutation(
        "tokens in memory order and not in scan order",
        "conv_forward",
        "own_x[token * stride]",
        "own_x[(first + i) * stride]",
    ),
    Mutation("the last run continues past the end", "conv_forward", "if (first + i < LENGTH)", ""),
    # conv_backward.metal
    Mutation(
        "a run does not see the one after", "conv_backward", "first < stop + CONV_WIDTH - 1", "first < stop"
    ),
    Mutation(
        "steps at a border count twice in the weight", "conv_backward", "t < stop ? grad : 0.0f", "grad"
    ),
    Mutation("runs write each other's tokens", "conv_backward", "done >= start &&", "done >= 0 &&"),
    Mutation("steps past the end", "conv_backward", "if (t < LENGTH)", ""),
    Mutation(
        "SiLU's slope is its sigmoid",
        "conv_backward",
        "sigmoid * metal::fma(sum, 1.0f - sigmoid, 1.0f)",
        "sigmoid",
    ),
    # gate_forward.metal, gate_backward.metal
    Mutation("z as if it were contiguous", "gate_forward", "int(z_strides[1])", "int(sizes.x)"),
    Mutation("x as if it were contiguous", "conv_backward", "int(x_strides[1])", "CHANNELS"),
    Mutation("a sum instead of the mean", "gate_forward", "sum * (1.0f / float(DIRECTIONS))", "sum"),
    Mutation("one direction for all", "gate_forward", "y[uint(k) * size + i]", "y[i]"),
    Mutation("the mean is not kept", "gate_forward", "mean[i] = T(average);", ""),
    Mutation("z's gradient without the mean", "gate_backward", "float(mean[i])", "1.0f"),
    Mutation(
        "y's gradient K times",
        "gate_backward",
        "gate * sigmoid * (1.0f / float(DIRECTIONS))",
        "gate * sigmoid",
    ),
    Mutation("D's share of u is one", "scan_backward", "skip * own_grad[q]", "own_grad[q]"),
    Mutation(
        "A's gradient of the first chunk alone",
        "scan_backward",
        "grad_A[i] += chunk_A[i]",
        "grad_A[i] = chunk_A[i]",
    ),
    Mutation(
        "dB and dC swapped",
        "scan_backward",
        "(value < OWN_STATES ? 0 : STATES)",
        "(value < OWN_STATES ? STATES : 0)",
    ),
    Mutation(
        "dD of one lane alone", "scan_backward", "grad_D += metal::simd_shuffle_xor(grad_D, ushort(m));", ""
    ),
    Mutation("gradients of x as the steps lie", "conv_backward", "order[path + done]", "done"),
    Mutation(
        "steps at a border count twice in the bias",
        "conv_backward",
        "grad_bias += own;",
        "grad_bias += grad;",
    ),
    Mutation("z of the first image for all", "gate_forward", "z + at.z * z_strides[0]", "z"),
]
