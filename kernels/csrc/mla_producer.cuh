// What brings queries and selected rows into shared memory for sparse_mla.cu.
#pragma once

#include "mla_tile.cuh"

namespace tidepool {

// Starts copying the CTA's heads into panels; heads past the last are zeros.
__device__ __forceinline__ void start_queries(const MlaParams& p, MlaSmem& smem, int b, int head) {
    const int word = threadIdx.x % 8;
    const uint32_t target = shared_address(smem.query);
#pragma unroll
    for (int pass = 0; pass < kHeads * 8 / kConsumers; ++pass) {
        const int h = static_cast<int>(threadIdx.x) / 8 + pass * (kConsumers / 8);
        const bool is_there = head + h < p.num_heads;
        const int64_t row = is_there ? head + h : head;
        const __nv_bfloat16* latent =
            p.q_latent + b * p.latent_stride_b + row * p.latent_stride_h + word * 8;
        const __nv_bfloat16* rope = p.q_rope + b * p.rope_stride_b + row * p.rope_stride_h + word * 8;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
            const __nv_bfloat16* source = panel < kLatent / 64 ? latent + panel * 64 : rope;
            copy_word(target + panel * kPanelBytes + swizzled(h, word),
                      reinterpret_cast<const char*>(source), is_there);
        }
    }
}

// A CTA's selected rows, all of one token.
struct RowsOfOne {
    const MlaParams& p;
    const int32_t* row_idx;
    int num_left;

    // Row `r` of the CTA's t-th tile; -1 if it, or the tile, is not there.
    __device__ __forceinline__ int at(int t, int r) const {
        const int k = t * kTileRows + r;
        return k < num_left ? row_idx[k] : -1;
    }
};

// The same of several tokens. What would take registers is in shared memory.
struct RowsOfMany {
    const MlaParams& p;
    const MlaSmem& smem;

    __device__ __forceinline__ int at(int t, int r) const {
        const int tile = smem.begin + t;
        const int b = token_of(p, tile);
        const int k = (tile - b * p.num_tiles) * kTileRows + r;
        return tile < smem.end && k < p.num_selected ? p.row_idx[b * p.idx_stride_b + k] : -1;
    }
};

__device__ __forceinline__ bool is_there(const MlaParams& p, int row) {
    return row >= 0 && row < p.num_rows;
}

__device__ __forceinline__ const char* address(const MlaParams& p, int row) {
    return p.rows + (is_there(p, row) ? row * p.row_stride : 0);
}

