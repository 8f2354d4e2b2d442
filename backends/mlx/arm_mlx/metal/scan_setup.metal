// The division of work in the scan; MLX puts it before both of its kernels.
//
// LANES neighbouring lanes share a channel's STATES, so a SIMD group has 32 / LANES channels and a
// threadgroup SIMDGROUPS times as many. Grid: x channels, y direction, z image. Lanes beyond the last
// channel compute it again and write nothing: SIMD operations need all lanes.
static_assert(LANES <= 4 && STATES % LANES == 0 && CHUNK % LANES == 0, "");
constexpr int OWN_STATES = STATES / LANES, SIMD_CHANNELS = 32 / LANES;
constexpr int CHUNKS = (LENGTH + CHUNK - 1) / CHUNK;
const uint lane = thread_index_in_simdgroup;
const int simd = int(simdgroup_index_in_threadgroup);
const int direction = int(threadgroup_position_in_grid.y), image = int(threadgroup_position_in_grid.z);
const int part = int(lane) % LANES, column = int(lane) / LANES;
const int wanted = (int(threadgroup_position_in_grid.x) * SIMDGROUPS + simd) * SIMD_CHANNELS + column;
const bool live = wanted < CHANNELS;
const int d = live ? wanted : CHANNELS - 1;
const int sequence = direction * int(threadgroups_per_grid.z) + image;  // (K, B)
const int tokens = sequence * LENGTH;                                   // first row of (K, B, L, ...)
const int path = direction * LENGTH;                                    // first entry of order (K, L)
const int kd = direction * CHANNELS + d;                                // row of (K, D, ...)
const int first = part * OWN_STATES;
float A2[OWN_STATES];  // exp(step A) as exp2(step A2)
ARM_UNROLL for (int i = 0; i < OWN_STATES; i++) A2[i] = A[kd * STATES + first + i] * 1.44269504088896341f;
const float skip = D[kd], bias = dt_bias[kd];
