// Moving rows with one warp: every 16-byte load of a row is in flight before its first store.
#pragma once

#include <cstdint>

#include "params.h"

namespace tidepool {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kRowsInFlight = 2;  // rows of a warp whose loads are in flight together
constexpr int kWordsALane = 3;    // 16-byte words a lane of a row on the fast path

// Host rows are read once and never written while a kernel reads them: keep them out of L1.
__device__ __forceinline__ uint4 load_once(const uint4* source) {
#if defined(__CUDA_ARCH__)
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
    return value;
#else
    return *source;
#endif
}

__device__ __forceinline__ void store(uint4* target, uint4 value) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
#else
    *target = value;
#endif
}

// `count` words of one row, 4 a lane in flight.
template <class Word>
__device__ __forceinline__ void transfer_words(const char* source, char* target, int64_t count,
                                               int lane) {
    constexpr int kUnroll = 4;
    const Word* from = reinterpret_cast<const Word*>(source);
    Word* to = reinterpret_cast<Word*>(target);
#pragma unroll 1
    for (int64_t base = lane; base < count; base += kUnroll * kWarpSize) {
        Word word[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (base + u * kWarpSize < count) {
                word[u] = from[base + u * kWarpSize];
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (base + u * kWarpSize < count) {
                to[base + u * kWarpSize] = word[u];
            }
        }
    }
}

// One row of any size at any address. 16-byte words, an 8-byte word and 1 to 7 bytes behind them
// where both addresses are multiples of 16; 8-byte words and a tail where they are multiples of 8;
// else 4-byte words or bytes, right though slow.
__device__ __forceinline__ void transfer_item_warp(const char* source, char* target, int64_t bytes,
                                                   int lane) {
    const uint64_t low_bits =
        reinterpret_cast<uint64_t>(source) | reinterpret_cast<uint64_t>(target);
    const int64_t whole = (low_bits & 7) == 0   ? bytes & ~int64_t{7}
                          : (low_bits & 3) == 0 ? bytes & ~int64_t{3}
                                                : bytes;
    const bool has_tail = lane < bytes - whole;
    const char tail = has_tail ? source[whole + lane] : char{0};
    if ((low_bits & 15) == 0) {
        const bool has_half = (bytes & 8) != 0 && lane == kWarpSize - 1;
        const int64_t half_at = bytes & ~int64_t{15};
        const uint2 half =
            has_half ? *reinterpret_cast<const uint2*>(source + half_at) : uint2{0, 0};
        transfer_words<uint4>(source, target, bytes / 16, lane);
        if (has_half) {
            *reinterpret_cast<uint2*>(target + half_at) = half;
        }
    } else if ((low_bits & 7) == 0) {
        transfer_words<uint2>(source, target, bytes / 8, lane);
    } else if ((low_bits & 3) == 0) {
        transfer_words<uint32_t>(source, target, bytes / 4, lane);
    } else {
        transfer_words<char>(source, target, bytes, lane);
    }
    if (has_tail) {
        target[whole + lane] = tail;
    }
}

// Byte offset of a row, and of its scale.
__device__ __forceinline__ int64_t value_offset(const CopyParams& rows, int64_t row) {
    if (rows.page_bytes == 0) {
        return row * rows.value_bytes;
    }
    const int64_t in_page = row & ((int64_t{1} << rows.page_shift) - 1);
    return (row >> rows.page_shift) * rows.page_bytes + in_page * rows.value_bytes;
}

__device__ __forceinline__ int64_t scale_offset(const CopyParams& rows, int64_t row) {
    const int64_t in_page = row & ((int64_t{1} << rows.page_shift) - 1);
    return (row >> rows.page_shift) * rows.page_bytes + rows.scale_offset +
           in_page * rows.scale_bytes;
}

__device__ __forceinline__ bool is_in_range(const CopyParams& rows, longlong2 pair) {
    return static_cast<uint64_t>(pair.x) < static_cast<uint64_t>(rows.num_host_rows) &&
           static_cast<uint64_t>(pair.y) < static_cast<uint64_t>(rows.num_device_rows);
}

// Copies plain rows of up to 96 16-byte words: items first, first + stride, ... below `end`, two at
// a time with all their loads in flight. Item i is the pair items(i) = {host row, device row}; a
// pair out of range is skipped.
template <class Items>
__device__ __forceinline__ void copy_wide_items(const CopyParams& rows, const Items& items,
                                                int first, int stride, int end, int lane) {
    const int num_words = static_cast<int>(rows.value_bytes / 16);
#pragma unroll 1
    for (int base = first; base < end; base += kRowsInFlight * stride) {
        uint4 word[kRowsInFlight][kWordsALane];
        int target[kRowsInFlight];
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
            const int item = base + r * stride;
            const longlong2 pair = item < end ? items(item) : longlong2{-1, -1};
            target[r] = is_in_range(rows, pair) ? static_cast<int>(pair.y) : -1;
            if (target[r] >= 0) {
                const char* from = rows.host + pair.x * rows.value_bytes;
#pragma unroll
                for (int w = 0; w < kWordsALane; ++w) {
                    if (lane + w * kWarpSize < num_words) {
                        word[r][w] =
                            load_once(reinterpret_cast<const uint4*>(from) + lane + w * kWarpSize);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
            if (target[r] >= 0) {
                char* to = rows.device + target[r] * rows.value_bytes;
#pragma unroll
                for (int w = 0; w < kWordsALane; ++w) {
                    if (lane + w * kWarpSize < num_words) {
                        store(reinterpret_cast<uint4*>(to) + lane + w * kWarpSize, word[r][w]);
                    }
                }
            }
        }
    }
}

// One paged row: value and 8 bytes of scale, the scale in flight first.
__device__ __forceinline__ void transfer_paged_item_warp(const CopyParams& rows, longlong2 pair,
                                                         int lane) {
    const bool has_scale = lane == 0;
    uint2 scale = {};
    if (has_scale) {
        scale = *reinterpret_cast<const uint2*>(rows.host + scale_offset(rows, pair.x));
    }
    transfer_item_warp(rows.host + value_offset(rows, pair.x),
                       rows.device + value_offset(rows, pair.y), rows.value_bytes, lane);
    if (has_scale) {
        *reinterpret_cast<uint2*>(rows.device + scale_offset(rows, pair.y)) = scale;
    }
}

// Rows that copy_wide_items can take.
inline bool can_copy_wide(const CopyParams& rows) {
    const uint64_t bits = reinterpret_cast<uint64_t>(rows.host) |
                          reinterpret_cast<uint64_t>(rows.device) |
                          static_cast<uint64_t>(rows.value_bytes);
    return rows.page_bytes == 0 && bits % 16 == 0 &&
           rows.value_bytes <= 16 * kWordsALane * kWarpSize;
}

template <bool kWide, class Items>
__device__ __forceinline__ void copy_items(const CopyParams& rows, const Items& items, int first,
                                           int stride, int end, int lane) {
    if constexpr (kWide) {
        copy_wide_items(rows, items, first, stride, end, lane);
    } else {
#pragma unroll 1
        for (int item = first; item < end; item += stride) {
            const longlong2 pair = items(item);
            if (!is_in_range(rows, pair)) {
                continue;
            }
            if (rows.page_bytes != 0) {
                transfer_paged_item_warp(rows, pair, lane);
            } else {
                transfer_item_warp(rows.host + pair.x * rows.value_bytes,
                                   rows.device + pair.y * rows.value_bytes, rows.value_bytes, lane);
            }
        }
    }
}

}  // namespace tidepool
