// Backward pass of the selective scan over K directions, in CUDA C++ for NVRTC.
//
// Same inputs, results and method as `scan_backward` of triton/scan_kernels.py; see there for the sizes. Here a
// warp's layout is explicit. A warp has 32 channels and N states. Lane (g, j) = 4 g + j holds the states of a
// tile: channels 4 g to 4 g + 3, states j N/4 to (j + 1) N/4 - 1. Values of single channels (dt, u, gradients)
// are computed once, by the lane with the channel's number. Therefore:
//
// - sums over states (for dt and u) are sums in registers, then exchanges between 4 lanes;
// - sums over channels (for B and C) are sums in registers, then exchanges between 8 lanes;
// - no value is needed from another warp, so that a block is one warp and never waits for another.
//
// A chunk of CHUNK tokens, before which the forward pass saved the state, is divided into spans of SPAN tokens,
// from the last to the first. For each span, the state is computed up to the span's first token, then before
// every GROUP-th token of the span, which shared memory keeps. Then the groups are taken from the last to the
// first: forward again with decays and states in registers, then backward.
//
// NVRTC defines the macros ELEMENT (float, bfloat16 or float16), STATES, CHUNK, SPAN, GROUP, MASKED, which is 1 if
// the channels are not divisible by 32, and RESIDENT, the warps of a multiprocessor, which share its registers.

constexpr int LANES = 32;
constexpr int SIDE = 4;              // lanes over states, and channels of a tile
constexpr int TILE = STATES / SIDE;  // states of a tile
constexpr int GROUPS = SPAN / GROUP;
constexpr int KEPT = TILE < 4 ? 1 : TILE / 4;  // sums over channels that one lane keeps
static_assert(STATES % 8 == 0 && CHUNK % SPAN == 0 && SPAN % GROUP == 0, "sizes do not divide");

struct alignas(16) Four { float at[4]; };

// Loads, stores and approximate functions as single instructions. The tests replace them: a CPU has no PTX.
#if defined(EMULATED)
#include "emulated.h"
#else
struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

