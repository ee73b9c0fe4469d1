// The part of CUDA that model/kernels/cuda/*.cu use, on one CPU thread: every CUDA thread is a fiber (ucontext) that runs
// until it waits for others, and which one runs next is drawn at random. Included in place of cuda_runtime.h.
//
// What it finds: results that depend on the schedule (compare several seeds; blocks run in random order, and a favoured
// warp may run far ahead of the others), barriers that not all threads reach, shuffles that not all lanes reach, shared
// memory read before it is written (it is filled with garbage) and, compiled with -fsanitize=address or thread, overruns
// and data races, those between blocks included: blocks are ordered for no one but the thread of the same number.
// What it cannot: speed, memory consistency (there are no fences to leave out), more than full-warp masks.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace simt {

// The emulator itself is no subject of the race detector, and a switch of stacks must not confuse its call stack.
#define SIMT_PLAIN __attribute__((noinline, no_sanitize("thread")))

constexpr size_t STACK_BYTES = 128 << 10, SHARED_BYTES = 48 << 10;
constexpr int MAX_SHARED = 16, WARP = 32;
enum State { RUNNABLE, AT_BARRIER, AT_WARP_OPERATION, FINISHED };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state;
    int line;            // where it waits
    unsigned thread;
    uint64_t posted[2];  // to the other lanes; two, because a lane may be one operation ahead
    int turn, barriers;
    void *tsan, *asan;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline unsigned block_x, block_y;
inline std::string error;
inline std::mt19937 generator;
inline bool shuffled;
inline int removed_barrier;  // line of a __syncthreads() that does nothing; 0: none
inline char *shared_next, *shared_end, *shared_variables[MAX_SHARED];
inline void *scheduler_tsan, *scheduler_asan;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline char launch_token, finish_token;

inline unsigned draw(unsigned bound) { return shuffled ? generator() % bound : 0; }

inline void fail(const std::string& what) {
    if (error.empty()) error = what + " (block " + std::to_string(block_x) + ", " + std::to_string(block_y) + ")";
}

SIMT_PLAIN inline void resume(Fiber& fiber) {
    current = &fiber;
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&scheduler_asan, fiber.stack.get(), STACK_BYTES);
#endif
    swapcontext(&scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(scheduler_asan, nullptr, nullptr);
#endif
}

SIMT_PLAIN inline void wait(State state, int line) {
    Fiber* fiber = current;
    fiber->state = state;
    fiber->line = line;
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fiber->asan, scheduler_stack, scheduler_stack_bytes);
#endif
    swapcontext(&fiber->context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber->asan, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

// A fiber lives through many blocks and launches: it runs the body and waits for the next.
SIMT_PLAIN inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
    for (;;) {
#ifdef __SANITIZE_THREAD__
        __tsan_acquire(&launch_token);
#endif
        body();
#ifdef __SANITIZE_THREAD__
        __tsan_release(&finish_token);
#endif
        wait(FINISHED, 0);
    }
}

SIMT_PLAIN inline void remove_fibers() {
#ifdef __SANITIZE_THREAD__
    for (auto& fiber : fibers) __tsan_destroy_fiber(fiber->tsan);
#endif
    fibers.clear();
}

SIMT_PLAIN inline void make_fibers(unsigned count) {
    if (fibers.size() == count) return;
    remove_fibers();
    for (unsigned i = 0; i < count; i++) {
        auto fiber = std::make_unique<Fiber>();
        fiber->stack = std::make_unique<char[]>(STACK_BYTES);
        fiber->thread = i;
        fiber->turn = 0;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = STACK_BYTES;
        fiber->context.uc_link = nullptr;
#ifdef __SANITIZE_THREAD__
        fiber->tsan = __tsan_create_fiber(0);
#endif
        makecontext(&fiber->context, fiber_main, 0);
        fibers.push_back(std::move(fiber));
    }
}

