// out = silu(z) mean_k y_k, and with ARM_SAVE the mean, which the gradient of z needs. One thread per element.
//
// y (K, B, L, D) T.  z (B, L, D) T.  Writes out, mean (B, L, D) T.
const uint i = thread_position_in_grid.x, size = threads_per_grid.x;
float sum = 0.0f;
ARM_UNROLL for (int k = 0; k < DIRECTIONS; k++) sum += float(y[uint(k) * size + i]);
const float average = sum * (1.0f / float(DIRECTIONS)), gate = float(z[i]);
out[i] = T(gate * arm_sigmoid(gate) * average);
#ifdef ARM_SAVE
mean[i] = T(average);
#endif
