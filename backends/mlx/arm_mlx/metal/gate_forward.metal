// out = silu(z) mean_k y_k, and with ARM_SAVE the mean, which the gradient of z needs. A thread has one
// element. Grid: x channel, y token, z image.
//
// y (K, B, L, D) T.  z (B, L, D) T, with strides.  Writes out, mean (B, L, D) T.
const uint3 at = thread_position_in_grid, sizes = threads_per_grid;
const uint i = (at.z * sizes.y + at.y) * sizes.x + at.x, size = sizes.x * sizes.y * sizes.z;
float sum = 0.0f;
ARM_UNROLL for (int k = 0; k < DIRECTIONS; k++) sum += float(y[uint(k) * size + i]);
const device T* image_z = z + at.z * z_strides[0];
const float gate = float(image_z[int(at.y) * int(z_strides[1]) + int(at.x) * int(z_strides[2])]);
const float average = sum * (1.0f / float(DIRECTIONS));
out[i] = T(gate * arm_sigmoid(gate) * average);
#ifdef ARM_SAVE
mean[i] = T(average);
#endif
