// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the CUDA kernels of csrc/cuda on the host, for tests: the words of the language that they use, in C++20.
//
// Blocks run one after the other. The threads of a block are fibers, which change places at barriers only; in which
// order they run between two barriers is `thread_order`: 0 forward, 1 backward, otherwise shuffled by that seed, so
// that a missing barrier changes results. With -DEMULATE_WITH_THREADS they are threads, for ThreadSanitizer.
// Shared memory is an allocation of its own for every block, filled with NaN: AddressSanitizer sees what leaves it, and
// what was never written shows up in results. A barrier that not every thread of the block reaches is an error.
// An asynchronous copy happens when its thread waits for it, as late as it may.
// Not modelled: warps, the order of memory accesses, time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>
#ifdef EMULATE_WITH_THREADS
#include <barrier>
#include <thread>
#else
#include <sys/mman.h>
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index3 {
  unsigned x, y, z;
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace fusedsep::emulation {

inline int thread_order = 0;
inline Index3 block_index, block_size, grid_size;
inline thread_local Index3 thread_index;

inline std::unique_ptr<unsigned char[]> shared;

// Asynchronous copies of a thread that it has not waited for, in groups, the last of which is still open.
struct AsyncCopy {
  void* to;
  const void* from;  // null: zeros
};
inline std::vector<std::vector<std::vector<AsyncCopy>>> copies;

#ifdef EMULATE_WITH_THREADS

inline std::unique_ptr<std::barrier<>> barrier;
inline void wait(const void*) { barrier->arrive_and_wait(); }

inline void run_block(int count, const std::function<void()>& kernel) {
  barrier = std::make_unique<std::barrier<>>(count);
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      thread_index = {unsigned(i), 0, 0};
      kernel();
      barrier->arrive_and_drop();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#else

enum class State { kReady, kWaiting, kDone };
struct Fiber {
  ucontext_t context;
  void* stack;
  void* sanitizer_stack;
  State state;
  const void* barrier;
};
constexpr size_t kStackSize = 256 * 1024;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const std::function<void()>* body;
inline std::exception_ptr failure;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;
inline int running;

inline void leave_fiber([[maybe_unused]] bool for_good) {
  Fiber& fiber = fibers[size_t(running)];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.sanitizer_stack, scheduler_stack, scheduler_stack_size);
#endif
  swapcontext(&fiber.context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

inline void start_of_fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  try {
    (*body)();
  } catch (...) {
    failure = std::current_exception();
  }
  fibers[size_t(running)].state = State::kDone;
  leave_fiber(true);
}

inline void enter_fiber(int i) {
  running = i;
  thread_index = {unsigned(i), 0, 0};
#ifdef __SANITIZE_ADDRESS__
  void* own_stack;
  __sanitizer_start_switch_fiber(&own_stack, fibers[size_t(i)].stack, kStackSize);
#endif
  swapcontext(&scheduler, &fibers[size_t(i)].context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own_stack, nullptr, nullptr);
#endif
}

inline void wait(const void* barrier) {
  fibers[size_t(running)].state = State::kWaiting;
  fibers[size_t(running)].barrier = barrier;
  leave_fiber(false);
}

inline void run_block(int count, const std::function<void()>& kernel) {
  body = &kernel;
  while (int(fibers.size()) < count) {
    void* stack = mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fibers.push_back({});
    fibers.back().stack = stack;
  }
  std::vector<int> order;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[size_t(i)];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackSize;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kReady;
    makecontext(&fiber.context, start_of_fiber, 0);
    order.push_back(thread_order == 1 ? count - 1 - i : i);
  }
  std::mt19937 random{unsigned(thread_order)};
  for (;;) {
    if (thread_order > 1) std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      enter_fiber(i);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    // Every thread ran up to a barrier or its end: all must have come to the same.
    const State state = fibers[0].state;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[size_t(i)];
      if (fiber.state != state || (state == State::kWaiting && fiber.barrier != fibers[0].barrier)) {
        throw std::logic_error("threads of a block wait at different barriers, or not all of them do");
      }
      if (state == State::kWaiting) fiber.state = State::kReady;
    }
    if (state == State::kDone) return;
  }
}

#endif

}  // namespace fusedsep::emulation

#define threadIdx fusedsep::emulation::thread_index
#define blockIdx fusedsep::emulation::block_index
#define blockDim fusedsep::emulation::block_size
#define gridDim fusedsep::emulation::grid_size
// The address of `place` tells one barrier of the source from another.
#define __syncthreads()                \
  do {                                 \
    static const char place = 0;       \
    fusedsep::emulation::wait(&place); \
  } while (false)
#define FUSEDSEP_SHARED(name) unsigned char* const name = fusedsep::emulation::shared.get()

namespace fusedsep::cuda {

constexpr int64_t kSharedBytesEverywhere = 48 * 1024;

inline void copy_async(void* to, const void* from, bool valid) {
  emulation::copies[threadIdx.x].back().push_back({to, valid ? from : nullptr});
}
inline void end_group() { emulation::copies[threadIdx.x].emplace_back(); }
template <int kGroups>
void wait_for_groups() {
  auto& groups = emulation::copies[threadIdx.x];
  while (groups.size() > kGroups + 1) {
    for (const auto& copy : groups.front()) {
      copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
    }
    groups.erase(groups.begin());
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  if (blocks > INT32_MAX || threads < 1 || threads > 1024 || shared_bytes > 227 * 1024) {
    throw std::logic_error("CUDA could not launch this");
  }
  emulation::grid_size = {unsigned(blocks), 1, 1};
  emulation::block_size = {unsigned(threads), 1, 1};
  for (int64_t block = 0; block < blocks; ++block) {
    emulation::block_index = {unsigned(block), 0, 0};
    emulation::shared.reset(new unsigned char[size_t(shared_bytes)]);
    std::memset(emulation::shared.get(), 0xff, size_t(shared_bytes));
    emulation::copies.assign(size_t(threads), {{}});
    emulation::run_block(threads, [&] { kernel(arguments...); });
    for (const auto& groups : emulation::copies) {
      for (const auto& group : groups) {
        if (!group.empty()) throw std::logic_error("a thread ended with a copy under way");
      }
    }
  }
}

}  // namespace fusedsep::cuda
