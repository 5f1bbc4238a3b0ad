// The exact top-k of rows of scores, positions ascending (a plain C interface, called by ctypes).
//
// A row belongs to a cluster of `num_ranks` CTAs, each to a contiguous stretch of its positions, each
// warp to a contiguous part of that. Scores become unsigned keys in their order.
//
// | step     | reads                          | leaves                                           |
// |----------|--------------------------------|--------------------------------------------------|
// | count    | scores                         | how many keys have each value of the top 11 bits |
// | (all ranks' counts are summed through distributed shared memory: the threshold's 11 bits)    |
// | collect  | scores                         | bit masks of keys above; a list of keys with the |
// |          |                                | threshold's bits: the candidates                 |
// | narrow   | all ranks' candidates          | the exact threshold, from their other 21 bits    |
// | write    | masks                          | positions, in order                              |
//
// Where the candidates are many, or some of several equal keys must be chosen (the lowest positions
// win), `narrow_slowly` counts digits over all scores instead. Integer sums only, so the result does
// not depend on the order in which anything runs. No kernel allocates or synchronises with the host.
// Launchers return a cudaError_t.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace tidepool {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kMaxThreads = 1024;
constexpr int kMaxRanks = 16;
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
    int32_t num_ranks;       // CTAs a row, 1 to 16
    int32_t num_groups;      // masks: a stretch's positions / 32
    int32_t max_candidates;  // longer lists are not made
    int32_t num_keys;        // keys kept in shared memory: a stretch's positions, or 0
};

struct SelectSmem {
    uint32_t bins[kPasses][kBins];        // counts of a pass
    uint32_t words[kMaxThreads / kWarp + 1];  // of a block-wide scan
    uint32_t above[kMaxThreads / kWarp];  // keys over the threshold, a warp
    uint32_t equal[kMaxThreads / kWarp];  // keys at the threshold, a warp
    uint32_t first_of_rank[kMaxRanks + 1];  // in `everyone`
    uint32_t rank_above;
    uint32_t rank_equal;
    uint32_t num_candidates;
    uint32_t before;      // positions selected in lower ranks
    uint32_t digit;       // of the threshold, in this pass
    uint32_t room;        // keys still wanted among those with that digit
    uint32_t bin_count;   // keys with that digit
    // Behind it: masks[num_groups], candidate[max_candidates], position[max_candidates], then
    // keys[num_keys] and, once these were used, everyone[max_candidates] in the same place.
};

inline size_t smem_bytes(const SelectParams& p) {
    const int last = p.num_keys > p.max_candidates ? p.num_keys : p.max_candidates;
    return sizeof(SelectSmem) + size_t{4} * (p.num_groups + 2 * p.max_candidates + last);
}

