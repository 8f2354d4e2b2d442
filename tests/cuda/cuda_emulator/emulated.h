// What scan_backward.cu takes from CUDA, for a C++ compiler on a CPU; see emulator.cpp.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Index { int x; };
extern Index threadIdx, blockIdx, gridDim;
float __shfl_xor_sync(unsigned lanes, float value, int mask);
void __syncwarp();
using std::min;

typedef _Float16 float16;
struct bfloat16 { uint16_t bits; };

inline float load(const float *from) { return *from; }
inline float load(const float16 *from) { return (float)*from; }
inline float load(const bfloat16 *from) {
    uint32_t bits = (uint32_t)from->bits << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline void store(float *to, float x) { *to = x; }
inline void store(float16 *to, float x) { *to = (float16)x; }
inline void store(bfloat16 *to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even; no result here is NaN
}

inline const void *offset(const void *base, int token, int bytes) {
    return (const char *)base + (long long)token * bytes;
}
inline float exp2_(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
