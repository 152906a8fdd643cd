// SPDX-License-Identifier: Apache-2.0
// The scheduler behind fibers.h.  Never instrumented itself: all fibers touch its state.
#include "fibers.h"

#include <string.h>
#include <sys/mman.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(PFK_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#elif defined(PFK_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif

// The stream of every tensor.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

#if defined(PFK_POISONS_SHARED)  // shared.ld puts all shared memory between the two
extern "C" __attribute__((visibility("hidden"))) unsigned char pfk_shared_begin[], pfk_shared_end[];
#endif

namespace pfk_host {

#if defined(PFK_POISONS_SHARED)
void poison_shared() {
  memset(pfk_shared_begin, 0xff, static_cast<size_t>(pfk_shared_end - pfk_shared_begin));
}
#else
void poison_shared() {}
#endif
#if !defined(PFK_COUNTING)
void watch(const void*, size_t) {}
#endif

Index thread_index, block_index, block_size, grid_size;
int shared_limit = 48 * 1024;
bool capturing = false;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

enum State { kReady, kAtBarrier, kInWarp, kDone };

// ---- contexts ----------------------------------------------------------------------------------
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
// Saves what a call must preserve, changes stacks, and returns there.
extern "C" void pfk_switch(Context* from, const Context* to);
asm(R"(
.text
.type pfk_switch, @function
pfk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pfk_switch, .-pfk_switch
)");
void prepare(Context& c, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // the return address of a call, for the alignment that it leaves
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.stack_pointer = top;
}
void switch_context(Context& from, Context& to) { pfk_switch(&from, &to); }
#else
struct Context {
  ucontext_t c;
};
void prepare(Context& c, char* stack, void (*entry)()) {
  getcontext(&c.c);
  c.c.uc_stack.ss_sp = stack;
  c.c.uc_stack.ss_size = kStack;
  makecontext(&c.c, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.c, &to.c); }
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;
  State state = kDone;
  Index index;
  const char* file = "";  // where it waits
  int line = 0;
  uint32_t mask = 0;
  alignas(16) char brought[16], received[16];
  void* sanitizer = nullptr;
};

struct Block {
  std::string kernel, error;
  void (*body)(void*) = nullptr;
  void* data = nullptr;
  std::vector<Fiber> fibers;  // grown once, reused by every launch
  unsigned threads = 0, current = 0;
  unsigned phase = 0;  // of barriers
  Context scheduler;
  void* scheduler_sanitizer = nullptr;
  char start, end, barrier[2], warp[kMostThreads / kWarp];  // what ThreadSanitizer knows the synchronization by
};
Block block;
std::mutex one_launch;
uint64_t only_last = 0;   // blocks of a launch; 0: all of them
bool fail_next = false;
int64_t launches = 0;

// ---- sanitizers --------------------------------------------------------------------------------
#if defined(PFK_THREAD_SANITIZER)
void publish(char* token) { __tsan_release(token); }
void observe(char* token) { __tsan_acquire(token); }
void enter(Fiber& f) {
  if (!f.sanitizer) f.sanitizer = __tsan_create_fiber(0);
  __tsan_switch_to_fiber(f.sanitizer, __tsan_switch_to_fiber_no_sync);
}
void leave(bool) {
  __tsan_switch_to_fiber(block.scheduler_sanitizer, __tsan_switch_to_fiber_no_sync);
}
void arrived_in_fiber() {}
void arrived_in_scheduler() {}
void begin_launch() { block.scheduler_sanitizer = __tsan_get_current_fiber(); }
#elif defined(PFK_ADDRESS_SANITIZER)
const void* scheduler_stack = nullptr;
size_t scheduler_size = 0;
void* scheduler_fake = nullptr;
void publish(char*) {}
void observe(char*) {}
void enter(Fiber& f) { __sanitizer_start_switch_fiber(&scheduler_fake, f.stack, kStack); }
void leave(bool last) {
  Fiber& f = block.fibers[block.current];
  __sanitizer_start_switch_fiber(last ? nullptr : &f.sanitizer, scheduler_stack, scheduler_size);
}
void arrived_in_fiber() {
  Fiber& f = block.fibers[block.current];
  __sanitizer_finish_switch_fiber(f.sanitizer, &scheduler_stack, &scheduler_size);
  f.sanitizer = nullptr;
}
void arrived_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr); }
void begin_launch() {}
#else
void publish(char*) {}
void observe(char*) {}
void enter(Fiber&) {}
void leave(bool) {}
void arrived_in_fiber() {}
void arrived_in_scheduler() {}
void begin_launch() {}
#endif

