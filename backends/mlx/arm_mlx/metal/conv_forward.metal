// u_k = silu(conv_k(x)) along every direction's order: a thread has one channel and RUN steps, the TAPS
// latest values of x in registers, so that each is read once. Grid: x channel, y direction and run, z image.
//
// x (B, L, D) T, with strides.  weight (K, D, W).  bias (K, D).  order (K, L) int.  Writes u (K, B, L, D) T, by token.
static_assert(RUN % TAPS == 0, "");
constexpr int RUNS = (LENGTH + RUN - 1) / RUN;
const int d = int(thread_position_in_grid.x), image = int(thread_position_in_grid.z);
const int direction = int(thread_position_in_grid.y) / RUNS;
const int start = int(thread_position_in_grid.y) % RUNS * RUN;
const int path = direction * LENGTH, kd = direction * CHANNELS + d;
const device T* own_x = x + image * x_strides[0] + d * x_strides[2];
const int stride = int(x_strides[1]), to = (direction * int(threads_per_grid.z) + image) * LENGTH;
// A ring, turned by unrolling: step start + i stands in window[i % TAPS]. Shifting would cost moves, and
// compilers make a memmove of it, which takes the array out of the registers.
float w[TAPS], window[TAPS];
ARM_UNROLL for (int j = 0; j < TAPS; j++) w[j] = weight[kd * TAPS + j];
const float shift = bias[kd];
ARM_UNROLL for (int j = 1; j < TAPS; j++) {
  const int t = start - TAPS + j;
  window[j] = t >= 0 ? float(own_x[order[path + t] * stride]) : 0.0f;
}
for (int first = start; first < metal::min(start + RUN, LENGTH); first += TAPS) {
  ARM_UNROLL for (int i = 0; i < TAPS; i++) {
    if (first + i < LENGTH) {
      const int token = order[path + first + i];
      window[i] = float(own_x[token * stride]);
      float sum = shift;
      ARM_UNROLL for (int j = 0; j < TAPS; j++) sum = metal::fma(w[j], window[(i + 1 + j) % TAPS], sum);
      u[(to + token) * CHANNELS + d] = T(sum * arm_sigmoid(sum));
    }
  }
}
