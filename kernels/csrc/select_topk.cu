// The exact top-k of rows of scores, positions ascending (a plain C interface, called by ctypes).
//
// A row belongs to a cluster of `num_ranks` CTAs, each to a contiguous stretch of its positions, each
// warp to a contiguous stretch of that. Scores become unsigned keys in their order; a radix search
// over 11, 11 and 10 bits narrows to the threshold: ranks count digits on their own, then each sums
// all ranks' counts through distributed shared memory. Then every warp knows how many selected
// positions stand before its first one, and writes its own in order.
//
// | pass   | reads                 | between passes                                         |
// |--------|-----------------------|--------------------------------------------------------|
// | 1      | scores, once          | cluster barrier, sum of counts, digit of the threshold |
// | 2, 3   | keys (shared memory)  | the same; pass 3 only if pass 2 left a choice          |
// | count  | keys                  | cluster barrier, sum over what stands before           |
// | write  | keys                  |                                                        |
//
// Where a CTA's stretch does not fit its shared memory, passes read the scores again. Integer sums
// only, so the result does not depend on the order in which anything runs. Equal keys: lowest
// position first. No kernel allocates or synchronises with the host. Launchers return a cudaError_t.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace tidepool {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxThreads = 1024;
constexpr int kPasses = 3;
constexpr int kBins = 2048;
constexpr int kUnroll = 8;

// kernels/cuda_select_topk.py mirrors this struct.
struct SelectParams {
    const float* scores;   // [B, C], rows score_stride apart
    const void* lengths;   // [B] int32 or int64
    int32_t* topk_idx;     // [B, K], rows out_stride apart; written whole
    int64_t score_stride;
    int64_t out_stride;
    int32_t batch;           // B
    int32_t num_columns;     // C
    int32_t topk;            // K
    int32_t lengths_are_64;  // lengths is int64
    int32_t num_ranks;       // CTAs a row, a power of two up to 16
    int32_t capacity;        // keys that fit behind SelectSmem
};

struct SelectSmem {
    uint32_t bins[kPasses][kBins];       // this rank's counts of a pass
    uint32_t words[kMaxThreads / kWarp];  // of a block-wide scan
    uint32_t above[kMaxThreads / kWarp];  // keys over the threshold, a warp
    uint32_t equal[kMaxThreads / kWarp];  // keys at the threshold, a warp
    uint32_t rank_above;
    uint32_t rank_equal;
    uint32_t digit;       // of the threshold, in this pass
    uint32_t room;        // keys still wanted among those with that digit
    uint32_t bin_count;   // keys with that digit
    uint32_t pad[3];      // keys behind start at a multiple of 16 bytes
};

// Keys order as scores do: -0 equals 0, NaN is lowest.
__device__ __forceinline__ uint32_t key_of(float score) {
    const uint32_t bits = __float_as_uint(score);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return 0;
    }
    if (magnitude == 0) {
        return 0x80000000u;
    }
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ void row_barrier(int num_ranks) {
#if __CUDA_ARCH__ >= 900
    if (num_ranks > 1) {
        cooperative_groups::this_cluster().sync();
        return;
    }
#endif
    __syncthreads();
}

// The same variable of another rank's shared memory.
template <class T>
__device__ __forceinline__ const T* of_rank(const T* own, int rank, int num_ranks) {
#if __CUDA_ARCH__ >= 900
    if (num_ranks > 1) {
        return cooperative_groups::this_cluster().map_shared_rank(own, rank);
    }
#endif
    return own;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(kAll, value);
#else
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(kAll, value, offset);
    }
    return value;
#endif
}

template <int kThreads, bool kResident>
struct RowSelector {
    static constexpr int kWarps = kThreads / kWarp;
    static constexpr int kBinsAThread = kBins / kThreads;
    using BinVector = std::conditional_t<kBinsAThread == 2, uint2, uint4>;

    const SelectParams& p;
    SelectSmem& smem;
    uint32_t* keys;  // of this rank's stretch, if resident
    const float* scores;  // of this rank's stretch
    int rank;
    int lane;
    int warp;
    int begin;  // first position of the stretch
    int first;  // this warp's part, relative to the stretch
    int end;

    __device__ uint32_t key(int i) const { return kResident ? keys[i] : key_of(scores[i]); }

    // Calls body(key) for each position of the warp's part, several loads in flight.
    template <class Load, class Body>
    __device__ __forceinline__ void for_each(const Load& load, const Body& body) const {
        int i = first + lane;
        for (; i + (kUnroll - 1) * kWarp < end; i += kUnroll * kWarp) {
            decltype(load(0)) value[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                value[u] = load(i + u * kWarp);
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                body(i + u * kWarp, value[u]);
            }
        }
        for (; i < end; i += kWarp) {
            body(i, load(i));
        }
    }

