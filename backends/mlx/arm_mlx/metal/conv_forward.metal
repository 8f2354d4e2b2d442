// u_k = silu(conv_k(x)) along every direction's order: a thread has one channel and RUN steps. It keeps the
// CONV_WIDTH latest values of x in registers, so that each is read once.
// Grid: x channel, y direction and run, z image.
//
// x (B, L, D) T, with strides.  weight (K, D, W).  bias (K, D).  order (K, L) int.
// Writes u (K, B, L, D) T, by token.
static_assert(RUN % CONV_WIDTH == 0, "");
constexpr int RUNS = (LENGTH + RUN - 1) / RUN;
const int d = int(thread_position_in_grid.x), image = int(thread_position_in_grid.z);
const int direction = int(thread_position_in_grid.y) / RUNS;
const int start = int(thread_position_in_grid.y) % RUNS * RUN;
const int path = direction * LENGTH, kd = direction * CHANNELS + d;
const device T* own_x = x + image * x_strides[0] + d * x_strides[2];
const int stride = int(x_strides[1]), to = (direction * int(threads_per_grid.z) + image) * LENGTH;
// A ring buffer, indexed by unrolling: step start + i is in window[i % CONV_WIDTH]. Shifting would cost
// moves, and compilers turn it into a memmove, which takes the array out of the registers.
float w[CONV_WIDTH], window[CONV_WIDTH];
ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++) w[j] = weight[kd * CONV_WIDTH + j];
const float shift = bias[kd];
ARM_UNROLL for (int j = 1; j < CONV_WIDTH; j++) {
  const int t = start - CONV_WIDTH + j;
  window[j] = t >= 0 ? float(own_x[order[path + t] * stride]) : 0.0f;
}
for (int first = start; first < metal::min(start + RUN, LENGTH); first += CONV_WIDTH) {
  ARM_UNROLL for (int i = 0; i < CONV_WIDTH; i++) {
    if (first + i < LENGTH) {
      const int token = order[path + first + i];
      window[i] = float(own_x[token * stride]);
      float sum = shift;
      ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++)
        sum = metal::fma(w[j], window[(i + 1 + j) % CONV_WIDTH], sum);
      u[(to + token) * CHANNELS + d] = T(sum * arm_sigmoid(sum));
    }
  }
}
