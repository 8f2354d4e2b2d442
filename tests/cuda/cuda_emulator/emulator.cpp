// Runs scan_backward.cu on a CPU: one warp at a time, its 32 lanes as coroutines.
//
// A lane runs until it needs the others (an exchange or a barrier). When all lanes wait, all must wait at the same
// kind of call; otherwise the warp has diverged, which hangs or corrupts on a GPU, and `run` returns 1.
#include <ucontext.h>

#include <vector>

#include "emulated.h"

Index threadIdx, blockIdx, gridDim;

namespace {
constexpr int WARP = 32, STACK = 1 << 18;
ucontext_t main_context, lanes[WARP];
std::vector<char> stacks(WARP *STACK);
int current, waiting[WARP];  // 0: finished, -1: at a barrier, otherwise the mask of an exchange
float sent[2][WARP];
int turn[WARP];

void wait(int kind) {
    waiting[current] = kind;
    swapcontext(&lanes[current], &main_context);
}
}  // namespace

void __syncwarp() { wait(-1); }

float __shfl_xor_sync(unsigned, float value, int mask) {
    int lane = current, buffer = turn[lane] ^= 1;
    sent[buffer][lane] = value;
    wait(mask);
    return sent[buffer][lane ^ mask];
}

#include SOURCE

namespace {
void (*body)();
void enter() {
    body();
    waiting[current] = 0;
    swapcontext(&lanes[current], &main_context);
}

int run_block() {
    for (int i = 0; i < WARP; i++) {
        getcontext(&lanes[i]);
        lanes[i].uc_stack.ss_sp = &stacks[i * STACK];
        lanes[i].uc_stack.ss_size = STACK;
        lanes[i].uc_link = &main_context;
        makecontext(&lanes[i], enter, 0);
        turn[i] = 0;
    }
    for (;;) {
        for (current = 0; current < WARP; current++) {
            threadIdx.x = current;
            swapcontext(&main_context, &lanes[current]);
        }
        for (int i = 1; i < WARP; i++)
            if (waiting[i] != waiting[0]) return 1;
        if (waiting[0] == 0) return 0;
    }
}

struct Arguments {
    const void *pointers[17];
    int sizes[12];
} arguments;

void call() {
    const void **p = arguments.pointers;
    int *s = arguments.sizes;
    auto in = [&](int i) { return (const Element *)p[i]; };
    auto single = [&](int i) { return (float *)p[i]; };
    scan_backward(in(0), in(1), single(2), in(3), in(4), single(5), single(6), (const int *)p[7], single(8), in(9),
                  (Element *)p[10], (Element *)p[11], single(12), single(13), single(14), single(15), single(16), s[0],
                  s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11]);
}
}  // namespace

extern "C" int run(int programs, const void **pointers, const int *sizes) {
    std::copy(pointers, pointers + 17, arguments.pointers);
    std::copy(sizes, sizes + 12, arguments.sizes);
    body = call;
    gridDim.x = programs;
    for (blockIdx.x = 0; blockIdx.x < programs; blockIdx.x++)
        if (run_block()) return 1;
    return 0;
}
