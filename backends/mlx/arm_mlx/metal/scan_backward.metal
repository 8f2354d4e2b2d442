// All gradients of the scan except that of z, from the gradient of y and the saved states. It goes backward
// through the chunks and recomputes each one from the state before it.
//
// grad_y (B, L, D) float is shared by the directions; states and the inputs as in the forward kernel.
// Writes du, ddt (K, B, L, D) T and, in float and to be summed, dA (K, B, D, N), dD, ddt_bias (K, B, D) and
// dBC (K, B, threadgroups of channels, L, 2 N): dB, then dC, by token.
constexpr int TURNS = CHUNK / LANES, VALUES = 2 * OWN_STATES;
constexpr int HELD = VALUES > SIMD_CHANNELS ? VALUES / SIMD_CHANNELS : 1;
constexpr int SHARED = SIMD_CHANNELS > VALUES ? SIMD_CHANNELS / VALUES : 1;
threadgroup float sums[SIMDGROUPS][CHUNK][2 * STATES];
float g[OWN_STATES], grad_A[OWN_STATES];  // g: the part of h's gradient from later tokens
ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) { g[i] = 0.0f; grad_A[i] = 0.0f; }
float grad_D = 0.0f, grad_bias = 0.0f;

for (int chunk = CHUNKS - 1; chunk >= 0; chunk--) {
  const int start = chunk * CHUNK;
  float own_u[TURNS], own_step[TURNS], own_slope[TURNS], own_grad[TURNS];
  int own_token[TURNS];
  // h[j]: the state before the chunk's token j, and after token j - 1.
  float h[CHUNK + 1][OWN_STATES], decays[KEEP_DECAYS ? CHUNK : 1][OWN_STATES];
  float chunk_A[OWN_STATES];  // summed per chunk first: one sum over a long sequence would lose digits
  ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) chunk_A[i] = 0.0f;
  const int kept = ((sequence * (CHUNKS - 1) + chunk - 1) * CHANNELS + d) * STATES + first;
  ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) h[0][i] = chunk > 0 ? states[kept + i] : 0.0f;

  // Forward again, keeping the state of every token.
  ARM_UNROLL for (int q = 0; q < TURNS; q++) {
    const int t = start + q * LANES + part;
    own_token[q] = order[path + metal::min(t, LENGTH - 1)];
    const int at = (tokens + own_token[q]) * CHANNELS + d;
    const float raw = float(dt[at]) + bias;
    own_u[q] = float(u[at]);
    own_step[q] = arm_softplus(raw);
    own_slope[q] = arm_sigmoid(raw);
    // Zero without a token or a channel: then g and all sums are zero too.
    own_grad[q] = t < LENGTH && live ? grad_y[(image * LENGTH + own_token[q]) * CHANNELS + d] : 0.0f;
    ARM_UNROLL for (int j = 0; j < LANES; j++) {
      const float step = arm_from_lane<LANES>(own_step[q], lane, j);
      const float drive = step * arm_from_lane<LANES>(own_u[q], lane, j);
      const int row = (tokens + arm_from_lane<LANES>(own_token[q], lane, j)) * STATES + first;
      ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) {
        const int now = q * LANES + j;
        const float decay = metal::exp2(step * A2[i]);
        if (KEEP_DECAYS) decays[now][i] = decay;
        h[now + 1][i] = metal::fma(decay, h[now][i], drive * float(B[row + i]));
      }
    }
  }

  ARM_UNROLL for (int q = TURNS - 1; q >= 0; q--) {
    float to_drive[LANES], to_exponent[LANES];
    ARM_UNROLL for (int j = LANES - 1; j >= 0; j--) {
      const float step = arm_from_lane<LANES>(own_step[q], lane, j);
      const float drive = step * arm_from_lane<LANES>(own_u[q], lane, j);
      const float grad = arm_from_lane<LANES>(own_grad[q], lane, j);
      const int row = (tokens + arm_from_lane<LANES>(own_token[q], lane, j)) * STATES + first;
      float grad_BC[VALUES], drive_sum = 0.0f, exponent_sum = 0.0f;
      ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) {
        const int now = q * LANES + j;
        const float decay = KEEP_DECAYS ? decays[now][i] : metal::exp2(step * A2[i]);
        const float grad_h = metal::fma(grad, float(C[row + i]), g[i]);
        grad_BC[i] = grad_h * drive;
        grad_BC[OWN_STATES + i] = grad * h[now + 1][i];
        drive_sum = metal::fma(grad_h, float(B[row + i]), drive_sum);
        g[i] = grad_h * decay;
        const float grad_exponent = g[i] * h[now][i];
        chunk_A[i] = metal::fma(grad_exponent, step, chunk_A[i]);
        exponent_sum = metal::fma(grad_exponent, A2[i], exponent_sum);
      }
      to_drive[j] = drive_sum;
      to_exponent[j] = exponent_sum;
      ArmReduce<VALUES, SIMD_CHANNELS, LANES>::run(grad_BC, lane);
      if (column % SHARED == 0) {
        ARM_UNROLL for (int i = 0; i < HELD; i++) {
          const int value = column / SHARED * HELD + i;
          const int state = (value < OWN_STATES ? 0 : STATES) + first + value % OWN_STATES;
          sums[simd][q * LANES + j][state] = grad_BC[i];
        }
      }
    }
    ArmReduce<LANES, LANES, 1>::run(to_drive, lane);
    ArmReduce<LANES, LANES, 1>::run(to_exponent, lane);
    if (start + q * LANES + part < LENGTH && live) {
      const int at = (tokens + own_token[q]) * CHANNELS + d;
      const float grad_step = metal::fma(to_exponent[0], 0.693147180559945309f, to_drive[0] * own_u[q]);
      const float grad_raw = grad_step * own_slope[q];
      du[at] = T(metal::fma(to_drive[0], own_step[q], skip * own_grad[q]));
      ddt[at] = T(grad_raw);
      grad_D = metal::fma(own_grad[q], own_u[q], grad_D);
      grad_bias += grad_raw;
    }
  }

  ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) grad_A[i] += chunk_A[i];

  // The SIMD groups' sums over channels, added in their order.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int e = int(thread_index_in_threadgroup); e < CHUNK * 2 * STATES; e += 32 * SIMDGROUPS) {
    const int t = start + e / (2 * STATES), state = e % (2 * STATES);
    if (t < LENGTH) {
      float sum = 0.0f;
      ARM_UNROLL for (int w = 0; w < SIMDGROUPS; w++) sum += sums[w][e / (2 * STATES)][state];
      const int group = sequence * int(threadgroups_per_grid.x) + int(threadgroup_position_in_grid.x);
      dBC[(group * LENGTH + order[path + t]) * 2 * STATES + state] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

ARM_UNROLL for (int m = 1; m < LANES; m <<= 1) {
  grad_D += metal::simd_shuffle_xor(grad_D, ushort(m));
  grad_bias += metal::simd_shuffle_xor(grad_bias, ushort(m));
}
if (live) {
  const int at = sequence * CHANNELS + d;
  ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) dA[at * STATES + first + i] = grad_A[i];
  if (part == 0) { dD[at] = grad_D; ddt_bias[at] = grad_bias; }
}