// Keys order as scores do: -0 equals 0, NaN is lowest.
__device__ __forceinline__ uint32_t key_of(float score) {
    const float value = __fadd_rn(score, 0.0f);  // -0 becomes 0
    const uint32_t bits = __float_as_uint(value);
    const uint32_t key = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    return value == value ? key : 0;
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

// The two halves of a barrier after which ranks may leave: none reads another's memory any more.
__device__ __forceinline__ void arrive_last(int num_ranks) {
#if __CUDA_ARCH__ >= 900
    if (num_ranks > 1) {
        cooperative_groups::this_cluster().barrier_arrive();
    }
#endif
}

__device__ __forceinline__ void wait_last(int num_ranks) {
#if __CUDA_ARCH__ >= 900
    if (num_ranks > 1) {
        cooperative_groups::this_cluster().barrier_wait();
    }
#endif
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

template <int kThreads>
struct RowSelector {
    static constexpr int kWarps = kThreads / kWarp;
    static constexpr int kBinsAThread = kBins / kThreads;
    using BinVector = std::conditional_t<kBinsAThread == 2, uint2, uint4>;

    const SelectParams& p;
    SelectSmem& smem;
    uint32_t* masks;      // a bit a position of the stretch: selected
    uint32_t* candidate;  // keys with the threshold's first digit, this rank's
    uint32_t* position;   // where they are, relative to the stretch
    uint32_t* keys;       // of the stretch, between `count` and `collect`
    uint32_t* everyone;   // all ranks' candidates, rank by rank
    const float* scores;  // of this rank's stretch
    int32_t* out;         // of the row
    int rank;
    int lane;
    int warp;
    int begin;  // first position of the stretch
    int count;  // positions of the stretch
    int first;  // this warp's part, relative to the stretch
    int end;

    // Calls body(position, is_in, key) for the warp's positions, a group of 32 at a time with all
    // lanes, several loads in flight. load(i): what to_key makes a key of.
    template <class Load, class ToKey, class Body>
    __device__ __forceinline__ void for_each(const Load& load, const ToKey& to_key,
                                             const Body& body) const {
        for (int base = first; base < end; base += kUnroll * kWarp) {
            decltype(load(0)) value[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                const int i = base + u * kWarp + lane;
                value[u] = i < end ? load(i) : 0;
            }
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) {
                if (base + u * kWarp < end) {
                    const int i = base + u * kWarp + lane;
                    body(i, i < end, to_key(value[u]));
                }
            }
        }
    }

    template <class Body>
    __device__ __forceinline__ void for_each_score(const Body& body) const {
        for_each([&](int i) { return scores[i]; }, key_of, body);
    }

    __device__ void count_first_digit() {
        const bool is_kept = p.num_keys > 0;
        for_each_score([&](int i, bool is_in, uint32_t key) {
            if (is_in) {
                atomicAdd(&smem.bins[0][key >> 21], 1u);
                if (is_kept) {
                    keys[i] = key;
                }
            }
        });
    }

    template <int kPass, int kShift, int kMask>
    __device__ void count_digit(uint32_t prefix) {
        for_each_score([&](int, bool is_in, uint32_t key) {
            if (is_in && key >> (kPass == 1 ? 21 : 10) == prefix) {
                atomicAdd(&smem.bins[kPass][key >> kShift & kMask], 1u);
            }
        });
    }

    // Masks of the keys above the first digit, and this rank's list of keys that have it.
    __device__ void collect(uint32_t digit) {
        uint32_t num_above = 0;
        const auto body = [&](int i, bool is_in, uint32_t key) {
            const uint32_t above = __ballot_sync(kAll, is_in && key >> 21 > digit);
            const bool is_candidate = is_in && key >> 21 == digit;
            const uint32_t candidates = __ballot_sync(kAll, is_candidate);
            if (lane == 0) {
                masks[i / kWarp] = above;
            }
            num_above += __popc(above);
            if (candidates != 0) {
                uint32_t at = 0;
                if (lane == 0) {
                    at = atomicAdd(&smem.num_candidates, __popc(candidates));
                }
                at = __shfl_sync(kAll, at, 0) + __popc(candidates & ((1u << lane) - 1));
                if (is_candidate) {
                    candidate[at] = key;
                    position[at] = i;
                }
            }
        };
        if (p.num_keys > 0) {
            for_each([&](int i) { return keys[i]; }, [](uint32_t key) { return key; }, body);
        } else {
            for_each_score(body);
        }
        if (lane == 0) {
            atomicAdd(&smem.rank_above, num_above);
        }
    }

    // Copies all ranks' candidates here; counts what lower ranks have above the first digit.
    __device__ void gather_candidates() {
        if (threadIdx.x < kWarp) {
            const bool is_rank = lane < p.num_ranks;
            const int other = is_rank ? lane : rank;
            const uint32_t own = *of_rank(&smem.num_candidates, other, p.num_ranks);
            const uint32_t above = *of_rank(&smem.rank_above, other, p.num_ranks);
            uint32_t sum = is_rank ? own : 0;
#pragma unroll
            for (int offset = 1; offset < kWarp; offset *= 2) {
                const uint32_t lower = __shfl_up_sync(kAll, sum, offset);
                sum += lane >= offset ? lower : 0;
            }
            if (is_rank) {
                smem.first_of_rank[lane + 1] = sum;
            }
            const uint32_t before = warp_sum(lane < rank ? above : 0);
            if (lane == 0) {
                smem.first_of_rank[0] = 0;
                smem.before = before;
            }
        }
        __syncthreads();
        const uint32_t total = smem.first_of_rank[p.num_ranks];
#pragma unroll 4
        for (uint32_t j = threadIdx.x; j < total; j += kThreads) {
            int owner = 0;
            for (int step = kMaxRanks / 2; step > 0; step /= 2) {
                const int next = owner + step;
                owner = next < p.num_ranks && smem.first_of_rank[next] <= j ? next : owner;
            }
            everyone[j] =
                of_rank(candidate, owner, p.num_ranks)[j - smem.first_of_rank[owner]];
        }
        __syncthreads();
    }

    // The threshold among the candidates; false if some of several equal keys must be chosen.
    __device__ bool narrow(uint32_t& prefix, int& shift, uint32_t room) {
        const uint32_t total = smem.first_of_rank[p.num_ranks];
        for (uint32_t j = threadIdx.x; j < total; j += kThreads) {
            atomicAdd(&smem.bins[1][everyone[j] >> 10 & 2047], 1u);
        }
        __syncthreads();
        find_digit(1, room, 1);
        prefix = prefix << 11 | smem.digit;
        shift = 10;
        if (smem.bin_count != smem.room) {
            room = smem.room;
            for (uint32_t j = threadIdx.x; j < total; j += kThreads) {
                if (everyone[j] >> 10 == prefix) {
                    atomicAdd(&smem.bins[2][everyone[j] & 1023], 1u);
                }
            }
            __syncthreads();
            find_digit(2, room, 1);
            prefix = prefix << 10 | smem.digit;
            shift = 0;
        }
        return smem.bin_count == smem.room;
    }

    // Adds the chosen candidates to the masks, and writes the positions of all bits in order.
    __device__ void write_masks(uint32_t prefix, int shift) {
        uint32_t before = 0;
        for (uint32_t j = threadIdx.x; j < smem.first_of_rank[rank]; j += kThreads) {
            before += everyone[j] >> shift >= prefix;
        }
        before = warp_sum(before);
        if (lane == 0) {
            atomicAdd(&smem.before, before);
        }
        for (uint32_t j = threadIdx.x; j < smem.num_candidates; j += kThreads) {
            if (candidate[j] >> shift >= prefix) {
                const uint32_t i = position[j];
                atomicOr(&masks[i / kWarp], 1u << i % kWarp);
            }
        }
        __syncthreads();
        uint32_t done = smem.before;
        const int num_groups = (count + kWarp - 1) / kWarp;
        for (int base = 0; base < num_groups; base += kThreads) {
            const int group = base + static_cast<int>(threadIdx.x);
            uint32_t mask = group < num_groups ? masks[group] : 0;
            const uint32_t own = __popc(mask);
            uint32_t at = done + block_sum_before(own);
            done += smem.words[kWarps];
            for (; mask != 0; mask &= mask - 1) {
                out[at++] = begin + group * kWarp + __ffs(static_cast<int>(mask)) - 1;
            }
        }
    }

    // Sum of `own` over the threads before this one; words[kWarps]: over all.
    __device__ uint32_t block_sum_before(uint32_t own) {
        uint32_t sum = own;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            const uint32_t lower = __shfl_up_sync(kAll, sum, offset);
            sum += lane >= offset ? lower : 0;
        }
        __syncthreads();  // words are free
        if (lane == kWarp - 1) {
            smem.words[warp] = sum;
        }
        __syncthreads();
        const uint32_t other = lane < kWarps ? smem.words[lane] : 0;
        const uint32_t before = warp_sum(lane < warp ? other : 0);
        if (threadIdx.x < kWarp) {
            const uint32_t total = warp_sum(other);
            if (lane == 0) {
                smem.words[kWarps] = total;
            }
        }
        __syncthreads();
        return before + sum - own;
    }

    // The digit of the room-th key, from the highest down, over the counts of `num_ranks` ranks.
    __device__ void find_digit(int pass, uint32_t room, int num_ranks) {
        uint32_t counts[kBinsAThread] = {};
        const int top = kBins - static_cast<int>(threadIdx.x) * kBinsAThread;
#pragma unroll 8
        for (int step = 0; step < num_ranks; ++step) {
            int other = rank + step;  // ranks read different ones
            other -= other >= num_ranks && num_ranks > 1 ? num_ranks : 0;
            const uint32_t* bins = of_rank(smem.bins[pass], other, num_ranks);
            const BinVector loaded = *reinterpret_cast<const BinVector*>(bins + top - kBinsAThread);
            const uint32_t* value = reinterpret_cast<const uint32_t*>(&loaded);
#pragma unroll
            for (int j = 0; j < kBinsAThread; ++j) {
                counts[j] += value[kBinsAThread - 1 - j];
            }
        }
        uint32_t total = 0;
#pragma unroll
        for (int j = 0; j < kBinsAThread; ++j) {
            total += counts[j];
        }
        uint32_t before = block_sum_before(total);
        if (before < room && room <= before + total) {
#pragma unroll
            for (int j = 0; j < kBinsAThread; ++j) {
                if (before < room && room <= before + counts[j]) {
                    smem.digit = top - 1 - j;
                    smem.room = room - before;
                    smem.bin_count = counts[j];
                }
                before += counts[j];
            }
        }
        __syncthreads();
    }

    // Counts the other digits over all scores, where candidates are many or equal.
    __device__ void narrow_slowly(uint32_t prefix, uint32_t room) {
        for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) {
            smem.bins[1][i] = 0;
        }
        __syncthreads();
        count_digit<1, 10, 2047>(prefix);
        row_barrier(p.num_ranks);
        find_digit(1, room, p.num_ranks);
        prefix = prefix << 11 | smem.digit;
        room = smem.room;
        count_digit<2, 0, 1023>(prefix);
        row_barrier(p.num_ranks);
        find_digit(2, room, p.num_ranks);
        write_slowly(prefix << 10 | smem.digit, smem.room);
    }

    // Positions of keys over the threshold, and of the first `room` equal to it.
    __device__ void write_slowly(uint32_t threshold, uint32_t room) {
        uint32_t above = 0;
        uint32_t equal = 0;
        for_each_score([&](int, bool is_in, uint32_t key) {
            above += is_in && key > threshold;
            equal += is_in && key == threshold;
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
            write_warp(threshold, room, above_before, equal_before);
        }
        arrive_last(p.num_ranks);
    }

    __device__ __forceinline__ void write_warp(uint32_t threshold, uint32_t room,
                                               uint32_t above_before, uint32_t equal_before) const {
        const uint32_t lower = (1u << lane) - 1;
        uint32_t at = above_before + min(equal_before, room);
        for_each_score([&](int i, bool is_in, uint32_t key) {
            const bool is_equal = is_in && key == threshold;
            const uint32_t equals = __ballot_sync(kAll, is_equal);
            const bool is_chosen = (is_in && key > threshold) ||
                                   (is_equal && equal_before + __popc(equals & lower) < room);
            const uint32_t chosen = __ballot_sync(kAll, is_chosen);
            if (is_chosen) {
                out[at + __popc(chosen & lower)] = begin + i;
            }
            at += __popc(chosen);
            equal_before += __popc(equals);
        });
    }

    // The row's length is over K.
    __device__ void run() {
        for (int i = threadIdx.x; i < kPasses * kBins; i += kThreads) {
            smem.bins[0][i] = 0;
        }
        if (threadIdx.x == 0) {
            smem.rank_above = 0;
            smem.num_candidates = 0;
        }
        __syncthreads();
        count_first_digit();
        row_barrier(p.num_ranks);
        find_digit(0, p.topk, p.num_ranks);
        const uint32_t digit = smem.digit;
        const uint32_t room = smem.room;
        bool is_done = false;
        if (smem.bin_count <= p.max_candidates) {
            collect(digit);
            row_barrier(p.num_ranks);
            gather_candidates();
            uint32_t prefix = digit;
            int shift = 21;
            if (narrow(prefix, shift, room)) {
                arrive_last(p.num_ranks);
                write_masks(prefix, shift);
                is_done = true;
            }
        }
        if (!is_done) {
            row_barrier(p.num_ranks);  // all have read what is about to be counted again
            narrow_slowly(digit, room);
        }
        wait_last(p.num_ranks);
    }
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    select_topk_kernel(const __grid_constant__ SelectParams p) {
    extern __shared__ __align__(16) char smem_raw[];
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
    uint32_t* masks = reinterpret_cast<uint32_t*>(smem_raw + sizeof(SelectSmem));
    uint32_t* candidate = masks + p.num_groups;
    uint32_t* keys = candidate + 2 * p.max_candidates;
    RowSelector<kThreads> selector = {
        p,
        *reinterpret_cast<SelectSmem*>(smem_raw),
        masks,
        candidate,
        candidate + p.max_candidates,
        keys,
        keys,
        p.scores + row * p.score_stride + begin,
        out,
        rank,
        static_cast<int>(threadIdx.x) % kWarp,
        warp,
        begin,
        count,
        min(warp * span, count),
        min((warp + 1) * span, count),
    };
    selector.run();
}

template <int kThreads>
int prepare(int max_smem, bool may_cluster) {
    const auto kernel = select_topk_kernel<kThreads>;
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_smem);
    if (error == cudaSuccess && may_cluster) {
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return error;
}

template <int kThreads>
int launch(const SelectParams& p, cudaStream_t stream) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(p.batch) * p.num_ranks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = smem_bytes(p);
    config.stream = stream;
    config.attrs = &attribute;
    if (p.num_ranks > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {static_cast<unsigned>(p.num_ranks), 1, 1};
        config.numAttrs = 1;
    }
    return cudaLaunchKernelEx(&config, select_topk_kernel<kThreads>, p);
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device and raises its limit of shared memory to max_smem bytes.
int tidepool_prepare(int max_smem, int may_cluster) {
    using namespace tidepool;
    const bool clusters = may_cluster != 0;
    const int error = prepare<512>(max_smem, clusters);
    return error == 0 ? prepare<1024>(max_smem, clusters) : error;
}

// num_threads: 512 or 1024.
int tidepool_select_topk(const tidepool::SelectParams* p, int num_threads, cudaStream_t stream) {
    using namespace tidepool;
    return num_threads == 512 ? launch<512>(*p, stream) : launch<1024>(*p, stream);
}

}  // extern "C"
