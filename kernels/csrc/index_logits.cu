// Indexer scores of decode over paged FP8 keys of 128 values, for Hopper (sm_90a); a plain C interface,
// called by ctypes.
//
// Keys are read once and bandwidth is the limit: a tile's keys and scales come by two bulk copies into
// one of kStages buffers, and threads take them from there as the left operand of a warpgroup product.
// The sum over a key's values may run in any order as long as queries use the same one: a thread's
// share of a row is then two 16-byte words, and queries are stored in the order that this gives.
//
// A CTA is one warpgroup. All positions of all rows are dealt to the CTAs that run at once, in tiles of
// 64 and equal shares, so lengths may differ as they like. For each row in its share a CTA brings the
// queries to e4m3 (shared memory), then takes tile after tile with the next ones' copies in flight.
//
// A query head, divided by a power of two, is the nearest e4m3 value, or the sum of two (kIsExact):
// the nearest and what it leaves. The power goes into the head's weight: relu(2^n x) = 2^n relu(x).
// No kernel allocates or synchronises with the host. Launchers return a cudaError_t.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include "wgmma.cuh"

namespace tidepool {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kThreads = 128;
constexpr int kWidth = 128;       // bytes of a key, values of a query head
constexpr int kTile = 64;         // positions of a tile, 16 a warp
constexpr int kWarpRows = 16;
constexpr int kMaxBatch = 512;
constexpr int kFillColumns = 2048;

// kernels/cuda_index_logits.py mirrors this struct.
struct IndexParams {
    const __nv_bfloat16* query;  // [B, I, 128]
    const float* weight;         // [B, I]
    const uint8_t* pages;        // [P, page bytes]: keys, then float32 scales
    const int32_t* page_table;   // [B, pages of a sequence], -1 = hole
    const void* lengths;         // [B] int32 or int64
    float* scores;               // [B, C]; written whole
    int64_t query_stride_b;
    int64_t query_stride_i;
    int64_t weight_stride;
    int64_t page_stride;
    int64_t table_stride;
    int64_t score_stride;
    int32_t batch;           // B, 1 .. kMaxBatch
    int32_t num_heads;       // I
    int32_t num_pages;       // P
    int32_t num_columns;     // C
    int32_t room;            // positions that scores and table have
    int32_t page_shift;      // log2 of the tokens a page, at least 6
    int32_t lengths_are_64;  // lengths is int64
};

// A tile as its page has it.
struct KeyTile {
    uint8_t key[kTile][kWidth];
    float scale[kTile];
};

template <int kHeads, bool kIsExact, int kStages>
struct IndexSmem {
    __align__(1024) uint8_t query[kIsExact ? 2 : 1][kHeads * kWidth];  // high, low; see wgmma.cuh
    KeyTile tile[kStages];
    uint64_t full[kStages];  // mbarriers
    float weight[kHeads];
    int length[kMaxBatch];
    int first_tile[kMaxBatch + 1];  // of each row, in the deal
    int sum_of_warp[kThreads / kWarp];
};

// d[64 x kHeads] = a[64 x 32] * b[kHeads x 32]^T, plus d if kAdds; e4m3, `a` in registers.
template <bool kAdds>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, {%32, %33, %34, %35}, %36, p, 1, 1;\n}\n"
        :
            "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
            "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
            "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
            "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(kAdds ? 1 : 0));
}

template <bool kAdds>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[16], uint32_t a0, uint32_t a1, uint32_t a2,
                                           uint32_t a3, uint64_t b) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, {%16, %17, %18, %19}, %20, p, 1, 1;\n}\n"
        :
            "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
            "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(kAdds ? 1 : 0));
}

__device__ __forceinline__ uint32_t address_of(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void init_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address_of(barrier)) : "memory");
}

__device__ __forceinline__ void expect_bytes(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_bulk(void* target, const uint8_t* source, uint32_t bytes,
                                          uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            address_of(target)),
        "l"(source), "r"(bytes), "r"(address_of(barrier))
        : "memory");
}

