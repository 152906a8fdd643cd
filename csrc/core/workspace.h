// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps for its next call.  Fresh memory costs a page fault for each 4 KiB,
// which takes as long as the arithmetic of a small network on as many numbers.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <new>

#include "core/vec.h"

PFK_BEGIN

// Uninitialized and aligned to a cache line, for as long as the object lives.  A thread keeps the
// memory of three objects that live at the same time; more of them, or larger ones, are allocated.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    Kept& kept = of_thread();
    own_ = kept.depth == kDepth || bytes > kMost;
    if (own_) {
      memory_ = allocate(bytes);
      return;
    }
    Block& block = kept.block[kept.depth++];
    if (block.bytes < bytes) {
      free(block.memory);
      block = {};
      block.memory = allocate(bytes);
      block.bytes = bytes;
    }
    memory_ = block.memory;
  }
  ~Workspace() {
    if (own_) {
      free(memory_);
    } else {
      --of_thread().depth;
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* memory() const { return memory_; }

 private:
  static constexpr int64_t kMost = int64_t{128} << 20;  // bytes of a block that a thread keeps
  static constexpr int kDepth = 3;
  struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Block() { free(memory); }
  };
  struct Kept {
    Block block[kDepth];
    int depth = 0;
  };
  static Kept& of_thread() {
    thread_local Kept kept;
    return kept;
  }
  static void* allocate(int64_t bytes) {
    void* memory = aligned_alloc(64, static_cast<size_t>((bytes + 64) / 64 * 64));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }

  void* memory_;
  bool own_;
};

PFK_END
