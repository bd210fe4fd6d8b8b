// A multiprocessor on the host: the threads of a block as fibers, and shared memory that knows who wrote what.
//
// Threads run one at a time until they meet at a barrier or at an instruction of the whole warp, so a run is
// repeatable. Each byte of shared memory remembers its last writer and readers and the barrier they ran after. An
// access that no barrier orders with an earlier one by another thread ends the program with a report, whatever the
// values were; so does a read of bytes never written, or still being copied.
//
// The blocks of a cluster run together, and may write into each other's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dgemma::emulation {

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Runs `kernel` once per thread of every block; `threads` is a multiple of 32. Dynamic shared memory starts as NaN.
// `cluster` blocks along x run together.
void run(const Grid& grid, int threads, uint32_t shared_bytes, void (*call)(const void*), const void* kernel, int cluster);

template <class Kernel>
void run(const Grid& grid, int threads, uint32_t shared_bytes, const Kernel& kernel, int cluster = 1) {
  run(grid, threads, shared_bytes, [](const void* it) { (*static_cast<const Kernel*>(it))(); }, &kernel, cluster);
}

// Prints one line and ends the program with status 3.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of the thread that runs.
int thread_index();
int block_size();
const Grid& block_index();

void barrier();
int barrier_count(bool predicate);
void warp_barrier();

// Waits for the 32 lanes, then calls `together` once with the argument of each lane.
void warp_instruction(const char* name, void* argument, void (*together)(void* const (&lanes)[32]));

// The barrier of the cluster, in two halves.
void arrive_cluster();
void wait_cluster();

// Memory of a block of the cluster that waits for nothing of this thread's but the cluster's barrier.
unsigned char* write_in_cluster(int block, uint32_t offset, uint32_t bytes);

// Memory of the block. Both check the access by `thread`, which is of the current block.
const unsigned char* read_shared(uint32_t offset, uint32_t bytes, int thread);
unsigned char* write_shared(uint32_t offset, uint32_t bytes, int thread);

// As read_shared, by the tensor cores, which see what a thread wrote after that thread's fence only.
const unsigned char* read_shared_by_tensor_cores(uint32_t offset, uint32_t bytes, int thread);
void fence_for_tensor_cores();

// Of all threads that run together.
int thread_of_cluster();
int block_of_cluster();

// The asynchronous copies of the thread that runs: 16 bytes each, landed when waited for.
void start_copy(uint32_t offset, const void* source, bool valid);
void commit_copies();
void wait_copies(std::size_t pending);

}  // namespace dgemma::emulation