__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(address_of(barrier)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ uint32_t word_of(const uint4& vector, int i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Four floats as e4m3; `left` becomes what rounding left of them.
__device__ __forceinline__ uint32_t to_e4m3(float (&left)[4]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const __nv_fp8x2_storage_t pair = __nv_cvt_float2_to_fp8x2(
            make_float2(left[2 * i], left[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
        const float2 back = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3)));
        left[2 * i] -= back.x;
        left[2 * i + 1] -= back.y;
        word |= static_cast<uint32_t>(pair) << (16 * i);
    }
    return word;
}

// A thread's part of a tile's keys: rows g and g + 8 of its warp's 16, two words each.
struct KeyPart {
    uint4 word[2][2];  // [row][half]
    float scale;       // of the row whose score this thread writes
};

template <int kHeads, bool kIsExact, int kStages>
struct RowScorer {
    const IndexParams& p;
    IndexSmem<kHeads, kIsExact, kStages>& smem;
    int lane;
    int warp;
    int stage;        // of the next tile
    uint32_t parity;  // of that stage's barrier

    int row;
    int length;
    int end;       // tile behind this CTA's share of the row
    int id_base;   // tile of ids' lane 0
    int ids;       // page of tile id_base + lane, -1 = hole
    int next_ids;  // of the 32 tiles behind

    __device__ __forceinline__ int load_ids(int tile) const {
        const int position = (tile + lane) * kTile;
        int page = -1;
        if (tile + lane < end) {
            page = __ldg(p.page_table + row * p.table_stride + (position >> p.page_shift));
        }
        return static_cast<uint32_t>(page) < static_cast<uint32_t>(p.num_pages) ? page : -1;
    }

    __device__ __forceinline__ int page_of(int tile) const {
        return __shfl_sync(kAll, ids, tile - id_base);
    }

    // Row of the warp's 16 whose score this lane writes, if its second bit is clear.
    __device__ __forceinline__ int own_row() const { return lane / 4 + 8 * (lane & 1); }

    // Starts a tile's copies; the first warp, all lanes. `page` may be -1: any keys do.
    __device__ __forceinline__ void copy(int tile, int page, int into) {
        if (lane == 0) {
            const uint8_t* from = p.pages + static_cast<int64_t>(max(page, 0)) * p.page_stride;
            const int page_size = 1 << p.page_shift;
            const int offset = tile * kTile & (page_size - 1);
            KeyTile& target = smem.tile[into];
            expect_bytes(&smem.full[into], sizeof(KeyTile));
            copy_bulk(target.key, from + offset * kWidth, sizeof(target.key), &smem.full[into]);
            copy_bulk(target.scale, from + page_size * kWidth + offset * 4, sizeof(target.scale),
                      &smem.full[into]);
        }
    }

    // Odd rows' halves are loaded in the other order, which frees them of bank conflicts.
    __device__ __forceinline__ void take(KeyPart& part) const {
        const KeyTile& tile = smem.tile[stage];
        const int first = warp * kWarpRows + lane / 4;
        const bool turns = lane / 4 & 1;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint4* key = reinterpret_cast<const uint4*>(tile.key[first + 8 * i]) + lane % 4;
            const uint4 one = key[turns ? 4 : 0];
            const uint4 other = key[turns ? 0 : 4];
            part.word[i][0] = turns ? other : one;
            part.word[i][1] = turns ? one : other;
        }
        part.scale = tile.scale[warp * kWarpRows + own_row()];
    }

    // Two threads a head: 64 values each, as e4m3 in the order of the keys' words.
    __device__ void store_query() {
        const int head = threadIdx.x / 2;
        const int half = threadIdx.x % 2;
        if (head >= kHeads) {  // whole warps
            return;
        }
        const bool is_head = head < p.num_heads;
        uint4 raw[8] = {};
        if (is_head) {
            const __nv_bfloat16* query =
                p.query + row * p.query_stride_b + head * p.query_stride_i + half * 64;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                raw[i] = __ldg(reinterpret_cast<const uint4*>(query) + i);
            }
        }
        float amax = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const uint32_t pair = word_of(raw[i / 4], i % 4) & 0x7fff7fffu;
            amax = fmaxf(amax, fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)));
        }
        amax = fmaxf(amax, __shfl_xor_sync(kAll, amax, 1));
        // 2^ceil(log2(amax / 448)), by the bits of 448 = 1.75 * 2^8; 1e-4: DeepSeek's own floor.
        amax = fminf(fmaxf(amax, kIsExact ? 1e-30f : 1e-4f), 1e30f);
        const float power =
            __uint_as_float((__float_as_uint(amax) + 0x1fffffu) & 0x7f800000u) * 0x1p-8f;
        const float inverse = 1.0f / power;
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // word j of the half: values 16 q + 4 j .. + 3 of each q
            uint32_t high[4];
            uint32_t low[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                float value[4];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int at = 8 * q + 2 * j + i;
                    const uint32_t pair = word_of(raw[at / 4], at % 4);
                    value[2 * i] = __uint_as_float(pair << 16) * inverse;
                    value[2 * i + 1] = __uint_as_float(pair & 0xffff0000u) * inverse;
                }
                high[q] = to_e4m3(value);
                low[q] = kIsExact ? to_e4m3(value) : 0;
            }
            const int at = swizzled(head, 4 * half + j);
            *reinterpret_cast<uint4*>(smem.query[0] + at) = make_uint4(high[0], high[1], high[2], high[3]);
            if (kIsExact) {
                *reinterpret_cast<uint4*>(smem.query[kIsExact] + at) =
                    make_uint4(low[0], low[1], low[2], low[3]);
            }
        }
        if (half == 0) {
            smem.weight[head] = is_head ? p.weight[row * p.weight_stride + head] * power : 0.0f;
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }

    template <bool kAdds>
    __device__ __forceinline__ void multiply(float (&d)[kHeads / 2], const KeyPart& part,
                                             uint64_t query) const {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const uint4& upper = part.word[0][step / 2];
            const uint4& lower = part.word[1][step / 2];
            const int first = step % 2 * 2;
            const uint64_t b = advanced(query, step * 32);
            if (kAdds || step > 0) {
                wgmma_e4m3<true>(d, word_of(upper, first), word_of(lower, first),
                                 word_of(upper, first + 1), word_of(lower, first + 1), b);
            } else {
                wgmma_e4m3<false>(d, word_of(upper, first), word_of(lower, first),
                                  word_of(upper, first + 1), word_of(lower, first + 1), b);
            }
        }
    }

    __device__ __forceinline__ void score(const KeyPart& part, int tile, int page, uint64_t query,
                                          const float2 (&weight)[kHeads / 8]) const {
        float d[kHeads / 2];
        wgmma_begin();
        if (kIsExact) {
            multiply<false>(d, part, advanced(query, kHeads * kWidth));
            multiply<true>(d, part, query);
        } else {
            multiply<false>(d, part, query);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep(d);
        float sum[2] = {};
#pragma unroll
        for (int j = 0; j < kHeads / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sum[i] = fmaf(fmaxf(d[4 * j + 2 * i], 0.0f), weight[j].x, sum[i]);
                sum[i] = fmaf(fmaxf(d[4 * j + 2 * i + 1], 0.0f), weight[j].y, sum[i]);
            }
        }
        const bool is_second = lane & 1;
        float total = is_second ? sum[1] : sum[0];
        total += __shfl_xor_sync(kAll, is_second ? sum[0] : sum[1], 1);
        total += __shfl_xor_sync(kAll, total, 2);
        const int position = tile * kTile + warp * kWarpRows + own_row();
        if ((lane & 2) == 0 && position < length) {
            p.scores[row * p.score_stride + position] =
                page < 0 ? -INFINITY : total * part.scale;
        }
    }

    // Tiles [first, last) of a row.
    __device__ void run(int new_row, int first, int last) {
        row = new_row;
        length = smem.length[row];
        end = last;
        id_base = first;
        ids = load_ids(first);
        next_ids = load_ids(first + kWarp);
        __syncthreads();  // all have finished with the row before
        if (warp == 0) {
            for (int i = 0; i < kStages && first + i < last; ++i) {
                copy(first + i, page_of(first + i), (stage + i) % kStages);
            }
        }
        store_query();
        __syncthreads();
        float2 weight[kHeads / 8];
#pragma unroll
        for (int j = 0; j < kHeads / 8; ++j) {
            weight[j] = *reinterpret_cast<const float2*>(smem.weight + 8 * j + lane % 4 * 2);
        }
        const uint64_t query = descriptor_along_rows(address_of(smem.query[0]));
        for (int tile = first; tile < last; ++tile) {
            if (tile - id_base == kWarp) {
                id_base = tile;
                ids = next_ids;
                next_ids = load_ids(tile + kWarp);
            }
            const int page = page_of(tile);
            const int ahead = tile + kStages - id_base;  // of the tile to be copied next
            const int in_ids = __shfl_sync(kAll, ids, ahead % kWarp);
            const int in_next = __shfl_sync(kAll, next_ids, ahead % kWarp);
            KeyPart part;
            wait_for(&smem.full[stage], parity);
            take(part);
            __syncthreads();  // all have taken theirs
            if (warp == 0 && tile + kStages < last) {
                copy(tile + kStages, ahead < kWarp ? in_ids : in_next, stage);
            }
            if (++stage == kStages) {
                stage = 0;
                parity ^= 1;
            }
            score(part, tile, page, query, weight);
        }
    }
};

