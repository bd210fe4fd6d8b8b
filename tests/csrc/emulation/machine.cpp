#include "machine.h"

#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ASAN 1
#endif
#endif
#if defined(EMULATION_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace dgemma::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kNobody = -1, kSeveral = -2;

enum class State { kReady, kAtWarpInstruction, kAtBarrier, kAtCluster, kDone };

struct Copy {
  uint32_t offset;
  const void* source;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  int block = 0, thread = 0;            // of the cluster, of the block
  int64_t arrivals = 0, waits = 0;      // at the cluster's barrier
  int64_t fences = 0;                   // for the tensor cores
  State state = State::kReady;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  const char* instruction = nullptr;
  int arrived = 0;
  void* lanes[32];
  int64_t epoch = 0;  // barriers of the warp so far
};

// Epochs count barriers; an access of an earlier epoch is ordered before every one of this epoch. An access before the
// n-th arrival at the cluster's barrier is ordered before those of every thread that has waited n times.
struct Byte {
  int writer = kNobody, reader = kNobody, reader_warp = kNobody;
  int64_t write_epoch = -1, write_warp_epoch = -1, read_epoch = -1, read_warp_epoch = -1;
  int64_t write_arrivals = 0, read_arrivals = 0, write_fences = 0;
  bool from_another_block = false;
  int copying = kNobody;
};

struct Block {
  Grid index;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  std::vector<Byte> bytes;
  int at_barrier = 0, predicates = 0, counted = 0;
  int64_t epoch = 0;
};

struct Machine {
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;  // block after block of the cluster
  std::vector<Block> blocks;
  Fiber* current = nullptr;
  void (*call)(const void*) = nullptr;
  const void* kernel = nullptr;
  int threads = 0;  // of a block
  int arrived = 0;  // at the cluster's barrier
  int64_t passed = 0;
};

Machine machine;

Block& own() { return machine.blocks[machine.current->block]; }
Fiber& fiber_of(int block, int thread) { return *machine.fibers[block * machine.threads + thread]; }

void begin_switch(void** own_fake_stack, const void* stack, size_t bytes) {
#if defined(EMULATION_ASAN)
  __sanitizer_start_switch_fiber(own_fake_stack, stack, bytes);
#else
  (void)own_fake_stack, (void)stack, (void)bytes;
#endif
}

void end_switch(void* own_fake_stack, const void** from, size_t* bytes) {
#if defined(EMULATION_ASAN)
  __sanitizer_finish_switch_fiber(own_fake_stack, from, bytes);
#else
  (void)own_fake_stack, (void)from, (void)bytes;
#endif
}

void resume(Fiber& fiber) {
  machine.current = &fiber;
  begin_switch(&machine.scheduler_fake_stack, fiber.stack.get(), kStackBytes);
  swapcontext(&machine.scheduler, &fiber.context);
  end_switch(machine.scheduler_fake_stack, nullptr, nullptr);
}

void yield() {
  Fiber& fiber = *machine.current;
  begin_switch(&fiber.fake_stack, machine.scheduler_stack, machine.scheduler_stack_bytes);
  swapcontext(&fiber.context, &machine.scheduler);
  end_switch(fiber.fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
}

void fiber_main() {
  end_switch(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_bytes);
  machine.call(machine.kernel);
  Fiber& fiber = *machine.current;
  for (const auto& group : fiber.groups)
    if (!group.empty()) fail("thread %d ends while its copies are running", fiber.thread);
  if (fiber.arrivals != fiber.waits) fail("thread %d ends between the halves of the cluster's barrier", fiber.thread);
  fiber.state = State::kDone;
  begin_switch(nullptr, machine.scheduler_stack, machine.scheduler_stack_bytes);
  setcontext(&machine.scheduler);
}

void release_barrier(Block& block) {
  block.at_barrier = 0;
  block.counted = block.predicates;
  block.predicates = 0;
  ++block.epoch;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = fiber_of(machine.current->block, i);
    if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
  }
}

