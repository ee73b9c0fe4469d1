// Routing on the GPU after the logits: scores, choice of the k best experts, load and a stable counting sort, in two
// kernels; and the gradient of the logits in one. Same results, ties included, as route_reference of ../route.py.
//
//   choose   logits [N, R, E] -> scores, index [N, R, k], chosen [R, N*k] (a byte per slot), counts [R, chunks, E]
//   sort     chosen, counts   -> load [R, E], order [R, N*k]
//   gradient grad_scores, grad_logits, scores, index -> gradient of the logits [N, R, E]
//
// N tokens, R routers, E <= 256 experts, k choices. Tokens are cut into chunks; a block owns one chunk of one router, so
// that the count of every (chunk, expert) is a plain store and where a chunk writes is a sum of counts: no atomics on
// global memory, no block waits for another, nothing needs zeroing beforehand, and every run gives the same bits. (The
// atomics on shared memory add integers: their order is invisible.)
//
// Compiled by nvcc for GPUs, and by g++ with -DSIMT_EMULATOR for the tests, which run every thread as a fiber of the CPU
// in random order (tests/model/kernels/cuda/simt.h).

#ifdef SIMT_EMULATOR
#include "simt.h"
#else
#include <cuda_runtime.h>
template <class T> using Same = T;
#define SHARED(type, name) __shared__ Same<type> name
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <cstdint>

#ifndef ROUTE_THREADS
#define ROUTE_THREADS 256  // fewer under the race detector of the tests, which tells 255 threads apart
#endif

