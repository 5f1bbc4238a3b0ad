// Shared memory of the resolve and swap-in kernels, in one place.
//
// | part        | bytes          | holds                                                          |
// |-------------|----------------|----------------------------------------------------------------|
// | warp_words  | 16 * 32 * 4    | one word a warp for each block-wide sum in flight              |
// | flags       | 16             | fault flags of the row                                         |
// | used        | H / 8          | one bit a hot slot: used by this step                          |
// | miss_host   | 4 K            | host slot of miss i                                            |
// | scratch     | max(12, 16) K' | hash table + positions, then 64-bit sort keys; K' = K to 2^n   |
// | victim      | 2 K            | hot slot of miss i                                             |
// | bins        | 64 * 4         | slots that may be taken, by score                              |
#pragma once

#include <cstddef>
#include <cstdint>

namespace tidepool {

struct SmemLayout {
    static constexpr int kWarpSlots = 32;
    static constexpr int kWarpRows = 16;
    static constexpr int kBins = 64;

    int sort_size;   // a power of two >= K
    int table_size;  // entries of the hash table
    size_t flags;
    size_t used;
    size_t miss_host;
    size_t scratch;
    size_t victim;
    size_t bins;
    size_t bytes;

    __host__ __device__ constexpr SmemLayout(int topk, int hot_rows)
        : sort_size(power_of_two(topk)),
          table_size(2 * sort_size),
          flags(kWarpRows * kWarpSlots * sizeof(uint32_t)),
          used(flags + 16),
          miss_host(align(used + (hot_rows + 31) / 32 * sizeof(uint32_t))),
          scratch(align(miss_host + topk * sizeof(int32_t))),
          victim(scratch + (table_size + sort_size) * sizeof(int32_t)),
          bins(align(victim + topk * sizeof(uint16_t))),
          bytes(bins + kBins * sizeof(uint32_t)) {}

    __host__ __device__ static constexpr int power_of_two(int at_least) {
        int size = 1;
        while (size < at_least) {
            size *= 2;
        }
        return size;
    }
    __host__ __device__ static constexpr size_t align(size_t offset) {
        return (offset + 15) / 16 * 16;
    }
};

}  // namespace tidepool
