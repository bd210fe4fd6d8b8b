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

enum class State { kReady, kAtWarpInstruction, kAtBarrier, kDone };

struct Copy {
  uint32_t offset;
  const void* source;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  void* fake_stack = nullptr;
  int thread = 0;
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

// Epochs count barriers; an access of an earlier epoch is ordered before every one of this epoch.
struct Byte {
  int writer = kNobody, reader = kNobody, reader_warp = kNobody;
  int64_t write_epoch = -1, write_warp_epoch = -1, read_epoch = -1, read_warp_epoch = -1;
  int copying = kNobody;
};

struct Machine {
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> memory;
  std::vector<Byte> bytes;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  Grid block;
  int threads = 0, at_barrier = 0, predicates = 0, counted = 0;
  int64_t epoch = 0;
};

Machine machine;

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
  (*machine.kernel)();
  Fiber& fiber = *machine.current;
  for (const auto& group : fiber.groups)
    if (!group.empty()) fail("thread %d ends while its copies are running", fiber.thread);
  fiber.state = State::kDone;
  begin_switch(nullptr, machine.scheduler_stack, machine.scheduler_stack_bytes);
  setcontext(&machine.scheduler);
}

void release_barrier() {
  machine.at_barrier = 0;
  machine.counted = machine.predicates;
  machine.predicates = 0;
  ++machine.epoch;
  for (auto& fiber : machine.fibers)
    if (fiber->state == State::kAtBarrier) fiber->state = State::kReady;
}

void check_range(const char* what, uint32_t offset, uint32_t bytes, int thread) {
  if (offset > machine.memory.size() || bytes > machine.memory.size() - offset)
    fail("%s of %u bytes at %u by thread %d: outside the %zu bytes of shared memory", what, bytes, offset, thread,
         machine.memory.size());
  if (offset % bytes) fail("%s of %u bytes at %u by thread %d: not aligned", what, bytes, offset, thread);
}

bool ordered(int other, int other_warp, int64_t epoch, int64_t warp_epoch, int thread) {
  if (other == thread || epoch != machine.epoch) return true;
  return other_warp == thread / 32 && warp_epoch != machine.warps[thread / 32].epoch;
}

void check_before_write(const char* what, uint32_t offset, uint32_t bytes, int thread) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    const Byte& b = machine.bytes[i];
    if (b.copying != kNobody)
      fail("%s at %u by thread %d: thread %d's copy to it is running", what, i, thread, b.copying);
    if (b.writer != kNobody && !ordered(b.writer, b.writer / 32, b.write_epoch, b.write_warp_epoch, thread))
      fail("%s at %u by thread %d: no barrier after the write by thread %d", what, i, thread, b.writer);
    if (b.reader != kNobody && !ordered(b.reader, b.reader_warp, b.read_epoch, b.read_warp_epoch, thread))
      fail("%s at %u by thread %d: no barrier after a read by another thread", what, i, thread);
  }
}

void mark_written(uint32_t offset, uint32_t bytes, int thread) {
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& b = machine.bytes[i];
    b.writer = thread;
    b.write_epoch = machine.epoch;
    b.write_warp_epoch = machine.warps[thread / 32].epoch;
  }
}

void run_block() {
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.thread = i;
    fiber.state = State::kReady;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (int done = 0; done < machine.threads;) {
    bool progress = false;
    done = 0;
    for (int i = 0; i < machine.threads; ++i) {
      // Every other block runs backwards, so that nothing leans on an order.
      Fiber& fiber = *machine.fibers[machine.block.x % 2 ? machine.threads - 1 - i : i];
      if (fiber.state == State::kReady) {
        resume(fiber);
        progress = true;
      }
      done += fiber.state == State::kDone;
    }
    if (progress) continue;
    for (const auto& fiber : machine.fibers)
      if (fiber->state == State::kAtWarpInstruction)
        fail("thread %d waits for its warp at %s", fiber->thread, machine.warps[fiber->thread / 32].instruction);
    fail("%d of %d threads wait at a barrier", machine.at_barrier, machine.threads);
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulation: block (%lld, %lld, %lld): ", (long long)machine.block.x,
               (long long)machine.block.y, (long long)machine.block.z);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::_Exit(3);
}

