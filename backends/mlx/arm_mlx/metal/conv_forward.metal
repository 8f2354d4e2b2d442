// u_k = silu(conv_k(x)) along every direction's order: a thread has one channel and RUN steps, the TAPS
// latest values of x in registers, so that each is read once. Grid: x channel, y direction and run, z image.
//
// x (B, L, D) T.  weight (K, D, W).  bias (K, D).  order (K, L) int.  Writes u (K, B, L, D) T, by token.
constexpr int RUNS = (LENGTH + RUN - 1) / RUN;
const int d = int(thread_position_in_grid.x), image = int(thread_position_in_grid.z);
const int direction = int(thread_position_in_grid.y) / RUNS;
const int start = int(thread_position_in_grid.y) % RUNS * RUN;
const int path = direction * LENGTH, kd = direction * CHANNELS + d;
const int from = image * LENGTH, to = (direction * int(threads_per_grid.z) + image) * LENGTH;
float w[TAPS], window[TAPS];  // window[TAPS - 1] is the step itself
ARM_UNROLL for (int j = 0; j < TAPS; j++) w[j] = weight[kd * TAPS + j];
const float shift = bias[kd];
ARM_UNROLL for (int j = 1; j < TAPS; j++) {
  const int t = start - TAPS + j;
  window[j] = t >= 0 ? float(x[(from + order[path + t]) * CHANNELS + d]) : 0.0f;
}
for (int t = start; t < metal::min(start + RUN, LENGTH); t++) {
  const int token = order[path + t];
  ARM_UNROLL for (int j = 1; j < TAPS; j++) window[j - 1] = window[j];
  window[TAPS - 1] = float(x[(from + token) * CHANNELS + d]);
  float sum = shift;
  ARM_UNROLL for (int j = 0; j < TAPS; j++) sum = metal::fma(w[j], window[j], sum);
  u[(to + token) * CHANNELS + d] = T(sum * arm_sigmoid(sum));
}
