// Gradients of the gate: of z, and of y, the same for every direction. Threads as in the forward kernel.
//
// grad, mean (B, L, D) T.  z (B, L, D) T, with strides.  Writes dz (B, L, D) T and grad_y (B, L, D) float:
// every gradient of the scan depends on it, and its rounding errors would appear in all of them.
const uint3 at = thread_position_in_grid, sizes = threads_per_grid;
const uint i = (at.z * sizes.y + at.y) * sizes.x + at.x;
const device T* image_z = z + at.z * z_strides[0];
const float gate = float(image_z[int(at.y) * int(z_strides[1]) + int(at.x) * int(z_strides[2])]);
const float sigmoid = arm_sigmoid(gate), g = float(grad[i]);
dz[i] = T(g * float(mean[i]) * sigmoid * metal::fma(gate, 1.0f - sigmoid, 1.0f));
grad_y[i] = g * gate * sigmoid * (1.0f / float(DIRECTIONS));