    __device__ void count_first_digit() {
        for_each([&](int i) { return scores[i]; },
                 [&](int i, float score) {
                     const uint32_t key = key_of(score);
                     if (kResident) {
                         keys[i] = key;
                     }
                     atomicAdd(&smem.bins[0][key >> 21], 1u);
                 });
    }

    template <int kPass, int kShift, int kMask>
    __device__ void count_digit(uint32_t prefix) {
        for_each([&](int i) { return key(i); },
                 [&](int, uint32_t key) {
                     if (key >> (kPass == 1 ? 21 : 10) == prefix) {
                         atomicAdd(&smem.bins[kPass][key >> kShift & kMask], 1u);
                     }
                 });
    }

    // All ranks' counts, from the highest digit down; leaves the digit of the room-th key.
    __device__ void find_digit(int pass, uint32_t room) {
        uint32_t count[kBinsAThread] = {};
        const int top = kBins - static_cast<int>(threadIdx.x) * kBinsAThread;
#pragma unroll 4
        for (int step = 0; step < p.num_ranks; ++step) {
            const int other = (rank + step) & (p.num_ranks - 1);  // ranks read different ones
            const uint32_t* bins = of_rank(smem.bins[pass], other, p.num_ranks);
            const BinVector loaded = *reinterpret_cast<const BinVector*>(bins + top - kBinsAThread);
            const uint32_t* value = reinterpret_cast<const uint32_t*>(&loaded);
#pragma unroll
            for (int j = 0; j < kBinsAThread; ++j) {
                count[j] += value[kBinsAThread - 1 - j];
            }
        }
        uint32_t total = 0;
#pragma unroll
        for (int j = 0; j < kBinsAThread; ++j) {
            total += count[j];
        }
        uint32_t before = total;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const uint32_t other = __shfl_up_sync(kAll, before, offset);
            before += lane >= offset ? other : 0;
        }
        if (lane == kWarp - 1) {
            smem.words[warp] = before;
        }
        before -= total;
        __syncthreads();
        before += warp_sum(lane < warp ? smem.words[lane] : 0);
        if (before < room && room <= before + total) {
#pragma unroll
            for (int j = 0; j < kBinsAThread; ++j) {
                if (before < room && room <= before + count[j]) {
                    smem.digit = top - 1 - j;
                    smem.room = room - before;
                    smem.bin_count = count[j];
                }
                before += count[j];
            }
        }
        __syncthreads();
    }

    // Positions selected: key >> shift over prefix, and the first `room` equal to it.
    __device__ void write(uint32_t prefix, int shift, uint32_t room, int32_t* out) {
        uint32_t above = 0;
        uint32_t equal = 0;
        for_each([&](int i) { return key(i); },
                 [&](int, uint32_t key) {
                     above += key >> shift > prefix;
                     equal += key >> shift == prefix;
                 });
        above = warp_sum(above);
        equal = warp_sum(equal);
        if (lane == 0) {
            smem.above[warp] = above;
            smem.equal[warp] = equal;
        }
        __syncthreads();
        const uint32_t warp_above = lane < kWarps ? smem.above[lane] : 0;
        const uint32_t warp_equal = lane < kWarps ? smem.equal[lane] : 0;
        if (threadIdx.x < kWarp) {
            const uint32_t all_above = warp_sum(warp_above);
            const uint32_t all_equal = warp_sum(warp_equal);
            if (lane == 0) {
                smem.rank_above = all_above;
                smem.rank_equal = all_equal;
            }
        }
        row_barrier(p.num_ranks);
        const bool is_before = lane < rank;
        const int other = is_before ? lane : rank;
        uint32_t above_before = is_before ? *of_rank(&smem.rank_above, other, p.num_ranks) : 0;
        uint32_t equal_before = is_before ? *of_rank(&smem.rank_equal, other, p.num_ranks) : 0;
        above_before = warp_sum(above_before + (lane < warp ? warp_above : 0));
        equal_before = warp_sum(equal_before + (lane < warp ? warp_equal : 0));
        if (above != 0 || (equal != 0 && equal_before < room)) {
            write_warp(prefix, shift, room, above_before, equal_before, out);
        }
        row_barrier(p.num_ranks);  // no rank leaves while another may read its shared memory
    }

    __device__ __forceinline__ void write_warp(uint32_t prefix, int shift, uint32_t room,
                                               uint32_t above_before, uint32_t equal_before,
                                               int32_t* out) const {
        const uint32_t lower = (1u << lane) - 1;
        uint32_t at = above_before + min(equal_before, room);
        for (int base = first; base < end; base += kWarp) {
            const int i = base + lane;
            const bool is_in = i < end;
            const uint32_t digits = is_in ? key(i) >> shift : 0;
            const bool is_equal = is_in && digits == prefix;
            const uint32_t equals = __ballot_sync(kAll, is_equal);
            const bool is_chosen = (is_in && digits > prefix) ||
                                   (is_equal && equal_before + __popc(equals & lower) < room);
            const uint32_t chosen = __ballot_sync(kAll, is_chosen);
            if (is_chosen) {
                out[at + __popc(chosen & lower)] = begin + i;
            }
            at += __popc(chosen);
            equal_before += __popc(equals);
        }
    }
};

