// y_k = <C, h> + D u for every direction, and with ARM_SAVE the state after every CHUNK tokens.
//
// u, dt (K, B, L, D) T.  A (K, D, N).  B, C (K, B, L, N) T.  D, dt_bias (K, D).  order (K, L) int.
// Writes y (K, B, L, D) T, by token, and states (K, B, chunks - 1, D, N) float.
float h[OWN_STATES];
ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) h[i] = 0.0f;
for (int t0 = 0; t0 < LENGTH; t0 += LANES) {
  // This lane loads one of the next LANES tokens: one softplus for each token and channel, not LANES.
  // Past the end it repeats the last token; these results are not used.
  const int t = t0 + part;
  const int own_row = tokens + order[path + metal::min(t, LENGTH - 1)];
  const float own_u = float(u[own_row * CHANNELS + d]);
  const float own_step = arm_softplus(float(dt[own_row * CHANNELS + d]) + bias);
  float y_part[LANES];
  ARM_UNROLL for (int j = 0; j < LANES; j++) {
    const float step = arm_from_lane<LANES>(own_step, lane, j);
    const float drive = step * arm_from_lane<LANES>(own_u, lane, j);
    const int row = arm_from_lane<LANES>(own_row, lane, j) * STATES + first;
    float sum = 0.0f;
    ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) {
      h[i] = metal::fma(metal::exp2(step * A2[i]), h[i], drive * float(B[row + i]));
      sum = metal::fma(h[i], float(C[row + i]), sum);
    }
    y_part[j] = sum;
  }
  ArmReduce<LANES, LANES, 1>::run(y_part, lane);
  if (t < LENGTH && live) y[own_row * CHANNELS + d] = T(metal::fma(skip, own_u, y_part[0]));
#ifdef ARM_SAVE
  const int after = t0 + LANES;
  if (after % CHUNK == 0 && after < LENGTH && live) {
    const int kept = ((sequence * (CHUNKS - 1) + after / CHUNK - 1) * CHANNELS + d) * STATES + first;
    ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) states[kept + i] = h[i];
  }
#endif
}
