// One batch row of `resolve`: selected positions -> device rows, victims, miss plan.
//
// A row belongs to one CTA, or to `num_ranks` CTAs of a cluster which all compute the same answer
// from the same tables (reading them several times costs less than passing parts of the answer
// around) and then share the copy; rank 0 alone writes tables and outputs, after all have read.
//
// 1. look up    gather slot_of_position; classify: none, ring row, hit (marks its slot), miss
// 2. none missing: write and leave. The usual end of a row.
// 3. first one  where the row is not strictly ascending, a hash table keeps the first of equals
// 4. threshold  the smallest T such that enough slots have key <= T; key = last_use, -1 if the slot
//               is empty, "never" if this step uses it. Exact LRU, found by 4-way search
// 5. victims    all slots below T and the lowest at T, handed to the misses in slot order
// 6. write      tables, hot_idx, plan
//
// Every step is deterministic: no result depends on the order of atomics.
#pragma once

#include <climits>
#include <cstdint>

#include "block_ops.cuh"
#include "params.h"
#include "smem_layout.cuh"

namespace tidepool {

constexpr int kNone = -1;
constexpr int kMiss = -2;
constexpr int kRepeat = -3;
constexpr int kNeverEvict = INT_MAX;

__device__ __forceinline__ int64_t load_index(const void* index, int is_64, int at) {
    return is_64 ? static_cast<const int64_t*>(index)[at] : static_cast<const int32_t*>(index)[at];
}

// kThreads threads; kSlots hot slots a thread, so H <= kThreads * kSlots.
template <int kThreads, int kSlots>
struct RowResolver {
    static constexpr int kWarps = kThreads / kWarpSize;
    static constexpr int kEntries = kMaxTopk / kThreads;  // consecutive top-k entries a thread

    const ResolveParams& p;
    const SmemLayout layout;
    char* const smem;
    const int row;   // b
    const int rank;  // which CTA of the row
    const int tid = threadIdx.x;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;

    int seat;
    int end;               // positions below are valid
    int step;
    int64_t first_row;     // device row of hot slot 0
    const int32_t* page_table;  // [P]
    int32_t* position_of_slot;  // [H]
    int32_t* slot_of_position;  // [C]
    int32_t* last_use;          // [H]
    int position[kEntries];
    int result[kEntries];  // row within the seat, kNone or kMiss
    int miss[kEntries];    // index of the entry's miss in the plan; before: see keep_first
    int key[kSlots];
    unsigned fault = 0;

    __device__ RowResolver(const ResolveParams& params, char* smem_raw, int row, int rank)
        : p(params), layout(params.topk, params.hot_rows), smem(smem_raw), row(row), rank(rank) {}

    template <class T>
    __device__ T* at(size_t offset) const {
        return reinterpret_cast<T*>(smem + offset);
    }
    __device__ WarpWords words(int index) const {
        return {at<uint32_t>(0) + index * SmemLayout::kWarpSlots};
    }
    __device__ uint32_t* used() const { return at<uint32_t>(layout.used); }
    __device__ int32_t* miss_host() const { return at<int32_t>(layout.miss_host); }
    __device__ uint16_t* victim() const { return at<uint16_t>(layout.victim); }

    // Resolves the row; returns the number of misses to copy, which miss_host() and victim() list.
    // `num_host_rows`: rows of the host pool; a host slot past it is a hole.
    __device__ int run(int64_t num_host_rows) {
        load_row();
        __syncthreads();
        if (seat < 0) {
            write_row(0);
            return 0;
        }
        look_up();
        bool is_ascending;
        if (count_candidates(is_ascending) == 0) {
            write_row(0);
            return 0;
        }
        int host_slot[kEntries];
        find_host_slots(num_host_rows, host_slot);
        load_keys();
        if (!is_ascending) {
            keep_first();
        }
        const int num_misses = rank_misses(host_slot, is_ascending);
        cluster_arrive(p.num_ranks);
        const int num_victims = choose_victims(num_misses);
        take_victims(num_victims);
        if (p.sort_misses) {
            sort_plan(num_victims);
        }
        if (num_victims < num_misses) {
            fault |= kFaultFull;
        }
        write_row(num_victims);
        return num_victims;
    }

