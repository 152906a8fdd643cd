// SPDX-License-Identifier: Apache-2.0
// Counts the memory accesses of kernels that were compiled with -fsanitize=thread, by standing in for its runtime: the
// compiler calls it before every load and store.  Only accesses to watched memory (the tensors) count.
//
// Requested bytes are counted by the width of the access.  Moved bytes are 32-byte sectors, each once
// a block for loads and once for stores: what would pass between L2 and an SM whose L1 keeps what its
// block reads.
#include <stdint.h>

#include <map>
#include <unordered_set>

#include "fibers.h"

namespace {

constexpr uintptr_t kSector = 32;
constexpr int kWidths = 5;  // 1, 2, 4, 8, 16 bytes

struct Region {
  int64_t address, bytes;
  int64_t requested[2][kWidths];  // [load, store]
  int64_t moved[2];
};
bool counting = false;  // not before this file's own statics exist
std::map<uintptr_t, Region> watched;
std::unordered_set<uintptr_t> sectors[2];
uint64_t block = ~uint64_t{0};

void access(const void* p, int width, bool store) {
  if (!counting) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  auto found = watched.upper_bound(address);
  if (found == watched.begin()) return;
  Region& r = (--found)->second;
  if (address >= found->first + static_cast<uintptr_t>(r.bytes)) return;
  const pfk_host::Index& b = pfk_host::block_index;
  const pfk_host::Index& g = pfk_host::grid_size;
  const uint64_t now = (uint64_t{b.z} * g.y + b.y) * g.x + b.x;
  if (now != block) {
    block = now;
    for (auto& s : sectors) s.clear();
  }
  r.requested[store][__builtin_ctz(static_cast<unsigned>(width))] += width;
  if (sectors[store].insert(address / kSector).second) r.moved[store] += kSector;
}

}  // namespace

namespace pfk_host {
void watch(const void* p, size_t bytes) {
  if (!counting || bytes == 0) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(p);
  watched[first] = {static_cast<int64_t>(first), static_cast<int64_t>(bytes), {}, {}};
}
}  // namespace pfk_host

#define PFK_EXPORT __attribute__((visibility("default")))
extern "C" {
PFK_EXPORT void pfk_watch(const void* p, int64_t bytes) {
  pfk_host::watch(p, static_cast<size_t>(bytes));
}
// Writes what was counted, 14 numbers a region, for `most` regions at most; returns how many there
// are, and starts anew.
PFK_EXPORT int64_t pfk_counted(Region* out, int64_t most) {
  int64_t n = 0;
  for (const auto& entry : watched) {
    if (n < most) out[n] = entry.second;
    ++n;
  }
  counting = true;
  watched.clear();
  for (auto& s : sectors) s.clear();
  return n;
}

#define PFK_ACCESS(n)                                                                        \
  void __tsan_read##n(void* p) { access(p, n, false); }                                      \
  void __tsan_write##n(void* p) { access(p, n, true); }                                      \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false); }                            \
  void __tsan_unaligned_write##n(void* p) { access(p, n, true); }
PFK_ACCESS(1)
PFK_ACCESS(2)
PFK_ACCESS(4)
PFK_ACCESS(8)
PFK_ACCESS(16)
void __tsan_read_range(void* p, unsigned long size) {
  for (unsigned long i = 0; i < size; i += 16) access(static_cast<char*>(p) + i, 16, false);
}
void __tsan_write_range(void* p, unsigned long size) {
  for (unsigned long i = 0; i < size; i += 16) access(static_cast<char*>(p) + i, 16, true);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
// std::shared_ptr, around the launches
int __tsan_atomic32_fetch_add(volatile int* p, int value, int order) {
  (void)order;
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
// atomicMin and atomicMax in shared memory
int __tsan_atomic32_load(const volatile int* p, int order) {
  (void)order;
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_compare_exchange_strong(volatile int* p, int* expected, int value, int order,
                                            int failed) {
  (void)order, (void)failed;
  return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
// the switch that fills fresh memory with NaN
char __tsan_atomic8_exchange(volatile char* p, char value, int order) {
  (void)order;
  return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
char __tsan_atomic8_load(const volatile char* p, int order) {
  (void)order;
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
void __tsan_atomic8_store(volatile char* p, char value, int order) {
  (void)order;
  __atomic_store_n(p, value, __ATOMIC_SEQ_CST);
}
}