// Brings the CTA's bf16 rows.
template <class Rows>
__device__ __forceinline__ void produce_bf16(MlaSmem& smem, Rows list, int num_tiles) {
    constexpr int kRowsAPass = kProducers / 8;
    constexpr int kPasses = kTileRows / kRowsAPass;
    const int thread = threadIdx.x - kConsumers;
    const int word = thread % 8;
    const int first = thread / 8;
    int next_row[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
        next_row[i] = list.at(0, first + i * kRowsAPass);
    }
    for (int t = 0; t < num_tiles; ++t) {
        const int group = t % kGroups;
        int row[kPasses];
#pragma unroll
        for (int i = 0; i < kPasses; ++i) {
            row[i] = next_row[i];
            next_row[i] = list.at(t + 1, first + i * kRowsAPass);
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if (t >= kGroups) {
                barrier_wait(&smem.empty[group][part], (t / kGroups - 1) % 2);
            }
            const uint32_t tile = shared_address(smem.tile[group]);
            const int base = first_panel(group ^ part);
#pragma unroll
            for (int i = 0; i < kPasses; ++i) {
                const bool has_row = is_there(list.p, row[i]);
                const char* source = address(list.p, row[i]) + word * 16;
                const uint32_t target = tile + swizzled(first + i * kRowsAPass, word);
#pragma unroll
                for (int j = 0; j < kHalfPanels; ++j) {
                    copy_word(target + (base + j) * kPanelBytes,
                              source + (base + j) * kPanelRowBytes, has_row);
                }
                if (part == 0) {
                    copy_word(target + (kPanels - 1) * kPanelBytes,
                              source + (kPanels - 1) * kPanelRowBytes, has_row);
                    if (word == 0) {
                        smem.bias[group][first + i * kRowsAPass] = has_row ? 0.0f : kNone;
                    }
                }
            }
            barrier_arrive_copied(&smem.full[group][part]);
            if (part == 0) {
                barrier_arrive(&smem.biased[group]);
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// An FP8 row: 512 e4m3 values, the float32 scales of its four blocks of 128, 64 bf16 values.
constexpr int kFp8ScaleOffset = kLatent;
constexpr int kFp8RopeOffset = kFp8ScaleOffset + 16;
constexpr int kLine = 128;  // bytes that are asked for at a time
constexpr int kFp8RowBytes = kFp8RopeOffset + 2 * kRope;

// Two of a word's four e4m3 values (bytes 0 and 1, or 2 and 3) as bf16 times 2^-120: their bits in
// place. The permutation repeats each byte's sign above it. e4m3's NaN would become 480; rows that
// this project stores have a NaN scale there.
template <int kPair>
__device__ __forceinline__ __nv_bfloat162 place_bits(uint32_t word) {
    uint32_t spread;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(spread) : "r"(word), "n"(kPair == 0 ? 0x9180 : 0xb3a2));
    spread = spread << 4 & 0x87f087f0u;
    return *reinterpret_cast<__nv_bfloat162*>(&spread);
}

// A scale as the sum of two bf16, which keeps 16 bits of it.
struct SplitScale {
    __nv_bfloat162 high;
    __nv_bfloat162 low;

    __device__ __forceinline__ explicit SplitScale(float scale)
        : high(__float2bfloat162_rn(scale)),
          low(__float2bfloat162_rn(scale - __low2float(high))) {}

    template <int kPair>
    __device__ __forceinline__ uint32_t times(uint32_t word) const {
        const __nv_bfloat162 power = __float2bfloat162_rn(0x1p120f);
        const __nv_bfloat162 value = __hmul2(place_bits<kPair>(word), power);
        const __nv_bfloat162 scaled = __hfma2(value, high, __hmul2(value, low));
        return *reinterpret_cast<const uint32_t*>(&scaled);
    }
};

__device__ __forceinline__ void store_word(char* target, const uint4& value) {
    *reinterpret_cast<uint4*>(target) = value;
}

__device__ __forceinline__ uint4 load_word(const char* source, bool is_there) {
    return is_there ? __ldg(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
}

// FP8 rows, turned into bf16 on the way, asked into the L2 two tiles ahead (bf16 rows are not: there
// the L2's own bandwidth is what is short). 4 threads share a row; a part of it is in their registers: a
// word that was stored makes room for the load of the next part's.
template <class Rows>
struct Fp8Producer {
    MlaSmem& smem;
    Rows list;
    int at;       // row of a tile
    int quarter;
    int row;
    int next_row;
    int ahead;    // row of a tile to come
    uint4 latent[kHalfPanels];  // 16 values of each panel
    uint4 rope[2];
    float2 scale;               // of the part's two blocks

    // Loads latent[j] of a part: the columns of group `half`.
    __device__ __forceinline__ void load_latent(int j, const char* source, bool is_there, int half) {
        latent[j] = load_word(source + (first_panel(half) + j) * 64 + quarter * 16, is_there);
    }

    __device__ __forceinline__ void load_scale(const char* source, bool is_there, int half) {
        const auto* at_scale = reinterpret_cast<const float2*>(source + kFp8ScaleOffset + half * 8);
        scale = is_there ? __ldg(at_scale) : make_float2(0.0f, 0.0f);
    }

    __device__ __forceinline__ void load_rope(const char* source, bool is_there) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            rope[j] = load_word(source + kFp8RopeOffset + (quarter + 4 * j) * 16, is_there);
        }
    }

    __device__ __forceinline__ void store_latent(int j, char* tile, int half,
                                                 const SplitScale& by) const {
        char* panel = tile + (first_panel(half) + j) * kPanelBytes;
        const uint4& w = latent[j];
        store_word(panel + swizzled(at, 2 * quarter),
                   {by.times<0>(w.x), by.times<1>(w.x), by.times<0>(w.y), by.times<1>(w.y)});
        store_word(panel + swizzled(at, 2 * quarter + 1),
                   {by.times<0>(w.z), by.times<1>(w.z), by.times<0>(w.w), by.times<1>(w.w)});
    }

    // Stores a part of tile t and loads what comes behind it: this tile's second part, or the next
    // tile's first.
    template <int kPart>
    __device__ __forceinline__ void move_part(int t) {
        const int group = t % kGroups;
        const int half = group ^ kPart;
        const int behind = kPart == 0 ? row : next_row;
        const bool has_row = is_there(list.p, behind);
        const char* source = address(list.p, behind);
        const int half_behind = kPart == 0 ? group ^ 1 : (t + 1) % kGroups;
        const SplitScale by[2] = {SplitScale(scale.x), SplitScale(scale.y)};
        char* tile = smem.tile[group];
        if (t >= kGroups) {
            barrier_wait(&smem.empty[group][kPart], (t / kGroups - 1) % 2);
        }
        if constexpr (kPart == 0) {
            char* panel = tile + (kPanels - 1) * kPanelBytes;
            store_word(panel + swizzled(at, quarter), rope[0]);
            store_word(panel + swizzled(at, quarter + 4), rope[1]);
            if (quarter == 0) {
                smem.bias[group][at] = has_row ? 0.0f : kNone;
            }
        } else {
            load_rope(source, has_row);
        }
        load_scale(source, has_row, half_behind);
#pragma unroll
        for (int j = 0; j < kHalfPanels; ++j) {
            store_latent(j, tile, half, by[j / 2]);
            load_latent(j, source, has_row, half_behind);
        }
        fence_async();
        barrier_arrive(&smem.full[group][kPart]);
        if (kPart == 0) {
            barrier_arrive(&smem.biased[group]);
        }
    }

    // Asks for the row `ahead`, of the tile before t, and looks up that of tile t.
    __device__ __forceinline__ void look_ahead(int t) {
        if (is_there(list.p, ahead)) {
            const char* source = address(list.p, ahead);
#pragma unroll
            for (int line = 0; line < kFp8RowBytes; line += 4 * kLine) {
                const int byte = line + quarter * kLine;
                if (byte < kFp8RowBytes) {
                    prefetch_line(source + byte);
                }
            }
        }
        ahead = list.at(t, at);
    }

    __device__ __forceinline__ void run(int num_tiles) {
        row = list.at(0, at);
        const bool has_row = is_there(list.p, row);
        const char* source = address(list.p, row);
        load_scale(source, has_row, 0);
        load_rope(source, has_row);
#pragma unroll
        for (int j = 0; j < kHalfPanels; ++j) {
            load_latent(j, source, has_row, 0);
        }
        for (int t = 0; t < num_tiles; ++t) {
            next_row = list.at(t + 1, at);
            move_part<0>(t);
            move_part<1>(t);
            row = next_row;
            look_ahead(t + kTilesAhead + 1);
        }
    }
};

}  // namespace tidepool