void check_range(const char* what, uint32_t offset, uint32_t bytes, int thread) {
  const size_t size = own().memory.size();
  if (offset > size || bytes > size - offset)
    fail("%s of %u bytes at %u by thread %d: outside the %zu bytes of shared memory", what, bytes, offset, thread, size);
  if (offset % bytes) fail("%s of %u bytes at %u by thread %d: not aligned", what, bytes, offset, thread);
}

// Whether an access by another thread of the block is ordered before one by `thread`.
bool ordered(int other, int other_warp, int64_t epoch, int64_t warp_epoch, int64_t arrivals, int thread) {
  if (other == thread || epoch != own().epoch) return true;
  if (fiber_of(machine.current->block, thread).waits > arrivals) return true;
  return other_warp == thread / 32 && warp_epoch != own().warps[thread / 32].epoch;
}

bool write_ordered(const Byte& b, int thread) {
  if (b.from_another_block) return fiber_of(machine.current->block, thread).waits > b.write_arrivals;
  return ordered(b.writer, b.writer / 32, b.write_epoch, b.write_warp_epoch, b.write_arrivals, thread);
}

void check_before_write(const char* what, uint32_t offset, uint32_t bytes, int thread) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const Byte& b = own().bytes[i];
    if (b.copying != kNobody)
      fail("%s at %u by thread %d: thread %d's copy to it is running", what, i, thread, b.copying);
    if (b.writer != kNobody && !write_ordered(b, thread))
      fail("%s at %u by thread %d: no barrier after the write by thread %d", what, i, thread, b.writer);
    if (b.reader != kNobody && !ordered(b.reader, b.reader_warp, b.read_epoch, b.read_warp_epoch, b.read_arrivals, thread))
      fail("%s at %u by thread %d: no barrier after a read by another thread", what, i, thread);
  }
}

void mark_written(uint32_t offset, uint32_t bytes, int thread) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& b = own().bytes[i];
    b.writer = thread;
    b.write_epoch = own().epoch;
    b.write_warp_epoch = own().warps[thread / 32].epoch;
    b.write_arrivals = machine.current->arrivals;
    b.write_fences = machine.current->fences;
    b.from_another_block = false;
  }
}