// Runs the lanes of a warp that can run, once each and in random order; a warp operation that all have reached is done.
SIMT_PLAIN inline void step_warp(unsigned warp) {
    unsigned lanes[WARP];
    for (unsigned i = 0; i < WARP; i++) {
        const unsigned j = shuffled ? draw(i + 1) : i;
        lanes[i] = lanes[j];
        lanes[j] = i;
    }
    for (unsigned lane : lanes) {
        Fiber& fiber = *fibers[warp * WARP + lane];
        if (fiber.state == RUNNABLE) resume(fiber);
        if (!error.empty()) return;
    }
    const Fiber& first = *fibers[warp * WARP];
    for (unsigned i = 0; i < WARP; i++) {
        const Fiber& fiber = *fibers[warp * WARP + i];
        if (fiber.state != AT_WARP_OPERATION || fiber.line != first.line) return;
    }
    for (unsigned i = 0; i < WARP; i++) fibers[warp * WARP + i]->state = RUNNABLE;
}

SIMT_PLAIN inline bool can_run(unsigned warp) {
    for (unsigned i = 0; i < WARP; i++) {
        if (fibers[warp * WARP + i]->state == RUNNABLE) return true;
    }
    return false;
}

// After no warp can run: true if the block goes on.
SIMT_PLAIN inline bool pass_barrier() {
    size_t finished = 0, at_barrier = 0;
    for (auto& fiber : fibers) {
        finished += fiber->state == FINISHED;
        at_barrier += fiber->state == AT_BARRIER && fiber->line == fibers[0]->line;
    }
    if (finished == fibers.size()) return false;
    if (at_barrier == fibers.size()) {
        for (auto& fiber : fibers) fiber->state = RUNNABLE;
        return true;
    }
    std::string where;
    for (auto& fiber : fibers) {
        const std::string line = fiber->state == FINISHED ? " end" : " " + std::to_string(fiber->line);
        if (where.find(line) == std::string::npos) where += line;
    }
    fail("threads wait for others that never come; they are at lines" + where);
    return false;
}

SIMT_PLAIN inline void run_block() {
    for (auto& fiber : fibers) {
        fiber->state = RUNNABLE;
        fiber->barriers = 0;
    }
    const unsigned warps = unsigned(fibers.size()) / WARP;
    unsigned favoured = 0, steps_left = 0;
    do {
        for (;;) {
            std::vector<unsigned> ready;
            for (unsigned warp = 0; warp < warps; warp++) {
                if (can_run(warp)) ready.push_back(warp);
            }
            if (ready.empty()) break;
            if (steps_left == 0 || !can_run(favoured)) {
                favoured = ready[draw(unsigned(ready.size()))];
                steps_left = 1u << (2 * draw(7));  // 1, 4, ... 4096: from lock step to running far ahead
            }
            steps_left--;
            step_warp(favoured);
            if (!error.empty()) return;
        }
    } while (pass_barrier());
}

SIMT_PLAIN inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
    if (!error.empty()) return;
    if (block.x % WARP != 0 || block.y != 1 || block.z != 1 || grid.z != 1) return fail("unsupported launch");
    make_fibers(block.x);
    body = std::move(kernel);
    std::vector<unsigned> order;
    for (unsigned i = 0; i < grid.x * grid.y; i++) {
        order.push_back(i);
        if (shuffled) std::swap(order[i], order[draw(i + 1)]);
    }
    // Every block has shared memory of its own, so that the race detector sees no block write into another's.
    std::unique_ptr<char[]> shared(new char[order.size() * SHARED_BYTES]);
    memset(shared.get(), 0xA5, order.size() * SHARED_BYTES);
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(shared.get(), order.size() * SHARED_BYTES);
#endif
#ifdef __SANITIZE_THREAD__
    scheduler_tsan = __tsan_get_current_fiber();
    __tsan_release(&launch_token);
#endif
    for (unsigned i : order) {
        block_x = i % grid.x;
        block_y = i / grid.x;
        shared_next = shared.get() + i * SHARED_BYTES;
        shared_end = shared_next + SHARED_BYTES - 2;  // the last two bytes stand for the barriers of this block
        memset(shared_variables, 0, sizeof shared_variables);
        run_block();
        if (!error.empty()) break;
    }
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(&finish_token);
#endif
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(shared.get(), order.size() * SHARED_BYTES);
#endif
    if (!error.empty()) remove_fibers();  // some stand in the middle of the kernel
}