// Lengths as they count, and each row's first tile. All threads; four rows each.
template <class Smem>
__device__ __forceinline__ void deal(const IndexParams& p, Smem& smem) {
    constexpr int kRows = kMaxBatch / kThreads;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int first = threadIdx.x * kRows;
    int tiles[kRows];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        int64_t length = 0;
        if (first + i < p.batch) {
            length = p.lengths_are_64 ? static_cast<const int64_t*>(p.lengths)[first + i]
                                      : static_cast<const int32_t*>(p.lengths)[first + i];
        }
        const int counted = static_cast<int>(max(int64_t{0}, min(length, int64_t{p.room})));
        smem.length[first + i] = counted;
        tiles[i] = sum;
        sum += (counted + kTile - 1) / kTile;
    }
    int before = sum;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const int lower = __shfl_up_sync(kAll, before, offset);
        before += lane >= offset ? lower : 0;
    }
    if (lane == kWarp - 1) {
        smem.sum_of_warp[warp] = before;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kThreads / kWarp; ++i) {
        before += i < warp ? smem.sum_of_warp[i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        smem.first_tile[first + i] = before - sum + tiles[i];
    }
    if (threadIdx.x == kThreads - 1) {
        smem.first_tile[kMaxBatch] = before;
    }
    __syncthreads();
}