// A shuffle orders no memory, so it may not be seen as a race either: no memcpy, which
// ThreadSanitizer intercepts even in code that is not instrumented.
void copy_unseen(void* to, const void* from, size_t size) {
  volatile char* out = static_cast<char*>(to);
  for (size_t i = 0; i < size; ++i) out[i] = static_cast<const char*>(from)[i];
}

// ---- fibers ------------------------------------------------------------------------------------
void yield(bool last) {
  Fiber& f = block.fibers[block.current];
  leave(last);
  switch_context(f.context, block.scheduler);
  arrived_in_fiber();
}

void entry() {
  arrived_in_fiber();
  observe(&block.start);
  block.body(block.data);
  publish(&block.end);
  block.fibers[block.current].state = kDone;
  yield(true);
  __builtin_trap();
}

void resume(unsigned i) {
  Fiber& f = block.fibers[i];
  block.current = i;
  thread_index = f.index;
  enter(f);
  switch_context(block.scheduler, f.context);
  arrived_in_scheduler();
}

void wait(State state, const char* file, int line) {
  Fiber& f = block.fibers[block.current];
  f.state = state;
  f.file = file;
  f.line = line;
  yield(false);
}

std::string place(const Fiber& f) { return std::string(f.file) + ":" + std::to_string(f.line); }

// Whether all lanes that fiber i waits for wait at the same place.
bool warp_complete(unsigned i) {
  const Fiber& f = block.fibers[i];
  if (!(f.mask >> i % kWarp & 1)) {
    block.error = "a warp function at " + place(f) + " is called by a lane that its mask leaves out";
    return false;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(f.mask >> lane & 1)) continue;
    const unsigned other = i / kWarp * kWarp + lane;
    if (other >= block.threads || block.fibers[other].state == kDone) {
      block.error = "a warp function at " + place(f) + " names a lane that is not there";
      return false;
    }
    const Fiber& g = block.fibers[other];
    if (g.state != kInWarp || g.mask != f.mask || g.line != f.line) return false;
  }
  return true;
}

// Lets go on whoever may; false if nobody can.
bool release() {
  bool any = false;
  for (unsigned i = 0; i < block.threads; ++i) {
    if (block.fibers[i].state != kInWarp || !warp_complete(i)) continue;
    const uint32_t mask = block.fibers[i].mask;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (mask >> lane & 1) block.fibers[i / kWarp * kWarp + lane].state = kReady;
    }
    any = true;
  }
  if (any || !block.error.empty()) return any;
  const Fiber* first = nullptr;
  for (unsigned i = 0; i < block.threads; ++i) {
    const Fiber& f = block.fibers[i];
    if (f.state == kDone) continue;
    if (!first) first = &f;
    if (f.state != kAtBarrier || f.line != first->line || strcmp(f.file, first->file) != 0) {
      block.error = "threads wait at " + place(*first) + " and at " + place(f);
      return false;
    }
  }
  if (!first) return false;
  block.phase ^= 1;
  for (unsigned i = 0; i < block.threads; ++i) {
    if (block.fibers[i].state == kAtBarrier) block.fibers[i].state = kReady;
  }
  return true;
}