namespace {

constexpr int THREADS = ROUTE_THREADS, WARPS = THREADS / 32;
constexpr int MAX_EXPERTS = 256;  // an expert fits a byte
constexpr int LANES = 8;          // threads that share one token; each holds ceil(E / 8) experts in registers
constexpr int ROWS = THREADS / LANES;
constexpr unsigned ALL = 0xffffffffu;

// Blocks per multiprocessor asked of ptxas, that is 64 or 128 registers a thread. Left to itself it keeps some kernels
// to 32 or 48 and spills.
constexpr int resident_blocks(int per_lane) { return per_lane <= 8 ? 4 : 2; }

struct Shape {
    int tokens, routers, experts, choices;
    int chunks, chunk_tokens;
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Larger number, larger key; -0 and 0 are one key, NaN is the largest (as torch.sort has it), no number has key 0.
__device__ __forceinline__ unsigned ascending_key(float x) {
    if (x != x) return ALL;
    const unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ unsigned long long larger(unsigned long long a, unsigned long long b) { return a > b ? a : b; }

// PER_LANE * LANES >= E. Grid (chunks, R).
template <int PER_LANE>
__global__ void __launch_bounds__(THREADS, resident_blocks(PER_LANE))
choose(const float* __restrict__ logits, const uint8_t* __restrict__ keep, bool drop_scores, Shape s,
       float* __restrict__ scores, int64_t* __restrict__ index, uint8_t* __restrict__ chosen, int* __restrict__ counts) {
    SHARED(int[MAX_EXPERTS], histogram);
    const int lane = threadIdx.x % LANES, row_of_block = threadIdx.x / LANES, router = blockIdx.y;
    for (int e = threadIdx.x; e < s.experts; e += THREADS) histogram[e] = 0;
    __syncthreads();

    const int begin = blockIdx.x * s.chunk_tokens, end = min(begin + s.chunk_tokens, s.tokens);
    for (int first = begin; first < end; first += ROWS) {  // every thread of a warp takes part in its shuffles
        const int token = first + row_of_block;
        const bool inside = token < end;
        const int64_t row = int64_t(token) * s.routers + router;
        const float* row_logits = logits + row * s.experts;
        const uint8_t* row_keep = keep + row * s.experts;

        unsigned key[PER_LANE];
#pragma unroll
        for (int v = 0; v < PER_LANE; v++) {
            const int e = v * LANES + lane;
            key[v] = 0;
            if (!inside || e >= s.experts) continue;
            const float logit = row_logits[e];
            const bool kept = keep == nullptr || row_keep[e];
            // Without expert dropout, and in sigma-MoE, scores decide (large logits tie at 1); else logits.
            if (keep == nullptr || drop_scores) {
                key[v] = ascending_key(kept ? sigmoid(logit) : 0.0f);
            } else {
                key[v] = ascending_key(kept ? logit : -INFINITY);
            }
        }

        int mine = 0;  // lane i keeps choice i of the last eight
        for (int j = 0; j < s.choices; j++) {
            unsigned long long best = 0;
#pragma unroll
            for (int v = 0; v < PER_LANE; v++) {  // of equal keys the lowest expert has the largest low half
                best = larger(best, (unsigned long long)(key[v]) << 32 | unsigned(MAX_EXPERTS - 1 - (v * LANES + lane)));
            }
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2) best = larger(best, __shfl_xor_sync(ALL, best, step));
            const int e = MAX_EXPERTS - 1 - int(unsigned(best));
#pragma unroll
            for (int v = 0; v < PER_LANE; v++) {
                if (e == v * LANES + lane) key[v] = 0;
            }
            if (j % LANES == lane) mine = e;
            if ((j % LANES == LANES - 1 || j == s.choices - 1) && inside && lane <= j % LANES) {
                const int64_t choice = j / LANES * LANES + lane;
                const bool kept = keep == nullptr || !drop_scores || row_keep[mine];
                scores[row * s.choices + choice] = kept ? sigmoid(row_logits[mine]) : 0.0f;
                index[row * s.choices + choice] = mine;
                chosen[(int64_t(router) * s.tokens + token) * s.choices + choice] = uint8_t(mine);
                atomicAdd(&histogram[mine], 1);
            }
        }
    }
    __syncthreads();
    int* block_counts = counts + (int64_t(router) * s.chunks + blockIdx.x) * s.experts;
    for (int e = threadIdx.x; e < s.experts; e += THREADS) block_counts[e] = histogram[e];
}

// Grid (chunks, R), as in `choose`.
__global__ void __launch_bounds__(THREADS, 4)
sort(const uint8_t* __restrict__ chosen, const int* __restrict__ counts, Shape s, int64_t* __restrict__ load,
     int64_t* __restrict__ order) {
    SHARED(int[MAX_EXPERTS], total);                // slots of each expert in all chunks
    SHARED(int[MAX_EXPERTS], next);                 // where the next slot of each expert goes
    SHARED(int[WARPS * MAX_EXPERTS], warp_counts);  // of each (warp, expert) in the slots at hand; then: where they go
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunk = blockIdx.x, router = blockIdx.y, E = s.experts;
    for (int e = threadIdx.x; e < E; e += THREADS) total[e] = next[e] = 0;
    __syncthreads();

    const int* router_counts = counts + int64_t(router) * s.chunks * E;
    for (int i = threadIdx.x; i < s.chunks * E; i += THREADS) {
        const int count = router_counts[i];
        if (count == 0) continue;
        atomicAdd(&total[i % E], count);
        if (i / E < chunk) atomicAdd(&next[i % E], count);
    }
    __syncthreads();

    if (warp == 0) {  // next += exclusive prefix sum of total
        int carry = 0;
        for (int first = 0; first < E; first += 32) {
            const int e = first + lane, own = e < E ? total[e] : 0;
            int sum = own;
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const int below = __shfl_up_sync(ALL, sum, step);
                if (lane >= step) sum += below;
            }
            if (e < E) next[e] += carry + sum - own;
            carry += __shfl_sync(ALL, sum, 31);
        }
    }
    if (chunk == 0) {
        for (int e = threadIdx.x; e < E; e += THREADS) load[int64_t(router) * E + e] = total[e];
    }

    const int64_t router_slots = int64_t(router) * s.tokens * s.choices;
    const int begin = chunk * s.chunk_tokens * s.choices;
    const int end = min(begin + s.chunk_tokens * s.choices, s.tokens * s.choices);
    for (int first = begin; first < end; first += THREADS) {
        for (int i = threadIdx.x; i < WARPS * E; i += THREADS) warp_counts[i] = 0;
        __syncthreads();
        const int slot = first + threadIdx.x;
        const bool inside = slot < end;
        const int e = inside ? chosen[router_slots + slot] : MAX_EXPERTS;
        const unsigned same = __match_any_sync(ALL, e);
        const int rank = __popc(same & ((1u << lane) - 1));
        if (inside && rank == 0) warp_counts[warp * E + e] = __popc(same);
        __syncthreads();
        for (int expert = threadIdx.x; expert < E; expert += THREADS) {
            int position = next[expert];
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const int count = warp_counts[w * E + expert];
                warp_counts[w * E + expert] = position;
                position += count;
            }
            next[expert] = position;
        }
        __syncthreads();
        if (inside) order[router_slots + warp_counts[warp * E + e] + rank] = slot;
        __syncthreads();
    }
}

