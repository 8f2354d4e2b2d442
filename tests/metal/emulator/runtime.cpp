// Runs one kernel launch: one threadgroup at a time, one fiber per thread.
//
// A fiber runs until a SIMD-group operation or a threadgroup barrier. A SIMD-group operation ends when all
// 32 lanes have reached the same one; a barrier, when all threads of the threadgroup have reached the same
// one. Anything else is divergence and ends the launch with a message. `schedule` is the order in which
// threadgroups, SIMD groups and lanes take turns: ascending, descending or shuffled. A kernel without races
// writes the same bits under each.
//
// Linked with a translated kernel, which defines `call_kernel`.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <metal_stdlib>
#include <numeric>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
  #define USE_UCONTEXT
  #include <ucontext.h>
#endif

namespace emulator {

constexpr size_t STACK = 64 * 1024;
constexpr int SIMD = 32, MAX_SIMDGROUPS = 32;
constexpr uint32_t POISON = 0x7fe7e7e7;  // a quiet NaN
enum State { READY, AT_SIMDGROUP, AT_THREADGROUP, DONE };
enum Schedule { ASCENDING, DESCENDING, SHUFFLED };

struct Fiber {
  State state;
  int line, simdgroup, lane;
  Position position;
#ifdef USE_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer;
#endif
};

static std::vector<Fiber> fibers;
static Fiber* current;
static char* stacks = nullptr;
static size_t stack_count = 0;
static int operations[MAX_SIMDGROUPS];  // of each SIMD group so far; two sets of slots alternate
static uint64_t slot_values[MAX_SIMDGROUPS][2][SIMD];
static long threadgroup_number = 0;     // over all launches
static size_t threadgroup_bytes;
static Schedule schedule;
static uint32_t random_state;

// Switching between fibers: six saved registers on x86-64, ucontext elsewhere.
#ifdef USE_UCONTEXT
static ucontext_t scheduler;
static void leave() { swapcontext(&current->context, &scheduler); }
static void enter(Fiber& fiber) {
  current = &fiber;
  swapcontext(&scheduler, &fiber.context);
}
#else
static void* scheduler;
extern "C" void emulator_swap(void** save, void* to);
asm(R"(.text
.globl emulator_swap
.hidden emulator_swap
.type emulator_swap,@function
emulator_swap:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
.size emulator_swap,.-emulator_swap
)");
static void leave() { emulator_swap(&current->stack_pointer, scheduler); }
static void enter(Fiber& fiber) {
  current = &fiber;
  emulator_swap(&scheduler, fiber.stack_pointer);
}
#endif

static void run_thread() {
  call_kernel(current->position);
  current->state = DONE;
  leave();
  std::abort();  // a finished fiber is never entered again
}

static void prepare(Fiber& fiber, size_t index) {
  fiber.state = READY;
#ifdef USE_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks + index * STACK;
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
#else
  void** top = reinterpret_cast<void**>(stacks + (index + 1) * STACK);
  *--top = nullptr;  // return address of run_thread, which never returns
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

static void stop_at(State state, int line) {
  current->state = state;
  current->line = line;
  leave();
}
void meet_simdgroup(int line) { stop_at(AT_SIMDGROUP, line); }
void meet_threadgroup(int line) { stop_at(AT_THREADGROUP, line); }
int lane() { return current->lane; }
uint64_t* slots() { return slot_values[current->simdgroup][operations[current->simdgroup] & 1]; }

// Threadgroup memory: whole pages that end where an inaccessible one begins.
void* Block::enter() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  if (memory == nullptr) {
    memory = static_cast<char*>(
        mmap(nullptr, whole + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory + page, whole, PROT_READ | PROT_WRITE);
  }
  if (entered != threadgroup_number) {
    entered = threadgroup_number;
    threadgroup_bytes += bytes;
    uint32_t* words = reinterpret_cast<uint32_t*>(memory + page);
    for (size_t i = 0; i < whole / 4; i++) words[i] = POISON;
  }
  return memory + page + whole - bytes;
}

static void arrange(std::vector<int>& turns) {
  if (schedule == SHUFFLED)
    for (size_t i = turns.size(); i > 1; i--) {
      random_state = random_state * 1664525u + 1013904223u;
      std::swap(turns[i - 1], turns[(random_state >> 8) % i]);
    }
}
static std::vector<int> turns_of(int count) {
  std::vector<int> turns(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (schedule == DESCENDING) std::reverse(turns.begin(), turns.end());
  arrange(turns);
  return turns;
}

static std::string divergence(const char* what, int line, const int* counts) {
  char text[256];
  std::snprintf(
      text, sizeof text,
      "%s at generated line %d that not all threads reach: %d at a SIMD-group operation, %d at a barrier, "
      "%d finished", what, line, counts[AT_SIMDGROUP], counts[AT_THREADGROUP], counts[DONE]);
  return text;
}

// Advance one SIMD group until all of its threads are at a barrier or done.
static std::string run_simdgroup(int first, int last, std::vector<int>& lanes) {
  for (;;) {
    arrange(lanes);
    for (int l : lanes)
      if (first + l < last && fibers[first + l].state == READY) enter(fibers[first + l]);
    int counts[4] = {0, 0, 0, 0}, line = -1;
    bool same = true;
    for (int i = first; i < last; i++) {
      counts[fibers[i].state]++;
      if (fibers[i].state != AT_SIMDGROUP) continue;
      same &= line < 0 || line == fibers[i].line;
      line = fibers[i].line;
    }
    if (counts[AT_SIMDGROUP] == 0) return "";
    if (counts[AT_SIMDGROUP] < SIMD || !same) return divergence("a SIMD-group operation", line, counts);
    operations[first / SIMD]++;
    for (int i = first; i < last; i++) fibers[i].state = READY;
  }
}

static std::string run_threadgroup(int threads) {
  std::vector<int> simdgroups = turns_of((threads + SIMD - 1) / SIMD), lanes = turns_of(SIMD);
  for (;;) {
    arrange(simdgroups);
    for (int s : simdgroups) {
      const std::string error = run_simdgroup(s * SIMD, std::min(threads, (s + 1) * SIMD), lanes);
      if (!error.empty()) return error;
    }
    int counts[4] = {0, 0, 0, 0}, line = -1;
    bool same = true;
    for (int i = 0; i < threads; i++) {
      counts[fibers[i].state]++;
      if (fibers[i].state != AT_THREADGROUP) continue;
      same &= line < 0 || line == fibers[i].line;
      line = fibers[i].line;
    }
    if (counts[DONE] == threads) return "";
    if (counts[AT_THREADGROUP] < threads || !same) return divergence("a barrier", line, counts);
    for (int i = 0; i < threads; i++) fibers[i].state = READY;
  }
}

// Metal's dispatchThreads: threadgroups at the edges of the grid are smaller.
static std::string run_grid(uint3 grid, uint3 group) {
  const uint3 groups = {(grid.x + group.x - 1) / group.x, (grid.y + group.y - 1) / group.y,
                        (grid.z + group.z - 1) / group.z};
  size_t most = 0;
  for (int number : turns_of(int(groups.x * groups.y * groups.z))) {
    const uint3 at = {number % groups.x, number / groups.x % groups.y, number / (groups.x * groups.y)};
    const uint3 base = {at.x * group.x, at.y * group.y, at.z * group.z};
    const uint3 size = {std::min(group.x, grid.x - base.x), std::min(group.y, grid.y - base.y),
                        std::min(group.z, grid.z - base.z)};
    const uint threads = size.x * size.y * size.z;
    for (uint i = 0; i < threads; i++) {
      const uint3 local = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      Fiber& fiber = fibers[i];
      fiber.simdgroup = int(i) / SIMD;
      fiber.lane = int(i) % SIMD;
      fiber.position = {{base.x + local.x, base.y + local.y, base.z + local.z}, local, at, groups, grid, size,
                        i % SIMD, i / SIMD, i, (threads + SIMD - 1) / SIMD};
      prepare(fiber, i);
    }
    threadgroup_number++;
    threadgroup_bytes = 0;
    std::memset(operations, 0, sizeof operations);
    const std::string error = run_threadgroup(int(threads));
    if (!error.empty()) {
      char where[80];
      std::snprintf(where, sizeof where, ", in threadgroup (%u, %u, %u)", at.x, at.y, at.z);
      return error + where;
    }
    most = std::max(most, threadgroup_bytes);
  }
  threadgroup_bytes = most;
  return "";
}

// A forbidden address ends the launch, not the process.
static sigjmp_buf back;
static void* fault_address;
static void on_fault(int, siginfo_t* info, void*) {
  fault_address = info->si_addr;
  siglongjmp(back, 1);
}
struct FaultHandler {
  stack_t old_stack;
  struct sigaction old_segv, old_bus;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  FaultHandler() {
    stack_t own = {};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv);
    sigaction(SIGBUS, &action, &old_bus);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_segv, nullptr);
    sigaction(SIGBUS, &old_bus, nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

struct Report {
  char message[512];  // empty if all went well
  void* address;      // of a forbidden access, or null
  long threadgroup_bytes;
};

}  // namespace emulator

extern "C" void emulator_launch(
    const uint* grid, const uint* group, int schedule, emulator::Report* report) {
  using namespace emulator;
  emulator::schedule = Schedule(schedule);
  random_state = 12345;
  const uint3 size = {std::min(group[0], grid[0]), std::min(group[1], grid[1]), std::min(group[2], grid[2])};
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (threads > stack_count) {
    if (stacks != nullptr) munmap(stacks, stack_count * STACK);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<char*>(mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, flags, -1, 0));
    stack_count = threads;
    fibers.resize(threads);
  }
  std::string error;
  report->address = nullptr;
  {
    FaultHandler handler;
    if (sigsetjmp(back, 1) == 0) {
      error = run_grid({grid[0], grid[1], grid[2]}, size);
    } else {
      report->address = fault_address;
      error = "out of bounds";
    }
  }
  report->threadgroup_bytes = long(threadgroup_bytes);
  std::snprintf(report->message, sizeof report->message, "%s", error.c_str());
}