template <int kThreads, bool kResident>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    select_topk_kernel(const __grid_constant__ SelectParams p) {
    extern __shared__ __align__(16) char smem_raw[];
    SelectSmem& smem = *reinterpret_cast<SelectSmem*>(smem_raw);
    const int row = blockIdx.x / p.num_ranks;
    const int rank = blockIdx.x % p.num_ranks;
    const int64_t wanted = p.lengths_are_64 ? static_cast<const int64_t*>(p.lengths)[row]
                                            : static_cast<const int32_t*>(p.lengths)[row];
    const int length = static_cast<int>(max(int64_t{0}, min(wanted, int64_t{p.num_columns})));
    int32_t* out = p.topk_idx + row * p.out_stride;
    if (length <= p.topk) {
        for (int i = rank * kThreads + threadIdx.x; i < p.topk; i += p.num_ranks * kThreads) {
            out[i] = i < length ? i : -1;
        }
        return;
    }
    const int chunk = ((length + p.num_ranks - 1) / p.num_ranks + kWarp - 1) / kWarp * kWarp;
    const int begin = min(rank * chunk, length);
    const int count = min(chunk, length - begin);
    constexpr int kWarps = kThreads / kWarp;
    const int span = (chunk / kWarp + kWarps - 1) / kWarps * kWarp;
    const int warp = threadIdx.x / kWarp;
    RowSelector<kThreads, kResident> selector = {
        p,
        smem,
        reinterpret_cast<uint32_t*>(smem_raw + sizeof(SelectSmem)),
        p.scores + row * p.score_stride + begin,
        rank,
        static_cast<int>(threadIdx.x) % kWarp,
        warp,
        begin,
        min(warp * span, count),
        min((warp + 1) * span, count),
    };
    for (int i = threadIdx.x; i < kPasses * kBins; i += kThreads) {
        smem.bins[0][i] = 0;
    }
    __syncthreads();
    selector.count_first_digit();
    row_barrier(p.num_ranks);
    selector.find_digit(0, p.topk);
    uint32_t prefix = smem.digit;
    uint32_t room = smem.room;
    int shift = 21;
    if (smem.bin_count != room) {
        selector.template count_digit<1, 10, 2047>(prefix);
        row_barrier(p.num_ranks);
        selector.find_digit(1, room);
        prefix = prefix << 11 | smem.digit;
        room = smem.room;
        shift = 10;
        if (smem.bin_count != room) {
            selector.template count_digit<2, 0, 1023>(prefix);
            row_barrier(p.num_ranks);
            selector.find_digit(2, room);
            prefix = prefix << 10 | smem.digit;
            room = smem.room;
            shift = 0;
        }
    }
    selector.write(prefix, shift, room, out);
}

template <int kThreads, bool kResident>
int prepare(int max_smem, bool may_cluster) {
    const auto kernel = select_topk_kernel<kThreads, kResident>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_smem);
    if (error == cudaSuccess && may_cluster) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
}

template <int kThreads>
int launch(const SelectParams& p, size_t smem_bytes, cudaStream_t stream) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(p.batch) * p.num_ranks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    if (p.num_ranks > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(p.num_ranks), 1, 1};
        config.numAttrs = 1;
    }
    return p.capacity > 0 ? cudaLaunchKernelEx(&config, select_topk_kernel<kThreads, true>, p)
                          : cudaLaunchKernelEx(&config, select_topk_kernel<kThreads, false>, p);
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Bytes of shared memory in front of the keys.
int tidepool_select_topk_smem() { return sizeof(tidepool::SelectSmem); }

// Loads every kernel on the current device and raises its limit of shared memory to max_smem bytes.
int tidepool_prepare(int max_smem, int may_cluster) {
    using namespace tidepool;
    const bool clusters = may_cluster != 0;
    int error = prepare<512, true>(max_smem, clusters);
    if (error == 0) error = prepare<512, false>(max_smem, clusters);
    if (error == 0) error = prepare<1024, true>(max_smem, clusters);
    return error == 0 ? prepare<1024, false>(max_smem, clusters) : error;
}

// num_threads: 512 or 1024. The CTA's stretch is held in shared memory if capacity > 0.
int tidepool_select_topk(const tidepool::SelectParams* p, int num_threads, cudaStream_t stream) {
    using namespace tidepool;
    const size_t bytes = sizeof(SelectSmem) + size_t{4} * p->capacity;
    return num_threads == 512 ? launch<512>(*p, bytes, stream) : launch<1024>(*p, bytes, stream);
}

}  // extern "C"