// PER_LANE * LANES >= E. A row is one (token, router); grid (ceil(N R / ROWS)). s (1 - s) is 0 for a dropped score too.
template <int PER_LANE>
__global__ void __launch_bounds__(THREADS, resident_blocks(PER_LANE))
gradient(const float* __restrict__ grad_logits, const float* __restrict__ grad_scores, const float* __restrict__ scores,
         const int64_t* __restrict__ index, Shape s, float* __restrict__ grad) {
    const int lane = threadIdx.x % LANES;
    const int64_t row = int64_t(blockIdx.x) * ROWS + threadIdx.x / LANES;
    if (row >= int64_t(s.tokens) * s.routers) return;
    float sum[PER_LANE];
#pragma unroll
    for (int v = 0; v < PER_LANE; v++) {
        const int e = v * LANES + lane;
        sum[v] = grad_logits != nullptr && e < s.experts ? grad_logits[row * s.experts + e] : 0.0f;
    }
    if (grad_scores != nullptr) {
        for (int j = 0; j < s.choices; j++) {
            const float score = scores[row * s.choices + j], term = grad_scores[row * s.choices + j] * score * (1.0f - score);
            const int e = int(index[row * s.choices + j]);
#pragma unroll
            for (int v = 0; v < PER_LANE; v++) {
                if (e == v * LANES + lane) sum[v] += term;
            }
        }
    }
#pragma unroll
    for (int v = 0; v < PER_LANE; v++) {
        const int e = v * LANES + lane;
        if (e < s.experts) grad[row * s.experts + e] = sum[v];
    }
}

#ifdef SIMT_EMULATOR
struct OnDevice {
    explicit OnDevice(int) {}
    int launch_error() const { return simt::error.empty() ? 0 : 1; }
};
#else
// Kernels are launched on the device that holds the tensors, whatever the calling thread's current one is.
class OnDevice {
  public:
    explicit OnDevice(int device) : device_(device) {
        cudaGetDevice(&previous_);
        if (previous_ != device) cudaSetDevice(device);
    }
    ~OnDevice() {
        if (previous_ != device_) cudaSetDevice(previous_);
    }
    int launch_error() const { return int(cudaGetLastError()); }

  private:
    int previous_ = 0, device_;
};
#endif

}  // namespace

// Calls MACRO(PER_LANE) with the smallest PER_LANE that holds `experts`.
#define FOR_EXPERTS(experts, MACRO) \
    if ((experts) <= 8) { MACRO(1); } \
    else if ((experts) <= 16) { MACRO(2); } \
    else if ((experts) <= 32) { MACRO(4); } \
    else if ((experts) <= 64) { MACRO(8); } \
    else if ((experts) <= 128) { MACRO(16); } \
    else { MACRO(32); }

// Both return 0 or CUDA's error code of the launch. Pointers are device memory, contiguous, 1 <= k <= E <= 256, N >= 1,
// N k <= 2^30, R <= 65535; null `keep`, `grad_logits` and `grad_scores` are absent. `stream` is a cudaStream_t.
extern "C" int switchall_route(const float* logits, const uint8_t* keep, int drop_scores, int tokens, int routers,
                               int experts, int choices, int chunks, float* scores, int64_t* index, uint8_t* chosen,
                               int* counts, int64_t* load, int64_t* order, int device, void* stream) {
    const OnDevice guard(device);
    const Shape s{tokens, routers, experts, choices, chunks, (tokens + chunks - 1) / chunks};
    const dim3 grid(chunks, routers);
#define CHOOSE(PER_LANE) \
    LAUNCH(choose<PER_LANE>, grid, dim3(THREADS), stream, logits, keep, drop_scores != 0, s, scores, index, chosen, counts)
    FOR_EXPERTS(experts, CHOOSE)
    LAUNCH(sort, grid, dim3(THREADS), stream, chosen, counts, s, load, order);
    return guard.launch_error();
}

extern "C" int switchall_route_gradient(const float* grad_logits, const float* grad_scores, const float* scores,
                                        const int64_t* index, int tokens, int routers, int experts, int choices,
                                        float* grad, int device, void* stream) {
    const OnDevice guard(device);
    const Shape s{tokens, routers, experts, choices, 0, 0};
    const dim3 grid(unsigned((int64_t(tokens) * routers + ROWS - 1) / ROWS));
#define GRADIENT(PER_LANE) \
    LAUNCH(gradient<PER_LANE>, grid, dim3(THREADS), stream, grad_logits, grad_scores, scores, index, s, grad)
    FOR_EXPERTS(experts, GRADIENT)
    return guard.launch_error();
}

// What the code that a function above returned means.
extern "C" const char* switchall_error(int code) {
#ifdef SIMT_EMULATOR
    return code == 0 ? "" : simt_error();
#else
    return cudaGetErrorString(static_cast<cudaError_t>(code));
#endif
}
