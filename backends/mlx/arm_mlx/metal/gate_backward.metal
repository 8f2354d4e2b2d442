// Gradients of the gate: of z, and of y, the same for every direction. One thread per element.
//
// grad, z, mean (B, L, D) T.  Writes dz (B, L, D) T and grad_y (B, L, D) float: every gradient of the scan
// comes from it, and rounding it would show in all of them.
const uint i = thread_position_in_grid.x;
const float gate = float(z[i]), sigmoid = arm_sigmoid(gate), g = float(grad[i]);
dz[i] = T(g * float(mean[i]) * sigmoid * metal::fma(gate, 1.0f - sigmoid, 1.0f));
grad_y[i] = g * gate * sigmoid * (1.0f / float(DIRECTIONS));