void run(const Grid& grid, int threads, uint32_t shared_bytes, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  machine.threads = threads;
  machine.fibers.resize(threads);
  for (auto& fiber : machine.fibers)
    if (!fiber) fiber.reset(new Fiber);
  for (machine.block.z = 0; machine.block.z < grid.z; ++machine.block.z)
    for (machine.block.y = 0; machine.block.y < grid.y; ++machine.block.y)
      for (machine.block.x = 0; machine.block.x < grid.x; ++machine.block.x) {
        machine.warps.assign(threads / 32, Warp{});
        machine.memory.assign(shared_bytes, 0xff);
        machine.bytes.assign(shared_bytes, Byte{});
        machine.epoch = 0;
        machine.at_barrier = machine.predicates = 0;
        run_block();
      }
}

int thread_index() { return machine.current->thread; }
int block_size() { return machine.threads; }
const Grid& block_index() { return machine.block; }

int barrier_count(bool predicate) {
  machine.predicates += predicate;
  machine.current->state = State::kAtBarrier;
  if (++machine.at_barrier == machine.threads) {
    release_barrier();
  } else {
    yield();
  }
  return machine.counted;
}

void barrier() { barrier_count(false); }

void warp_barrier() {
  warp_instruction("a barrier of the warp", nullptr, [](void* const (&)[32]) {
    ++machine.warps[machine.current->thread / 32].epoch;
  });
}

void warp_instruction(const char* name, void* argument, void (*together)(void* const (&lanes)[32])) {
  Fiber& fiber = *machine.current;
  Warp& warp = machine.warps[fiber.thread / 32];
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
  for (int lane = 0; lane < 32; ++lane) machine.fibers[fiber.thread / 32 * 32 + lane]->state = State::kReady;
}

const unsigned char* read_shared(uint32_t offset, uint32_t bytes, int thread) {
  check_range("read", offset, bytes, thread);
  const int warp = thread / 32;
  const int64_t warp_epoch = machine.warps[warp].epoch;
  for (uint32_t i = offset; i < offset + bytes; ++i) {
    Byte& b = machine.bytes[i];
    if (b.copying != kNobody) fail("read at %u by thread %d: thread %d's copy to it is running", i, thread, b.copying);
    if (b.writer == kNobody) fail("read at %u by thread %d: never written", i, thread);
    if (!ordered(b.writer, b.writer / 32, b.write_epoch, b.write_warp_epoch, thread))
      fail("read at %u by thread %d: no barrier after the write by thread %d", i, thread, b.writer);
    const bool first = b.read_epoch != machine.epoch || (b.reader_warp == warp && b.read_warp_epoch != warp_epoch);
    b.reader = first || b.reader == thread ? thread : kSeveral;
    b.reader_warp = first || b.reader_warp == warp ? warp : kSeveral;
    b.read_epoch = machine.epoch;
    b.read_warp_epoch = warp_epoch;
  }
  return machine.memory.data() + offset;
}

unsigned char* write_shared(uint32_t offset, uint32_t bytes, int thread) {
  check_range("write", offset, bytes, thread);
  check_before_write("write", offset, bytes, thread);
  mark_written(offset, bytes, thread);
  return machine.memory.data() + offset;
}

void start_copy(uint32_t offset, const void* source, bool valid) {
  Fiber& fiber = *machine.current;
  check_range("copy", offset, 16, fiber.thread);
  if (valid && reinterpret_cast<uintptr_t>(source) % 16)
    fail("copy by thread %d: the source is not a multiple of 16", fiber.thread);
  check_before_write("copy", offset, 16, fiber.thread);
  for (uint32_t i = offset; i < offset + 16; ++i) machine.bytes[i].copying = fiber.thread;
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
      unsigned char* target = machine.memory.data() + copy.offset;
      if (copy.valid)
        std::memcpy(target, copy.source, 16);
      else
        std::memset(target, 0, 16);
      for (uint32_t i = copy.offset; i < copy.offset + 16; ++i) machine.bytes[i].copying = kNobody;
      mark_written(copy.offset, 16, fiber.thread);
    }
  }
}

}  // namespace dgemma::emulation