void run_cluster() {
  const int count = int(machine.fibers.size());
  machine.arrived = 0;
  machine.passed = 0;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.block = i / machine.threads;
    fiber.thread = i % machine.threads;
    fiber.arrivals = fiber.waits = fiber.fences = 0;
    fiber.state = State::kReady;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  const bool backwards = machine.blocks[0].index.x / int64_t(machine.blocks.size()) % 2;
  for (int done = 0; done < count;) {
    bool progress = false;
    done = 0;
    for (int i = 0; i < count; ++i) {
      // Every other one runs backwards, so that nothing leans on an order.
      Fiber& fiber = *machine.fibers[backwards ? count - 1 - i : i];
      if (fiber.state == State::kReady) {
        resume(fiber);
        progress = true;
      }
      done += fiber.state == State::kDone;
    }
    if (progress) continue;
    for (const auto& fiber : machine.fibers)
      if (fiber->state == State::kAtWarpInstruction)
        fail("thread %d waits for its warp at %s", fiber->thread,
             machine.blocks[fiber->block].warps[fiber->thread / 32].instruction);
    for (const Block& block : machine.blocks)
      if (block.at_barrier) fail("%d of %d threads wait at a barrier", block.at_barrier, machine.threads);
    fail("%d of %d threads have arrived at the cluster's barrier", machine.arrived, count);
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  const Grid block = machine.blocks.empty() ? Grid{} : machine.blocks[machine.current->block].index;
  std::fprintf(stderr, "emulation: block (%lld, %lld, %lld): ", (long long)block.x, (long long)block.y,
               (long long)block.z);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::_Exit(3);
}

void run(const Grid& grid, int threads, uint32_t shared_bytes, void (*call)(const void*), const void* kernel, int cluster) {
  machine.call = call;
  machine.kernel = kernel;
  machine.threads = threads;
  machine.fibers.resize(size_t(threads) * size_t(cluster));
  for (auto& fiber : machine.fibers)
    if (!fiber) fiber.reset(new Fiber);
  machine.current = machine.fibers[0].get();
  if (grid.x % cluster) fail("a grid of %lld blocks along x in clusters of %d", (long long)grid.x, cluster);
  for (int64_t z = 0; z < grid.z; ++z)
    for (int64_t y = 0; y < grid.y; ++y)
      for (int64_t x = 0; x < grid.x; x += cluster) {
        machine.blocks.assign(size_t(cluster), Block{});
        for (int i = 0; i < cluster; ++i) {
          Block& block = machine.blocks[size_t(i)];
          block.index = {x + i, y, z};
          block.warps.assign(size_t(threads) / 32, Warp{});
          block.memory.assign(shared_bytes, 0xff);
          block.bytes.assign(shared_bytes, Byte{});
        }
        run_cluster();
      }
}

int thread_index() { return machine.current->thread; }
int block_of_cluster() { return machine.current->block; }
int thread_of_cluster() { return machine.current->block * machine.threads + machine.current->thread; }
int block_size() { return machine.threads; }
const Grid& block_index() { return own().index; }

int barrier_count(bool predicate) {
  Block& block = own();
  block.predicates += predicate;
  machine.current->state = State::kAtBarrier;
  if (++block.at_barrier == machine.threads) {
    release_barrier(block);
  } else {
    yield();
  }
  return block.counted;
}

void barrier() { barrier_count(false); }

void arrive_cluster() {
  Fiber& fiber = *machine.current;
  if (fiber.arrivals != fiber.waits) fail("thread %d arrives at the cluster's barrier twice", fiber.thread);
  ++fiber.arrivals;
  if (++machine.arrived < int(machine.fibers.size())) return;
  machine.arrived = 0;
  ++machine.passed;
  for (auto& other : machine.fibers)
    if (other->state == State::kAtCluster) other->state = State::kReady;
}

void wait_cluster() {
  Fiber& fiber = *machine.current;
  if (fiber.arrivals == fiber.waits) fail("thread %d waits for the cluster without arriving", fiber.thread);
  if (machine.passed < fiber.arrivals) {
    fiber.state = State::kAtCluster;
    yield();
  }
  fiber.waits = fiber.arrivals;
}

unsigned char* write_in_cluster(int block, uint32_t offset, uint32_t bytes) {
  const Fiber& fiber = *machine.current;
  if (block < 0 || block >= int(machine.blocks.size()) || block == fiber.block)
    fail("thread %d writes into block %d of %zu", fiber.thread, block, machine.blocks.size());
  check_range("write", offset, bytes, fiber.thread);
  if (fiber.waits == 0) fail("write at %u by thread %d: the other block may not have begun", offset, fiber.thread);
  for (int i = 0; i < machine.threads; ++i)
    if (fiber_of(block, i).state == State::kDone) fail("write at %u by thread %d: the other block has ended", offset, fiber.thread);
  Block& target = machine.blocks[size_t(block)];
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& b = target.bytes[i];
    if (b.copying != kNobody) fail("write at %u by thread %d: a copy to it is running", i, fiber.thread);
    if (b.writer != kNobody && !(b.from_another_block && b.writer == fiber.thread) && fiber.waits <= b.write_arrivals)
      fail("write at %u by thread %d: no barrier of the cluster after a write", i, fiber.thread);
    if (b.reader != kNobody && fiber.waits <= b.read_arrivals)
      fail("write at %u by thread %d: no barrier of the cluster after a read", i, fiber.thread);
    b.writer = fiber.thread;
    b.write_arrivals = fiber.arrivals;
    b.write_fences = fiber.fences;
    b.from_another_block = true;
  }
  return target.memory.data() + offset;
}

void fence_for_tensor_cores() { ++machine.current->fences; }

