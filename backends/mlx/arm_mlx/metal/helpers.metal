// Functions that the kernels share; MLX puts them before each kernel.

#define ARM_UNROLL _Pragma("clang loop unroll(full)")

// Metal has no log1p; this form keeps small x exact and needs math that respects IEEE order.
inline float arm_log1p(float x) {
  const float y = 1.0f + x;
  return y == 1.0f ? x : x * (metal::log(y) / (y - 1.0f));
}

// softplus and its derivative, from one exponential that cannot overflow.
inline float arm_softplus(float x) {
  return metal::max(x, 0.0f) + arm_log1p(metal::exp(-metal::abs(x)));
}
inline float arm_sigmoid(float x) {
  const float e = metal::exp(-metal::abs(x));
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// The value held by lane j of this lane's group of LANES neighbours. Quad operations are native;
// simd_shuffle with an index that varies by lane costs about fourteen times as much.
template <int LANES, typename V>
inline V arm_from_lane(V value, uint lane, int j) {
  return LANES == 1 ? value : metal::quad_shuffle(value, ushort((lane & 3u & ~uint(LANES - 1)) + uint(j)));
}

// Sums of VALUES values in each lane over SPAN lanes that are STRIDE apart: a reduce-scatter, which halves
// the values with every exchange, then a butterfly for single values. Both counts are powers of two.
//
// Let r be the index of a lane among the SPAN. Afterwards v[0 .. VALUES / SPAN - 1] are the totals from value
// r * VALUES / SPAN on; if VALUES < SPAN, v[0] is the total of value r / (SPAN / VALUES).
template <int VALUES, int SPAN, int STRIDE>
struct ArmReduce {
  static void run(thread float* v, uint lane) {
    constexpr int HALF = VALUES / 2, MASK = SPAN / 2 * STRIDE;
    const bool upper = (lane & uint(MASK)) != 0;
    ARM_UNROLL for (int i = 0; i < HALF; i++) {
      const float low = v[i], high = v[i + HALF];  // loaded first: a selected address would leave registers
      const float keep = upper ? high : low, send = upper ? low : high;
      v[i] = keep + metal::simd_shuffle_xor(send, ushort(MASK));
    }
    ArmReduce<HALF, SPAN / 2, STRIDE>::run(v, lane);
  }
};
template <int SPAN, int STRIDE>
struct ArmReduce<1, SPAN, STRIDE> {
  static void run(thread float* v, uint lane) {
    v[0] += metal::simd_shuffle_xor(v[0], ushort(SPAN / 2 * STRIDE));
    ArmReduce<1, SPAN / 2, STRIDE>::run(v, lane);
  }
};
template <int VALUES, int STRIDE>
struct ArmReduce<VALUES, 1, STRIDE> {
  static void run(thread float*, uint) {}
};
template <int STRIDE>
struct ArmReduce<1, 1, STRIDE> {
  static void run(thread float*, uint) {}
};