__device__ __forceinline__ float load(const float *from) {
    float x;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ float load(const bfloat16 *from) {
    unsigned short x;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(from));
    return __uint_as_float((unsigned)x << 16);
}
__device__ __forceinline__ float load(const float16 *from) {
    float x;
    asm("{ .reg .b16 half; ld.global.nc.b16 half, [%1]; cvt.f32.f16 %0, half; }" : "=f"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ void store(float *to, float x) {
    asm volatile("st.global.f32 [%0], %1;" : : "l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store(bfloat16 *to, float x) {
    asm volatile("{ .reg .b16 half; cvt.rn.bf16.f32 half, %1; st.global.b16 [%0], half; }"
                 : : "l"(to), "f"(x) : "memory");
}
__device__ __forceinline__ void store(float16 *to, float x) {
    asm volatile("{ .reg .b16 half; cvt.rn.f16.f32 half, %1; st.global.b16 [%0], half; }"
                 : : "l"(to), "f"(x) : "memory");
}

// base + token * bytes in one instruction
__device__ __forceinline__ const void *offset(const void *base, int token, int bytes) {
    unsigned long long at;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(token), "r"(bytes), "l"(base));
    return (const void *)at;
}

// approximate instructions: relative errors up to 2^-22 and 2^-23; they flush denormal numbers to 0
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

typedef ELEMENT Element;

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Step { float softplus, sigmoid; };

// log(1 + e^x), accurate to a few units in the last place (see triton/arithmetic.py), and its derivative.
__device__ __forceinline__ Step step_of(float x) {
    float e = exp2_(-fabsf(x) * LOG2_E);
    float s = e * reciprocal(2.0f + e), q = s * s;
    float p = 2.0f / 13 * q + 2.0f / 11;
    p = p * q + 2.0f / 9;
    p = p * q + 2.0f / 7;
    p = p * q + 2.0f / 5;
    p = p * q + 2.0f / 3;
    p = p * q + 2.0f;
    float r = reciprocal(1.0f + e);
    return {fmaxf(x, 0.0f) + p * s, x < 0 ? e * r : r};
}

// Values of a token. Those of channels are read back in fours, by the lanes of their tile.
struct alignas(16) Token {
    float step[LANES], drive[LANES], dy[LANES], x[LANES], sigmoid[LANES];  // drive = step * x
    float BC[2 * STATES];  // B, then C
};

struct alignas(16) Span {
    Token at[SPAN];
    Four h[GROUPS][TILE][LANES];  // before each group; read by the lane that wrote it
    int token[SPAN];
};

__device__ __forceinline__ Four four(const float *at) { return *reinterpret_cast<const Four *>(at); }

// Sum over lanes whose numbers differ in the bit MASK; of 2 COUNT values, a lane keeps the half that its bit names.
template <int COUNT, int MASK> __device__ __forceinline__ void halve(float *values, int lane) {
    bool upper = lane & MASK;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        float send = upper ? values[i] : values[i + COUNT], keep = upper ? values[i + COUNT] : values[i];
        values[i] = keep + __shfl_xor_sync(0xffffffffu, send, MASK);
    }
}

// A lane's column of a tensor (tokens, columns).
template <typename T> struct Column {
    T *first;
    int bytes;  // from one token to the next
    __device__ __forceinline__ T *operator[](int token) const { return (T *)offset(first, token, bytes); }
};

// What a lane reads: its channel of u, dt and grad_y, and (2 STATES / LANES) columns of B and C.
struct Columns {
    static constexpr int OF_STATES = (2 * STATES + LANES - 1) / LANES;
    Column<const Element> u, dt, dy, BC[OF_STATES];
    const int *order;
    int length;
    float bias;
    bool inside;  // whether the lane has a channel

    // Read the tokens from `start` on; without GRADIENTS, only what the recurrence needs. Past the end of the
    // sequence, the last token with zeros for dy: nothing is added to a sum.
    template <bool GRADIENTS> __device__ __forceinline__ void read(Span &span, int start, int lane) const {
        if (lane < SPAN) span.token[lane] = order[min(start + lane, length - 1)];
        __syncwarp();
        float x[SPAN], raw[SPAN], of_y[SPAN], of_states[OF_STATES][SPAN];
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            int token = span.token[i];
            raw[i] = !MASKED || inside ? load(dt[token]) : 0.0f;
            x[i] = !MASKED || inside ? load(u[token]) : 0.0f;
            of_y[i] = GRADIENTS && start + i < length && (!MASKED || inside) ? load(dy[token]) : 0.0f;
#pragma unroll
            for (int part = 0; part < OF_STATES; part++) of_states[part][i] = load(BC[part][token]);
        }
#pragma unroll
        for (int i = 0; i < SPAN; i++) {
            Step step = step_of(raw[i] + bias);
            span.at[i].step[lane] = step.softplus;
            span.at[i].drive[lane] = step.softplus * x[i];
            if (GRADIENTS) {
                span.at[i].sigmoid[lane] = step.sigmoid;
                span.at[i].x[lane] = x[i];
                span.at[i].dy[lane] = of_y[i];
            }
#pragma unroll
            for (int part = 0; part < OF_STATES; part++)
                if (2 * STATES >= LANES || lane < 2 * STATES) span.at[i].BC[part * LANES + lane] = of_states[part][i];
        }
        __syncwarp();
    }
};

typedef float Tile[TILE][SIDE];

// One token of the recurrence; `decay` may be null.
__device__ __forceinline__ void advance(
    Tile h, const Tile rate, const Span &span, int i, int g, int j, float (*decay)[SIDE]
) {
    Four step = four(&span.at[i].step[4 * g]), drive = four(&span.at[i].drive[4 * g]);
#pragma unroll
    for (int s = 0; s < TILE; s++) {
        float b = span.at[i].BC[TILE * j + s];
#pragma unroll
        for (int c = 0; c < SIDE; c++) {
            float d = exp2_(step.at[c] * rate[s][c]);
            h[s][c] = d * h[s][c] + drive.at[c] * b;
            if (decay) decay[s][c] = d;
        }
    }
}