// -inf from each row's length on.
template <class Smem>
__device__ __forceinline__ void fill_behind(const IndexParams& p, const Smem& smem) {
    const int parts = (p.num_columns + kFillColumns - 1) / kFillColumns;
    for (int unit = blockIdx.x; unit < p.batch * parts; unit += gridDim.x) {
        const int row = unit / parts;
        const int begin = unit % parts * kFillColumns;
        const int end = min(begin + kFillColumns, p.num_columns);
        for (int i = max(begin, smem.length[row]) + threadIdx.x; i < end; i += kThreads) {
            p.scores[row * p.score_stride + i] = -INFINITY;
        }
    }
}

template <int kHeads, bool kIsExact, int kStages, int kCtas>
__global__ void __launch_bounds__(kThreads, kCtas)
    index_logits_kernel(const __grid_constant__ IndexParams p) {
    extern __shared__ __align__(1024) char smem_raw[];
    auto& smem = *reinterpret_cast<IndexSmem<kHeads, kIsExact, kStages>*>(smem_raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(&smem.full[i]);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    deal(p, smem);
    const int64_t total = smem.first_tile[kMaxBatch];
    int begin = static_cast<int>(total * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
    int row = 0;
    for (int step = kMaxBatch / 2; step > 0; step /= 2) {
        row += smem.first_tile[row + step] <= begin ? step : 0;
    }
    RowScorer<kHeads, kIsExact, kStages> scorer = {p, smem, static_cast<int>(threadIdx.x % kWarp),
                                                   static_cast<int>(threadIdx.x / kWarp), 0, 0};
    while (begin < end) {
        const int first = smem.first_tile[row];
        const int stop = min(end, smem.first_tile[row + 1]);
        if (begin < stop) {
            scorer.run(row, begin - first, stop - first);
            begin = stop;
        }
        ++row;
    }
    fill_behind(p, smem);
}

constexpr int kStages = 2;
constexpr int kCtas = 5;  // on a processor

struct Variant {
    void (*kernel)(const IndexParams);
    int smem_bytes;
};

template <int kHeads, bool kIsExact>
Variant make() {
    return {index_logits_kernel<kHeads, kIsExact, kStages, kCtas>,
            static_cast<int>(sizeof(IndexSmem<kHeads, kIsExact, kStages>))};
}

Variant choose(int num_heads, bool is_exact) {
    if (num_heads <= 32) {
        return is_exact ? make<32, true>() : make<32, false>();
    }
    return is_exact ? make<64, true>() : make<64, false>();
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device.
int tidepool_prepare() {
    using namespace tidepool;
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 4 && error == cudaSuccess; ++i) {
        const Variant variant = choose(i % 2 == 0 ? 32 : 64, i < 2);
        error = cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     variant.smem_bytes);
        if (error == cudaSuccess) {
            error = cudaFuncSetAttribute(variant.kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                         cudaSharedmemCarveoutMaxShared);
        }
    }
    return error;
}

int tidepool_index_logits(const tidepool::IndexParams* p, int is_exact, int num_processors,
                          cudaStream_t stream) {
    using namespace tidepool;
    const Variant variant = choose(p->num_heads, is_exact != 0);
    const int64_t tiles = int64_t{p->batch} * ((p->num_columns + kTile - 1) / kTile);
    const int64_t resident = int64_t{num_processors} * kCtas;
    const int num_ctas = static_cast<int>(tiles < resident ? tiles : resident);
    variant.kernel<<<num_ctas, kThreads, variant.smem_bytes, stream>>>(*p);
    return cudaGetLastError();
}

}  // extern "C"
