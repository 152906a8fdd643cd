// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps for its next call.  Fresh memory costs a page fault for each 4 KiB,
// which takes as long as the arithmetic of a small network on as many numbers.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace pfk {

// Uninitialized and aligned to a cache line, for as long as the object lives.  One at a time is the
// thread's own; a second one, or one that is too large to be kept, is allocated.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    Kept& kept = of_thread();
    own_ = kept.in_use || bytes > kMost;
    if (own_) {
      memory_ = allocate(bytes);
      return;
    }
    if (kept.bytes < bytes) {
      free(kept.memory);
      kept.memory = allocate(bytes);
      kept.bytes = bytes;
    }
    kept.in_use = true;
    memory_ = kept.memory;
  }
  ~Workspace() {
    if (own_) {
      free(memory_);
    } else {
      of_thread().in_use = false;
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* memory() const { return memory_; }

 private:
  static constexpr int64_t kMost = int64_t{16} << 20;  // bytes that a thread keeps
  struct Kept {
    void* memory = nullptr;
    int64_t bytes = 0;
    bool in_use = false;
    ~Kept() { free(memory); }
  };
  static Kept& of_thread() {
    thread_local Kept kept;
    return kept;
  }
  static void* allocate(int64_t bytes) {
    return aligned_alloc(64, static_cast<size_t>((bytes + 64) / 64 * 64));
  }

  void* memory_;
  bool own_;
};

}  // namespace pfk
