// Gradients of the convolution from that of u; threads and ring as in the forward kernel. A run continues for
// CONV_WIDTH - 1 steps into the next one, since their outputs also depend on this run's x.
//
// Writes dx (K, B, L, D) T, by token, to be summed over the directions, and parts (K, B, runs, W + 1, D)
// float, the gradients of weight and bias, to be summed over images and runs.
static_assert(RUN % CONV_WIDTH == 0, "");
constexpr int RUNS = (LENGTH + RUN - 1) / RUN;
const int d = int(thread_position_in_grid.x), image = int(thread_position_in_grid.z);
const int direction = int(thread_position_in_grid.y) / RUNS, run = int(thread_position_in_grid.y) % RUNS;
const int start = run * RUN, stop = metal::min(start + RUN, LENGTH);
const int path = direction * LENGTH, kd = direction * CHANNELS + d;
const int sequence = direction * int(threads_per_grid.z) + image;
const device T* own_x = x + image * x_strides[0] + d * x_strides[2];
const int stride = int(x_strides[1]), to = sequence * LENGTH;
// pending: the gradient of x so far, at the steps whose x is in the window
float w[CONV_WIDTH], window[CONV_WIDTH], pending[CONV_WIDTH], grad_w[CONV_WIDTH];
ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++) {
  w[j] = weight[kd * CONV_WIDTH + j];
  pending[j] = 0.0f;
  grad_w[j] = 0.0f;
}
const float shift = bias[kd];
float grad_bias = 0.0f;
ARM_UNROLL for (int j = 1; j < CONV_WIDTH; j++) {
  const int t = start - CONV_WIDTH + j;
  window[j] = t >= 0 ? float(own_x[order[path + t] * stride]) : 0.0f;
}
for (int first = start; first < stop + CONV_WIDTH - 1; first += CONV_WIDTH) {
  ARM_UNROLL for (int i = 0; i < CONV_WIDTH; i++) {
    const int t = first + i, done = t - CONV_WIDTH + 1;
    pending[i] = 0.0f;
    if (t < LENGTH) {
      const int token = order[path + t];
      window[i] = float(own_x[token * stride]);
      float sum = shift;
      ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++)
        sum = metal::fma(w[j], window[(i + 1 + j) % CONV_WIDTH], sum);
      const float sigmoid = arm_sigmoid(sum);
      const float slope = sigmoid * metal::fma(sum, 1.0f - sigmoid, 1.0f);
      const float grad = float(du[(to + token) * CHANNELS + d]) * slope;
      ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++) {
        const int at = (i + 1 + j) % CONV_WIDTH;
        pending[at] = metal::fma(w[j], grad, pending[at]);
      }
      const float own = t < stop ? grad : 0.0f;  // the next run's thread sums its own steps
      ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++)
        grad_w[j] = metal::fma(own, window[(i + 1 + j) % CONV_WIDTH], grad_w[j]);
      grad_bias += own;
    }
    if (done >= start && done < stop) {
      dx[(to + order[path + done]) * CHANNELS + d] = T(pending[(i + 1) % CONV_WIDTH]);
    }
  }
}
const int row = (sequence * RUNS + run) * (CONV_WIDTH + 1);
ARM_UNROLL for (int j = 0; j < CONV_WIDTH; j++) parts[(row + j) * CHANNELS + d] = grad_w[j];
parts[(row + CONV_WIDTH) * CHANNELS + d] = grad_bias;