void run_block(Index size) {
  block.threads = size.x * size.y * size.z;
  while (block.fibers.size() < block.threads) {
    block.fibers.emplace_back();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
    block.fibers.back().stack = static_cast<char*>(stack);
  }
  for (unsigned i = 0; i < block.threads; ++i) {
    Fiber& f = block.fibers[i];
    f.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    f.state = kReady;
    prepare(f.context, f.stack, entry);
  }
  publish(&block.start);
  do {
    for (unsigned i = 0; i < block.threads; ++i) {
      if (block.fibers[i].state == kReady) resume(i);
    }
  } while (release());
  observe(&block.end);
}

}  // namespace

void run(const char* kernel, Index grid, Index size, void (*body)(void*), void* data) {
  const std::lock_guard<std::mutex> guard(one_launch);  // shared memory is static
  const uint64_t threads = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMostThreads || blocks == 0 || grid.x > INT32_MAX ||
      grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(std::string(kernel) + ": invalid launch configuration");
  }
  if (std::exchange(fail_next, false)) {
    throw std::runtime_error(std::string(kernel) + ": this launch was to fail");
  }
  const uint64_t first = only_last > 0 && blocks > only_last ? blocks - only_last : 0;
  ++launches;
  begin_launch();
  block.error.clear();
  block.body = body;
  block.data = data;
  grid_size = grid;
  block_size = size;
  for (uint64_t b = blocks; b-- > first;) {  // last first: no block may count on an earlier one
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(size);
    if (!block.error.empty()) throw std::runtime_error(std::string(kernel) + ": " + block.error);
  }
}

void sync_threads(const char* file, int line) {
  char* token = &block.barrier[block.phase];
  publish(token);
  wait(kAtBarrier, file, line);
  observe(token);
}

const void* exchange(uint32_t mask, const void* value, size_t size, int source, const char* file,
                     int line) {
  Fiber& f = block.fibers[block.current];
  const unsigned me = block.current;
  // waits twice: nobody may overwrite what others have yet to read
  copy_unseen(f.brought, value, size);
  f.mask = mask;
  wait(kInWarp, file, line);
  const void* seen = block.fibers[me / kWarp * kWarp + source].brought;
  copy_unseen(f.received, seen, size);
  wait(kInWarp, file, -line);
  return f.received;
}

uint32_t ballot(uint32_t mask, bool holds, const char* file, int line) {
  Fiber& f = block.fibers[block.current];
  const unsigned first = block.current / kWarp * kWarp;
  f.brought[0] = holds;
  f.mask = mask;
  wait(kInWarp, file, line);
  uint32_t lanes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1 && block.fibers[first + lane].brought[0]) lanes |= uint32_t{1} << lane;
  }
  wait(kInWarp, file, -line);
  return lanes;
}

void sync_warp(uint32_t mask, const char* file, int line) {
  char* token = &block.warp[block.current / kWarp];
  block.fibers[block.current].mask = mask;
  publish(token);
  wait(kInWarp, file, line);
  observe(token);
  wait(kInWarp, file, -line);  // nobody publishes what comes later before all have observed
}

int lane() { return static_cast<int>(block.current % kWarp); }

}  // namespace pfk_host

// For tests: of each launch run the last blocks alone, which is where an index overflows; refuse
// the next launch; give a block so much shared memory; say that a graph captures; tell the number of
// launches so far.
extern "C" __attribute__((visibility("default"))) void pfk_only_last_blocks(int64_t count) {
  pfk_host::only_last = static_cast<uint64_t>(count);
}
extern "C" __attribute__((visibility("default"))) void pfk_fail_next_launch() {
  pfk_host::fail_next = true;
}
extern "C" __attribute__((visibility("default"))) void pfk_limit_shared(int64_t bytes) {
  pfk_host::shared_limit = static_cast<int>(bytes);
}
extern "C" __attribute__((visibility("default"))) void pfk_capture(int64_t on) {
  pfk_host::capturing = on != 0;
}
extern "C" __attribute__((visibility("default"))) int64_t pfk_launches() {
  return pfk_host::launches;
}