void warp_barrier() {
  warp_instruction("a barrier of the warp", nullptr, [](void* const (&)[32]) {
    ++own().warps[machine.current->thread / 32].epoch;
  });
}

void warp_instruction(const char* name, void* argument, void (*together)(void* const (&lanes)[32])) {
  Fiber& fiber = *machine.current;
  Warp& warp = own().warps[fiber.thread / 32];
  if (warp.arrived && std::strcmp(warp.instruction, name) != 0)
    fail("thread %d is at %s, other lanes of its warp are at %s", fiber.thread, name, warp.instruction);
  warp.instruction = name;
  warp.lanes[fiber.thread % 32] = argument;
  if (++warp.arrived < 32) {
    fiber.state = State::kAtWarpInstruction;
    yield();
    return;
  }
  warp.arrived = 0;
  together(warp.lanes);
  for (int lane = 0; lane < 32; ++lane) fiber_of(fiber.block, fiber.thread / 32 * 32 + lane).state = State::kReady;
}

const unsigned char* read_shared(uint32_t offset, uint32_t bytes, int thread) {
  check_range("read", offset, bytes, thread);
  Block& block = own();
  const int warp = thread / 32;
  const int64_t warp_epoch = block.warps[warp].epoch;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& b = block.bytes[i];
    if (b.copying != kNobody) fail("read at %u by thread %d: thread %d's copy to it is running", i, thread, b.copying);
    if (b.writer == kNobody) fail("read at %u by thread %d: never written", i, thread);
    if (!write_ordered(b, thread))
      fail("read at %u by thread %d: no barrier after the write by thread %d", i, thread, b.writer);
    const bool first = b.read_epoch != block.epoch || (b.reader_warp == warp && b.read_warp_epoch != warp_epoch);
    b.reader = first || b.reader == thread ? thread : kSeveral;
    b.reader_warp = first || b.reader_warp == warp ? warp : kSeveral;
    b.read_epoch = block.epoch;
    b.read_warp_epoch = warp_epoch;
    b.read_arrivals = machine.current->arrivals;
  }
  return block.memory.data() + offset;
}

const unsigned char* read_shared_by_tensor_cores(uint32_t offset, uint32_t bytes, int thread) {
  const unsigned char* found = read_shared(offset, bytes, thread);
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const Byte& b = own().bytes[i];
    if (b.from_another_block || fiber_of(machine.current->block, b.writer).fences <= b.write_fences)
      fail("multiplication reads %u: no fence after the write by thread %d", i, b.writer);
  }
  return found;
}

unsigned char* write_shared(uint32_t offset, uint32_t bytes, int thread) {
  check_range("write", offset, bytes, thread);
  check_before_write("write", offset, bytes, thread);
  mark_written(offset, bytes, thread);
  return own().memory.data() + offset;
}

void start_copy(uint32_t offset, const void* source, bool valid) {
  Fiber& fiber = *machine.current;
  check_range("copy", offset, 16, fiber.thread);
  if (reinterpret_cast<uintptr_t>(source) % 16)
    fail("copy by thread %d: the source is not a multiple of 16", fiber.thread);
  check_before_write("copy", offset, 16, fiber.thread);
  for (uint32_t i = offset; i < offset + 16; ++i) own().bytes[i].copying = fiber.thread;
  fiber.open.push_back({offset, source, valid});
}

void commit_copies() {
  Fiber& fiber = *machine.current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_copies(size_t pending) {
  Fiber& fiber = *machine.current;
  for (; fiber.groups.size() > pending; fiber.groups.pop_front()) {
    for (const Copy& copy : fiber.groups.front()) {
      unsigned char* target = own().memory.data() + copy.offset;
      if (copy.valid)
        std::memcpy(target, copy.source, 16);
      else
        std::memset(target, 0, 16);
      for (uint32_t i = copy.offset; i < copy.offset + 16; ++i) own().bytes[i].copying = kNobody;
      mark_written(copy.offset, 16, fiber.thread);
    }
  }
}

}  // namespace dgemma::emulation