// One variable of shared memory: the same address for all threads of a block.
SIMT_PLAIN inline char* shared_variable(int id, size_t bytes) {
    if (shared_variables[id] == nullptr) {
        shared_variables[id] = shared_next;
        shared_next += (bytes + 15) / 16 * 16 + 64;  // 64: never unpoisoned
        if (shared_next > shared_end) {
            fprintf(stderr, "simt: more than %zu bytes of shared memory\n", SHARED_BYTES);
            abort();
        }
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(shared_variables[id], bytes);
#endif
    }
    return shared_variables[id];
}
template <class T> using Same = T;
#define SHARED(type, name) \
    simt::Same<type>& name = *reinterpret_cast<simt::Same<type>*>(simt::shared_variable(__COUNTER__, sizeof(type)))
#define LAUNCH(kernel, grid, block, stream, ...) \
    (void)(stream), simt::launch(grid, block, [=] { kernel(__VA_ARGS__); })

SIMT_PLAIN inline dim3 thread_index() { return dim3(current->thread, 0, 0); }
SIMT_PLAIN inline dim3 block_index() { return dim3(block_x, block_y, 0); }
#define threadIdx simt::thread_index()
#define blockIdx simt::block_index()

SIMT_PLAIN inline void barrier(int line) {
    if (line == removed_barrier) return;
#ifdef __SANITIZE_THREAD__
    // In turn: a thread that leaves this barrier late must not learn what another did on its way to the next one.
    char* token = shared_end + current->barriers++ % 2;
    __tsan_release(token);
#endif
    wait(AT_BARRIER, line);
#ifdef __SANITIZE_THREAD__
    __tsan_acquire(token);
#endif
}
#define __syncthreads() simt::barrier(__LINE__)

// Every lane posts eight bytes; afterwards `posted(lane)` reads any lane's. No memory ordering, as on a GPU.
SIMT_PLAIN inline void meet(unsigned mask, uint64_t value, int line) {
    if (mask != 0xffffffffu) fail("only full-warp masks are known");
    current->posted[current->turn] = value;
    current->turn ^= 1;
    wait(AT_WARP_OPERATION, line);
}
SIMT_PLAIN inline unsigned lane() { return current->thread % WARP; }
SIMT_PLAIN inline uint64_t posted(unsigned of_lane) {
    return fibers[current->thread / WARP * WARP + of_lane]->posted[current->turn ^ 1];
}
template <class T> SIMT_PLAIN T shuffle(unsigned mask, T value, unsigned from, int line) {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    meet(mask, bits, line);
    bits = posted(from % WARP);
    memcpy(&value, &bits, sizeof value);
    return value;
}
SIMT_PLAIN inline unsigned match_any(unsigned mask, uint64_t value, int line) {
    meet(mask, value, line);
    unsigned same = 0;
    for (unsigned i = 0; i < WARP; i++) same |= unsigned(posted(i) == value) << i;
    return same;
}
#define __shfl_sync(mask, value, from) simt::shuffle(mask, value, from, __LINE__)
#define __shfl_xor_sync(mask, value, bits) simt::shuffle(mask, value, simt::lane() ^ (bits), __LINE__)
#define __shfl_up_sync(mask, value, delta) \
    simt::shuffle(mask, value, simt::lane() >= unsigned(delta) ? simt::lane() - (delta) : simt::lane(), __LINE__)
#define __match_any_sync(mask, value) simt::match_any(mask, uint64_t(value), __LINE__)

}  // namespace simt

inline int atomicAdd(int* target, int value) { return __atomic_fetch_add(target, value, __ATOMIC_RELAXED); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline int min(int a, int b) { return a < b ? a : b; }

// Before a launch: the schedule (0: threads in order) and the line of a barrier to leave out (0: none).
extern "C" void simt_schedule(unsigned seed, int removed_barrier) {
    simt::shuffled = seed != 0;
    simt::generator.seed(seed);
    simt::removed_barrier = removed_barrier;
}

// After a launch that returned an error: what happened.
extern "C" const char* simt_error() {
    static std::string last;
    last = std::exchange(simt::error, "");
    return last.c_str();
}
