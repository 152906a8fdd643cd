// SPDX-License-Identifier: Apache-2.0
// Runs the threads of a block as fibers of one host thread: the execution model of CUDA as far as
// its kernels here use it.
//
// A fiber runs until it waits (at __syncthreads or in a warp function) or returns; then the next
// one that may run gets its turn.  Waiting for something that cannot come any more (a barrier in a
// branch that not all threads take, a shuffle that names a lane which has returned) is an error
// that names the place.  Under ThreadSanitizer every fiber is a thread to it, and only barriers
// order them, so that a race is reported although one processor runs them all.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace pfk_host {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// Runs body(data) as every thread of every block.  Throws std::runtime_error for misuse.
void run(const char* kernel, Index grid, Index block, void (*body)(void*), void* data);

// What kernels call.
void sync_threads(const char* file, int line);
// Every lane of mask brings `size` bytes; all of them then see what each brought.
const void* exchange(uint32_t mask, const void* value, size_t size, int source, const char* file,
                     int line);
// The lanes of mask whose predicate holds.
uint32_t ballot(uint32_t mask, bool holds, const char* file, int line);
// A barrier of the lanes of mask, which orders memory, as exchange does not.
void sync_warp(uint32_t mask, const char* file, int line);
int lane();

// Shared memory that a block may ask for: as little as a kernel may find, so that it takes its way
// around, unless a test says otherwise.
extern int shared_limit;

// Whether streams say that a graph captures them.
extern bool capturing;

// What differs between builds of the same objects: whether static shared memory is full of NaN before
// a launch, so that reading what nobody wrote shows, and whether accesses to new memory are counted.
void poison_shared();
void watch(const void* data, size_t bytes);

extern Index thread_index, block_index, block_size, grid_size;

}  // namespace pfk_host