    __device__ void load_row() {
        for (int word = tid; word < (p.hot_rows + 31) / 32; word += kThreads) {
            used()[word] = 0;
        }
        if (tid == 0) {
            *at<uint32_t>(layout.flags) = 0;
        }
        load_entries(p.topk_idx + static_cast<int64_t>(row) * p.topk);
        const int64_t seat_64 = load_index(p.seats, p.seats_are_64, row);
        const int64_t seq_len = load_index(p.seq_lens, p.seq_lens_are_64, row);
        step = *p.step;
        if (seat_64 >= p.num_seats) {
            fault = kFaultSeat;
        }
        seat = seat_64 < 0 || seat_64 >= p.num_seats ? -1 : static_cast<int>(seat_64);
        end = static_cast<int>(max(int64_t{0}, min(seq_len, int64_t{p.num_positions})));
        first_row = static_cast<int64_t>(seat) * (p.hot_rows + p.ring_rows);
        page_table = p.page_table + static_cast<int64_t>(seat) * p.num_pages;
        position_of_slot = p.position_of_slot + static_cast<int64_t>(seat) * p.hot_rows;
        last_use = p.last_use + static_cast<int64_t>(seat) * p.hot_rows;
        slot_of_position = p.slot_of_position + static_cast<int64_t>(seat) * p.num_positions;
    }

    __device__ void load_entries(const int32_t* topk_idx) {
        if constexpr (kEntries == 4) {
            if (p.topk % 4 == 0 && reinterpret_cast<uint64_t>(p.topk_idx) % 16 == 0) {
                int4 four = {kNone, kNone, kNone, kNone};
                if (tid * 4 < p.topk) {
                    four = reinterpret_cast<const int4*>(topk_idx)[tid];
                }
                position[0] = four.x;
                position[1] = four.y;
                position[2] = four.z;
                position[3] = four.w;
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int k = tid * kEntries + e;
            position[e] = k < p.topk ? topk_idx[k] : kNone;
        }
    }

    __device__ void look_up() {
        const int ring_start = p.ring_start[seat];
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const bool is_valid = position[e] >= 0 && position[e] < end;
            result[e] = is_valid ? slot_of_position[position[e]] : kNone;
        }
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int pos = position[e];
            // Ring positions run from ring_start to ring_start + R - 1.
            const bool is_past = pos >= end || (pos >= ring_start && pos - ring_start >= p.ring_rows);
            if (pos == kNone) {
                result[e] = kNone;
            } else if (pos < 0 || is_past) {
                result[e] = kNone;
                fault |= kFaultPosition;
            } else if (pos >= ring_start) {
                result[e] = p.hot_rows + pos % p.ring_rows;
            } else if (static_cast<unsigned>(result[e]) < static_cast<unsigned>(p.hot_rows)) {
                atomicOr(&used()[result[e] / 32], 1u << (result[e] % 32));
                if (rank == 0) {
                    last_use[result[e]] = step;
                }
            } else {
                result[e] = kMiss;
            }
        }
    }