extern "C" __global__ void __launch_bounds__(LANES, RESIDENT) scan_backward(
    const Element *u, const Element *dt, const float *A, const Element *B, const Element *C, const float *D,
    const float *dt_bias, const int *order, const float *saved, const Element *grad_y, Element *grad_u,
    Element *grad_dt, float *grad_A, float *grad_B, float *grad_C, float *grad_D, float *grad_bias, int directions,
    int length, int channels, int u_token, int dt_token, int y_token, int B_direction, int B_image, int B_token,
    int C_direction, int C_image, int C_token
) {
    __shared__ Span span;
    const int lane = threadIdx.x, g = lane / SIDE, j = lane % SIDE;
    const int blocks = (channels + LANES - 1) / LANES, images = gridDim.x / (directions * blocks);
    const int block = blockIdx.x % blocks, k = blockIdx.x / blocks % directions;
    const int image = blockIdx.x / (blocks * directions);
    const int first_channel = block * LANES, chunks = (length + CHUNK - 1) / CHUNK;
    const long long row = (long long)k * images + image;

    const bool inside = !MASKED || first_channel + lane < channels;
    const int own = inside ? first_channel + lane : 0;  // this lane's channel
    Columns columns;
    columns.u = {u + row * length * channels + own, u_token * (int)sizeof(Element)};
    columns.dt = {dt + row * length * channels + own, dt_token * (int)sizeof(Element)};
    columns.dy = {grad_y + (long long)image * length * channels + own, y_token * (int)sizeof(Element)};
    for (int part = 0; part < Columns::OF_STATES; part++) {
        const int column = part * LANES + lane;
        const Element *of_B = B + (long long)k * B_direction + (long long)image * B_image + column % STATES;
        const Element *of_C = C + (long long)k * C_direction + (long long)image * C_image + column % STATES;
        columns.BC[part] = {column / STATES % 2 ? of_C : of_B,
                            (column / STATES % 2 ? C_token : B_token) * (int)sizeof(Element)};
    }
    columns.order = order + k * length;
    columns.length = length;
    columns.inside = inside;
    columns.bias = inside ? dt_bias[k * channels + own] : 0.0f;
    const float skip = inside ? D[k * channels + own] : 0.0f;
    const Column<Element> to_u = {grad_u + row * length * channels + own, u_token * (int)sizeof(Element)};
    const Column<Element> to_dt = {grad_dt + row * length * channels + own, dt_token * (int)sizeof(Element)};
    float *sum_of = lane & 16 ? grad_C : grad_B;
    sum_of += ((long long)block * directions * images + row) * length * STATES;
    sum_of += TILE * j + (lane & 8 ? TILE / 2 : 0) + (lane & 4 ? TILE / 4 : 0);
    const Column<float> to_states = {sum_of, STATES * (int)sizeof(float)};

    // Tiles of (N, D) arrays: one access for the 4 channels of a state.
    auto read_tile = [&](const float *array, Tile tile) {
#pragma unroll
        for (int s = 0; s < TILE; s++) {
            const float *from = array + (TILE * j + s) * channels + first_channel + 4 * g;
            if (MASKED) {
#pragma unroll
                for (int c = 0; c < SIDE; c++) tile[s][c] = first_channel + 4 * g + c < channels ? from[c] : 0.0f;
            } else {
                Four values = four(from);
#pragma unroll
                for (int c = 0; c < SIDE; c++) tile[s][c] = values.at[c];
            }
        }
    };

    Tile rate, carried = {}, sum_A = {};  // carried: the part of h's gradient from later tokens
    float sum_D = 0, sum_bias = 0;
    read_tile(A + (long long)k * STATES * channels, rate);
#pragma unroll
    for (int s = 0; s < TILE; s++)
#pragma unroll
        for (int c = 0; c < SIDE; c++) rate[s][c] *= LOG2_E;

    saved += row * chunks * (STATES * channels);
    for (int chunk = chunks - 1; chunk >= 0; chunk--) {
        const int last_span = (min(length - chunk * CHUNK, CHUNK) - 1) / SPAN;
        for (int part = last_span; part >= 0; part--) {
            const int start = chunk * CHUNK + part * SPAN;
            Tile h;
            read_tile(saved + (long long)chunk * (STATES * channels), h);
            for (int earlier = 0; earlier < part; earlier++) {
                columns.read<false>(span, chunk * CHUNK + earlier * SPAN, lane);
#pragma unroll 2
                for (int i = 0; i < SPAN; i++) advance(h, rate, span, i, g, j, nullptr);
                __syncwarp();  // all lanes have used these values
            }
            columns.read<true>(span, start, lane);
            const int groups = (min(length - start, SPAN) + GROUP - 1) / GROUP;
            for (int group = 0; group < groups; group++) {
#pragma unroll
                for (int s = 0; s < TILE; s++)
                    span.h[group][s][lane] = {h[s][0], h[s][1], h[s][2], h[s][3]};
                if (group < groups - 1)
#pragma unroll
                    for (int i = 0; i < GROUP; i++) advance(h, rate, span, group * GROUP + i, g, j, nullptr);
            }
            for (int group = groups - 1; group >= 0; group--) {
                Tile before[GROUP], decay[GROUP];
                float dC[GROUP][TILE];
#pragma unroll
                for (int s = 0; s < TILE; s++) {
                    Four values = span.h[group][s][lane];
#pragma unroll
                    for (int c = 0; c < SIDE; c++) h[s][c] = values.at[c];
                }
#pragma unroll
                for (int i = 0; i < GROUP; i++) {
#pragma unroll
                    for (int s = 0; s < TILE; s++)
#pragma unroll
                        for (int c = 0; c < SIDE; c++) before[i][s][c] = h[s][c];
                    advance(h, rate, span, group * GROUP + i, g, j, decay[i]);
                    Four dy = four(&span.at[group * GROUP + i].dy[4 * g]);
#pragma unroll
                    for (int s = 0; s < TILE; s++) {
                        dC[i][s] = 0;
#pragma unroll
                        for (int c = 0; c < SIDE; c++) dC[i][s] += h[s][c] * dy.at[c];
                    }
                }
#pragma unroll
                for (int i = GROUP - 1; i >= 0; i--) {
                    const int t = group * GROUP + i;
                    Four step = four(&span.at[t].step[4 * g]), drive = four(&span.at[t].drive[4 * g]);
                    Four dy = four(&span.at[t].dy[4 * g]);
                    float of_states[2 * TILE];    // gradients of B, then of C
                    float of_channels[2 * SIDE];  // of the drive, then of the step through the decay
#pragma unroll
                    for (int c = 0; c < 2 * SIDE; c++) of_channels[c] = 0;
#pragma unroll
                    for (int s = 0; s < TILE; s++) {
                        float b = span.at[t].BC[TILE * j + s], c_ = span.at[t].BC[STATES + TILE * j + s];
                        of_states[s] = 0;
                        of_states[TILE + s] = dC[i][s];
#pragma unroll
                        for (int c = 0; c < SIDE; c++) {
                            float grad_h = dy.at[c] * c_ + carried[s][c];
                            of_states[s] += grad_h * drive.at[c];
                            of_channels[c] += grad_h * b;
                            carried[s][c] = decay[i][s][c] * grad_h;
                            float grad_exponent = carried[s][c] * before[i][s][c];
                            sum_A[s][c] += grad_exponent * step.at[c];
                            of_channels[SIDE + c] += grad_exponent * rate[s][c];
                        }
                    }
                    // Over the 4 lanes of a tile's channels; lane j keeps those of channel j, which is its own.
                    {
                        float pairs[2 * SIDE] = {of_channels[0], of_channels[4], of_channels[1], of_channels[5],
                                                 of_channels[2], of_channels[6], of_channels[3], of_channels[7]};
                        halve<4, 2>(pairs, lane);
                        halve<2, 1>(pairs, lane);
                        of_channels[0] = pairs[0], of_channels[1] = pairs[1];
                    }
                    // Over the 8 lanes of a tile's states; a lane keeps KEPT sums, and bit 16 names B or C.
                    halve<TILE, 16>(of_states, lane);
                    halve<TILE / 2, 8>(of_states, lane);
                    if (TILE > 2) halve<TILE / 4, 4>(of_states, lane);
                    else of_states[0] += __shfl_xor_sync(0xffffffffu, of_states[0], 4);

                    const int token = span.token[t];
                    const float own_x = span.at[t].x[lane], own_dy = span.at[t].dy[lane];
                    const float grad_step = of_channels[1] * LN_2 + of_channels[0] * own_x;
                    const float grad_raw = grad_step * span.at[t].sigmoid[lane];
                    sum_bias += grad_raw;
                    sum_D += own_dy * own_x;
                    if (start + t < length) {
                        if (inside) {
                            store(to_u[token], of_channels[0] * span.at[t].step[lane] + skip * own_dy);
                            store(to_dt[token], grad_raw);
                        }
#pragma unroll
                        for (int s = 0; s < KEPT; s++) store(to_states[token] + s, of_states[s]);
                    }
                }
            }
            __syncwarp();  // before the next span's values
        }
    }

#pragma unroll
    for (int s = 0; s < TILE; s++) {
        float *to = grad_A + (row * STATES + TILE * j + s) * channels + first_channel + 4 * g;
#pragma unroll
        for (int c = 0; c < SIDE; c++)
            if (!MASKED || first_channel + 4 * g + c < channels) to[c] = sum_A[s][c];
    }
    if (inside) {
        grad_D[row * channels + own] = sum_D;
        grad_bias[row * channels + own] = sum_bias;
    }
}