    // Entries that are not resident, repetitions included; barrier inside.
    __device__ int count_candidates(bool& is_ascending) {
        const int next = __shfl_down_sync(kFullMask, position[0], 1);
        bool is_in_order = true;
        unsigned count = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            int behind = e + 1 < kEntries ? position[(e + 1) % kEntries] : next;
            const int k = tid * kEntries + e;
            if (e + 1 == kEntries && lane == kWarpSize - 1) {
                behind = k + 1 < p.topk
                             ? p.topk_idx[static_cast<int64_t>(row) * p.topk + k + 1]
                             : kNone;
            }
            is_in_order &= behind == kNone || (position[e] != kNone && position[e] < behind);
            count += __popc(__ballot_sync(kFullMask, result[e] == kMiss));
        }
        const bool is_warp_in_order = __all_sync(kFullMask, is_in_order);
        words(0).put(warp, lane, count | (is_warp_in_order ? 0u : 1u << 16));
        note_fault();
        __syncthreads();
        const unsigned total = words(0).total(kWarps, lane);
        is_ascending = total < (1u << 16);
        return static_cast<int>(total & 0xffffu);
    }

    __device__ void note_fault() {
        if (__any_sync(kFullMask, fault != 0)) {
            if (fault != 0) {
                atomicOr(at<uint32_t>(layout.flags), fault);
            }
        }
    }

    __device__ void find_host_slots(int64_t num_host_rows, int (&host_slot)[kEntries]) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int page = position[e] >> p.page_shift;
            host_slot[e] =
                result[e] == kMiss && page < p.num_pages ? page_table[page] : kNone;
        }
        const int in_page = (1 << p.page_shift) - 1;
        const int64_t limit = min(num_host_rows, int64_t{INT_MAX});
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int64_t slot = static_cast<int64_t>(host_slot[e]) << p.page_shift;
            const int offset = position[e] & in_page;
            if (result[e] == kMiss && (host_slot[e] < 0 || slot + offset >= limit)) {
                result[e] = kNone;
                fault |= kFaultHole;
            }
            host_slot[e] = static_cast<int>(slot) | offset;
        }
    }

    __device__ void load_keys() {
        const int first = tid * kSlots;
        const bool is_wide = p.hot_rows % 4 == 0 &&
                             (reinterpret_cast<uint64_t>(p.last_use) |
                              reinterpret_cast<uint64_t>(p.position_of_slot)) % 16 == 0;
        if (is_wide) {
#pragma unroll
            for (int s = 0; s < kSlots; s += 4) {
                int4 use = {kNeverEvict, kNeverEvict, kNeverEvict, kNeverEvict};
                int4 held = {0, 0, 0, 0};
                if (first + s < p.hot_rows) {
                    use = *reinterpret_cast<const int4*>(last_use + first + s);
                    held = *reinterpret_cast<const int4*>(position_of_slot + first + s);
                }
                key[s] = held.x < 0 ? -1 : use.x;
                key[s + 1] = held.y < 0 ? -1 : use.y;
                key[s + 2] = held.z < 0 ? -1 : use.z;
                key[s + 3] = held.w < 0 ? -1 : use.w;
            }
        } else {
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                const bool is_slot = first + s < p.hot_rows;
                key[s] = !is_slot                             ? kNeverEvict
                         : position_of_slot[first + s] < 0 ? -1
                                                              : last_use[first + s];
            }
        }
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int slot = first + s;
            const bool is_used = slot >= p.hot_rows || (used()[slot / 32] >> (slot % 32) & 1u);
            key[s] = is_used || key[s] == step ? kNeverEvict : key[s];
        }
    }

    // Of equal missing positions only the first entry stays a miss; the others become kRepeat.
    // miss: the entry's place in the hash table.
    __device__ void keep_first() {
        int32_t* table = at<int32_t>(layout.scratch);
        int32_t* position_of_entry = table + layout.table_size;
        for (int i = tid; i < layout.table_size; i += kThreads) {
            table[i] = INT_MAX;
        }
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (tid * kEntries + e < p.topk) {
                position_of_entry[tid * kEntries + e] = position[e];
            }
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (result[e] == kMiss) {
                miss[e] = insert(table, position_of_entry, tid * kEntries + e, position[e]);
            }
        }
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (result[e] == kMiss && table[miss[e]] != tid * kEntries + e) {
                result[e] = kRepeat;
            }
        }
    }

    // Puts entry k into the table; of entries with one position the lowest stays. Returns its place.
    __device__ int insert(int32_t* table, const int32_t* position_of_entry, int k, int pos) const {
        unsigned place = static_cast<unsigned>(pos) * 2654435761u >> 16;
        while (true) {
            place &= layout.table_size - 1;
            const int other = atomicCAS(&table[place], INT_MAX, k);
            if (other == INT_MAX) {
                return static_cast<int>(place);
            }
            if (position_of_entry[other] == pos) {
                atomicMin(&table[place], k);
                return static_cast<int>(place);
            }
            ++place;
        }
    }

    // Numbers the misses in the order of the row and lists their host slots; barrier inside.
    __device__ int rank_misses(const int (&host_slot)[kEntries], bool is_ascending) {
        const unsigned lower_lanes = (1u << lane) - 1;
        unsigned count = 0;
        int index = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const unsigned ballot = __ballot_sync(kFullMask, result[e] == kMiss);
            count += __popc(ballot);
            index += __popc(ballot & lower_lanes);
        }
        words(1).put(warp, lane, count);
        publish_keys();
        note_fault();
        __syncthreads();
        index += words(1).before(warp, lane);
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (result[e] == kMiss) {
                if (!is_ascending) {
                    at<int32_t>(layout.scratch)[miss[e]] = index;
                }
                miss_host()[index] = host_slot[e];
                miss[e] = index++;
            }
        }
        return static_cast<int>(words(1).total(kWarps, lane));
    }

    // Counts of empty and of evictable slots, lowest and highest key of the non-empty ones.
    __device__ void publish_keys() {
        unsigned counts = 0;
        int low = INT_MAX;
        int high = -1;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const bool is_evictable = key[s] != kNeverEvict;
            counts += (key[s] < 0 ? 1u : 0u) + (is_evictable ? 1u << 16 : 0u);
            low = key[s] >= 0 ? min(low, key[s]) : low;
            high = is_evictable ? max(high, key[s]) : high;
        }
        words(2).put(warp, lane, warp_sum(counts));
        words(3).put(warp, lane, static_cast<unsigned>(warp_min(low)));
        words(4).put(warp, lane, static_cast<unsigned>(-warp_min(-high)));
    }

    // Lists up to `wanted` victims in slot order and forgets their positions; returns how many.
    // Barriers inside and at the end.
    __device__ int choose_victims(int wanted) {
        const unsigned counts = words(2).total(kWarps, lane);
        const int num_empty = static_cast<int>(counts & 0xffffu);
        const int num_victims = min(wanted, static_cast<int>(counts >> 16));
        int threshold = -1;
        if (num_empty < num_victims) {
            const int low = lane < kWarps ? static_cast<int>(words(3).words[lane]) : INT_MAX;
            const int high = lane < kWarps ? static_cast<int>(words(4).words[lane]) : -1;
            threshold = find_threshold(warp_min(low), -warp_min(-high), num_victims);
        }
        unsigned own = 0;  // slots below the threshold, slots at it << 16
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            own += key[s] < threshold ? 1u : key[s] == threshold ? 1u << 16 : 0u;
        }
        const unsigned inclusive = warp_inclusive_sum(own, lane);
        if (lane == kWarpSize - 1) {
            words(5).words[warp] = inclusive;
        }
        __syncthreads();
        const unsigned before = words(5).before(warp, lane) + inclusive - own;
        const int num_at =
            num_victims - static_cast<int>(words(5).total(kWarps, lane) & 0xffffu);
        list_victims(threshold, before & 0xffffu, before >> 16, num_at);
        __syncthreads();
        return num_victims;
    }

    __device__ void list_victims(int threshold, int num_below, int num_equal, int max_equal) {
        cluster_wait(p.num_ranks);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const bool is_below = key[s] < threshold;
            const bool is_equal = key[s] == threshold;
            if (is_below || (is_equal && num_equal < max_equal)) {
                const int slot = tid * kSlots + s;
                victim()[num_below + min(num_equal, max_equal)] = static_cast<uint16_t>(slot);
                if (rank == 0 && key[s] >= 0) {
                    slot_of_position[position_of_slot[slot]] = kNone;
                }
            }
            num_below += is_below ? 1 : 0;
            num_equal += is_equal ? 1 : 0;
        }
    }

    // Smallest T in [low, high] with count(key <= T) >= wanted, which holds for high.
    __device__ int find_threshold(int low, int high, int wanted) {
        for (int round = 0; low < high; ++round) {
            const int span = high - low;
            const int quarter = span / 4;
            const int rest = span % 4;
            const int first = low + quarter;
            const int second = low + 2 * quarter + rest / 2;
            const int third = low + 3 * quarter + 3 * rest / 4;
            unsigned first_two = 0;
            unsigned last = 0;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                first_two += (key[s] <= first ? 1u : 0u) + (key[s] <= second ? 1u << 16 : 0u);
                last += key[s] <= third ? 1u : 0u;
            }
            const int buffer = 6 + 2 * (round % 2);
            words(buffer).put(warp, lane, warp_sum(first_two));
            words(buffer + 1).put(warp, lane, warp_sum(last));
            __syncthreads();
            first_two = words(buffer).total(kWarps, lane);
            last = words(buffer + 1).total(kWarps, lane);
            if (static_cast<int>(first_two & 0xffffu) >= wanted) {
                high = first;
            } else if (static_cast<int>(first_two >> 16) >= wanted) {
                low = first + 1;
                high = second;
            } else if (static_cast<int>(last) >= wanted) {
                low = second + 1;
                high = third;
            } else {
                low = third + 1;
            }
        }
        return low;
    }

    // Gives each miss its victim slot; rank 0 updates the tables.
    __device__ void take_victims(int num_victims) {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (result[e] == kMiss || result[e] == kRepeat) {
                const bool is_first = result[e] == kMiss;
                const int index = is_first ? miss[e] : at<int32_t>(layout.scratch)[miss[e]];
                result[e] = kNone;
                if (index < num_victims) {
                    const int slot = victim()[index];
                    result[e] = slot;
                    if (is_first && rank == 0) {
                        position_of_slot[slot] = position[e];
                        slot_of_position[position[e]] = slot;
                        last_use[slot] = step;
                    }
                }
            }
        }
    }

    // Sorts the plan by host slot unless it is so already: a bitonic network over 64-bit keys.
    __device__ void sort_plan(int count) {
        bool is_in_order = true;
        for (int i = tid; i + 1 < count; i += kThreads) {
            is_in_order &= miss_host()[i] < miss_host()[i + 1];
        }
        if (__syncthreads_and(is_in_order)) {
            return;
        }
        uint64_t* keys = at<uint64_t>(layout.scratch);
        int size = 2;
        while (size < count) {
            size *= 2;
        }
        for (int i = tid; i < size; i += kThreads) {
            keys[i] = i < count ? static_cast<uint64_t>(miss_host()[i]) << 16 | victim()[i]
                                : ~uint64_t{0};
        }
        for (int block = 2; block <= size; block *= 2) {
            for (int stride = block / 2; stride > 0; stride /= 2) {
                __syncthreads();
                for (int i = tid; i < size / 2; i += kThreads) {
                    const int low = 2 * i - (i & (stride - 1));
                    const uint64_t a = keys[low];
                    const uint64_t b = keys[low + stride];
                    if ((a > b) == ((low & block) == 0)) {
                        keys[low] = b;
                        keys[low + stride] = a;
                    }
                }
            }
        }
        __syncthreads();
        for (int i = tid; i < count; i += kThreads) {
            miss_host()[i] = static_cast<int32_t>(keys[i] >> 16);
            victim()[i] = static_cast<uint16_t>(keys[i] & 0xffffu);
        }
        __syncthreads();
    }

    // Rank 0 writes the outputs of the row. For a padded row: -1 and 0.
    __device__ void write_row(int num_misses) {
        if (rank != 0) {
            return;
        }
        const int64_t row_at = static_cast<int64_t>(row) * p.topk;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const bool is_row = seat >= 0 && result[e] >= 0;
            result[e] = is_row ? static_cast<int>(first_row) + result[e] : kNone;
        }
        write_entries(p.hot_idx + row_at);
        for (int i = tid; i < num_misses; i += kThreads) {
            p.miss_host_slot[row_at + i] = miss_host()[i];
            p.miss_device_row[row_at + i] = first_row + victim()[i];
        }
        if (tid == 0) {
            p.num_misses[row] = num_misses;
            p.fault[row] = static_cast<int>(*at<uint32_t>(layout.flags) | fault);
        }
    }

    __device__ void write_entries(int32_t* hot_idx) {
        if constexpr (kEntries == 4) {
            if (p.topk % 4 == 0 && reinterpret_cast<uint64_t>(p.hot_idx) % 16 == 0) {
                if (tid * 4 < p.topk) {
                    reinterpret_cast<int4*>(hot_idx)[tid] = {result[0], result[1], result[2],
                                                             result[3]};
                }
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int k = tid * kEntries + e;
            if (k < p.topk) {
                hot_idx[k] = result[e];
            }
        }
    }
};

}  // namespace tidepool
