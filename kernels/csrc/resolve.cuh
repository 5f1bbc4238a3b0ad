// One batch row of `resolve`: selected positions -> device rows, victims, miss plan.
//
// A row belongs to one CTA, or to `num_ranks` CTAs of a cluster which all compute the same answer
// from the same tables (reading them several times costs less than passing parts of the answer
// around) and then share the copy; rank 0 alone writes tables and outputs, after all have read.
//
// 1. look up    gather slot_of_position; classify: none, ring row, hit (marks its slot), miss
// 2. none missing: write and leave. The usual end of a row.
// 3. first one  where the row is not strictly ascending, a hash table keeps the first of equals
// 4. threshold  the smallest T such that enough slots have key <= T; lowest for an empty slot, "never"
//               if this step uses it. Without scores key = last_use: exact LRU; the search gallops
//               up from the oldest key, where the answer usually is. With scores key = one of 63
//               even steps from the lowest to the highest score that may go: one histogram
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
constexpr float kMaxScore = 1e30f;        // scores beyond count as this
constexpr float kMinScoreRange = 1e-30f;  // scores closer together count as equal

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
    int end;  // positions below are valid
    int step;
    int64_t first_row;          // device row of hot slot 0
    const int32_t* page_table;  // [P]
    int32_t* position_of_slot;  // [H]
    int32_t* slot_of_position;  // [C]
    int32_t* last_use;          // [H]
    int position[kEntries];
    int behind_last;       // the entry behind the warp's last
    int result[kEntries];  // row within the seat, kNone or kMiss
    int first_miss;        // misses of the row before the thread's entries
    int miss[kEntries];    // index of the entry's miss in the plan; before: see keep_first
    int key[kSlots];
    int held[kSlots];     // position in the slot
    unsigned empty = 0;   // with scores: bits of the thread's empty slots,
    unsigned scored = 0;  // and of those that may be taken
    unsigned fault = 0;
    bool has_arrived = false;  // at the cluster's barrier

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
    __device__ bool by_score() const { return p.scores != nullptr; }

    // Resolves the row; returns the number of misses to copy, which miss_host() and victim() list.
    // `num_host_rows`: rows of the host pool; a host slot past it is a hole.
    __device__ int run(int64_t num_host_rows) {
        load_row();
        __syncthreads();
        if (seat < 0) {
            write_row(0);
            return 0;
        }
        int host_slot[kEntries];
        if (p.is_eager) {
            load_host_pages(host_slot);
            load_slots();
        }
        look_up();
        if (!p.is_eager) {
            note_fault();
            if (!__syncthreads_or(has_miss())) {
                write_row(0);
                return 0;
            }
            load_host_pages(host_slot);
            load_slots();
        }
        find_host_slots(num_host_rows, host_slot);
        note_fault();
        if (!by_score()) {
            publish_lowest_use();
        }
        bool is_ascending;
        int num_misses = count_misses(words(0), is_in_order(), is_ascending);
        if (num_misses == 0) {
            write_row(0);
            return 0;
        }
        if (by_score()) {
            load_scores();
        } else {
            make_keys();
        }
        if (!is_ascending) {
            keep_first();
            bool is_always_true;
            num_misses = count_misses(words(1), true, is_always_true);
        }
        list_misses(host_slot, is_ascending);
        cluster_arrive(p.rank_shift > 0);
        has_arrived = p.rank_shift > 0;
        const int num_victims = choose_victims(num_misses);
        if (rank == 0) {
            take_victims(num_victims);
        }
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
        if (tid < SmemLayout::kBins) {
            at<uint32_t>(layout.bins)[tid] = 0;
        }
        const int32_t* topk_idx = p.topk_idx + static_cast<int64_t>(row) * p.topk;
        load_entries(topk_idx);
        const int behind = tid * kEntries + kEntries;
        behind_last = lane == kWarpSize - 1 && behind < p.topk ? topk_idx[behind] : kNone;
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
        const int ring_at = ring_start % p.ring_rows;  // ring row of ring_start
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int pos = position[e];
            const int in_ring = pos - ring_start;  // 0 .. R - 1 in the ring
            if (pos == kNone) {
                result[e] = kNone;
            } else if (pos < 0 || pos >= end || in_ring >= p.ring_rows) {
                result[e] = kNone;
                fault |= kFaultPosition;
            } else if (in_ring >= 0) {
                const int at = ring_at + in_ring;
                result[e] = p.hot_rows + (at >= p.ring_rows ? at - p.ring_rows : at);
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

    __device__ bool has_miss() const {
        bool has = false;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            has |= result[e] == kMiss;
        }
        return has;
    }

    // Whether the thread's entries and the one behind ascend strictly, kNone only at the end.
    __device__ bool is_in_order() const {
        const int next = __shfl_down_sync(kFullMask, position[0], 1);
        bool is = true;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const int behind = e + 1 < kEntries       ? position[(e + 1) % kEntries]
                               : lane + 1 < kWarpSize ? next
                                                      : behind_last;
            is &= behind == kNone || (position[e] != kNone && position[e] < behind);
        }
        return is;
    }

    // Entries that are misses in the block, and before the thread (first_miss); `all`: whether
    // `each` holds everywhere. Barrier inside.
    __device__ int count_misses(WarpWords buffer, bool each, bool& all) {
        const unsigned lower_lanes = (1u << lane) - 1;
        unsigned count = 0;
        first_miss = 0;
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            const unsigned ballot = __ballot_sync(kFullMask, result[e] == kMiss);
            count += __popc(ballot);
            first_miss += __popc(ballot & lower_lanes);
        }
        buffer.put(warp, lane, count | (__all_sync(kFullMask, each) ? 0u : 1u << 16));
        __syncthreads();
        const unsigned total = buffer.total(kWarps, lane);
        first_miss += static_cast<int>(buffer.before(warp, lane) & 0xffffu);
        all = total < (1u << 16);
        return static_cast<int>(total & 0xffffu);
    }

    __device__ void note_fault() {
        if (__any_sync(kFullMask, fault != 0)) {
            if (fault != 0) {
                atomicOr(at<uint32_t>(layout.flags), fault);
            }
        }
    }

    // Loads that a row with misses waits for: in flight together, used later.
    __device__ void load_host_pages(int (&host_page)[kEntries]) const {
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            host_page[e] = page_table[is_page(e) ? position[e] >> p.page_shift : 0];
        }
    }

    __device__ bool is_page(int e) const {
        return position[e] >= 0 && position[e] >> p.page_shift < p.num_pages;
    }

    // last_use into key, positions into held; anything where the thread has no slot.
    __device__ void load_slots() {
        const int first = tid * kSlots;
        if (p.hot_rows % 4 == 0 && (reinterpret_cast<uint64_t>(p.last_use) |
                                    reinterpret_cast<uint64_t>(p.position_of_slot)) %
                                           16 ==
                                       0) {
#pragma unroll
            for (int s = 0; s < kSlots; s += 4) {
                const int at = first + s < p.hot_rows ? first + s : 0;
                const int4 use = *reinterpret_cast<const int4*>(last_use + at);
                const int4 hold = *reinterpret_cast<const int4*>(position_of_slot + at);
                key[s] = use.x;
                key[s + 1] = use.y;
                key[s + 2] = use.z;
                key[s + 3] = use.w;
                held[s] = hold.x;
                held[s + 1] = hold.y;
                held[s + 2] = hold.z;
                held[s + 3] = hold.w;
            }
            return;
        }
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const int at = first + s < p.hot_rows ? first + s : 0;
            key[s] = last_use[at];
            held[s] = position_of_slot[at];
        }
    }

    __device__ void find_host_slots(int64_t num_host_rows, int (&host_slot)[kEntries]) {
        const int in_page = (1 << p.page_shift) - 1;
        const int64_t limit = min(num_host_rows, int64_t{INT_MAX});
#pragma unroll
        for (int e = 0; e < kEntries; ++e) {
            if (result[e] == kMiss) {
                const int64_t slot =
                    (static_cast<int64_t>(host_slot[e]) << p.page_shift) | (position[e] & in_page);
                if (!is_page(e) || host_slot[e] < 0 || slot >= limit) {
                    result[e] = kNone;
                    fault |= kFaultHole;
                }
                host_slot[e] = static_cast<int>(slot);
            }
        }
    }

    // A lower bound of the keys of slots that are not empty.
    __device__ void publish_lowest_use() {
        int low = kNeverEvict - 1;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            low = held[s] < 0 ? low : min(low, key[s]);
        }
        words(2).put(warp, lane, warp_min(static_cast<unsigned>(max(low, 0))));
    }

    __device__ unsigned used_bits() const {
        static_assert(32 % kSlots == 0, "a thread's bits are in one word");
        const int first = tid * kSlots;
        return first < p.hot_rows ? used()[first / 32] >> (first % 32) : 0u;
    }

    __device__ void make_keys() {
        const int first = tid * kSlots;
        const unsigned used_bits = this->used_bits();
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const bool is_used =
                (used_bits >> s & 1u) != 0 || key[s] == step || first + s >= p.hot_rows;
            const bool is_empty = held[s] < 0 && first + s < p.hot_rows;
            key[s] = is_empty ? -1 : is_used ? kNeverEvict : key[s];
        }
    }

    // Scores of the positions that may be forgotten into key, as they are: in flight until the
    // threshold is searched.
    __device__ void load_scores() {
        const int first = tid * kSlots;
        const unsigned used_bits = this->used_bits();
        const float* scores = p.scores + static_cast<int64_t>(row) * p.score_stride;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const bool is_used =
                (used_bits >> s & 1u) != 0 || key[s] == step || first + s >= p.hot_rows;
            const bool is_empty = held[s] < 0 && first + s < p.hot_rows;
            empty |= is_empty ? 1u << s : 0u;
            if (!is_used && !is_empty) {
                scored |= 1u << s;
                key[s] = __float_as_int(scores[min(held[s], p.num_scores - 1)]);
            }
        }
    }

    // Of equal missing positions only the first entry stays a miss; the others become kRepeat.
    // miss: the entry's place in the hash table.
    __device__ void keep_first() {
        int32_t* table = at<int32_t>(layout.scratch);
        int32_t* position_of_entry = table + layout.table_size;
#pragma unroll 1
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
                miss[e] = insert(table, position_of_entry, tid * kEntries + e, position[e],
                                 layout.table_size);
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

    // Puts entry k into the table; of entries with one position the lowest stays. Returns its
    // place.
    __device__ __noinline__ static int insert(int32_t* table, const int32_t* position_of_entry,
                                              int k, int pos, int table_size) {
        unsigned place = static_cast<unsigned>(pos) * 2654435761u >> 16;
        while (true) {
            place &= table_size - 1;
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

    // Numbers the misses in the order of the row and lists their host slots.
    __device__ void list_misses(const int (&host_slot)[kEntries], bool is_ascending) {
        int index = first_miss;
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
    }

    // Lists up to `wanted` victims in slot order; rank 0 forgets their positions. Returns how many.
    // Barriers inside and at the end.
    __device__ int choose_victims(int wanted) {
        const int threshold = by_score() ? find_score(wanted) : find_last_use(wanted);
        unsigned own = 0;  // slots below the threshold, slots at it << 16
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            own += key[s] < threshold ? 1u : key[s] == threshold ? 1u << 16 : 0u;
        }
        const unsigned inclusive = warp_inclusive_sum(own, lane);
        if (lane == kWarpSize - 1) {
            words(3).words[warp] = inclusive;
        }
        __syncthreads();
        const unsigned before = words(3).before(warp, lane) + inclusive - own;
        const unsigned total = words(3).total(kWarps, lane);
        const int num_below = static_cast<int>(total & 0xffffu);
        const int num_victims = min(wanted, num_below + static_cast<int>(total >> 16));
        list_victims(threshold, before & 0xffffu, before >> 16, num_victims - num_below);
        __syncthreads();
        return num_victims;
    }

    __device__ void list_victims(int threshold, int num_below, int num_equal, int max_equal) {
        int index = num_below + min(num_equal, max_equal);
        unsigned victims = 0;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            const bool is_equal = key[s] == threshold;
            const bool is_victim = key[s] < threshold || (is_equal && num_equal < max_equal);
            num_equal += is_equal ? 1 : 0;
            victims |= is_victim ? 1u << s : 0u;
        }
        if (rank == 0) {
            cluster_wait(p.rank_shift > 0);
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                if ((victims >> s & 1u) != 0 && held[s] >= 0) {
                    slot_of_position[held[s]] = kNone;
                }
            }
        }
#pragma unroll 1
        while (victims != 0) {
            victim()[index++] = static_cast<uint16_t>(tid * kSlots + __ffs(victims) - 1);
            victims &= victims - 1;
        }
    }

    // Smallest T with count(key <= T) >= wanted, or kNeverEvict - 1 if there is none.
    __device__ int find_last_use(int wanted) {
        const unsigned low = lane < kWarps ? words(2).words[lane] : unsigned{kNeverEvict - 1};
        return find_threshold(static_cast<int>(warp_min(low)), wanted);
    }

    // The same by score; turns scores into keys. Barriers inside.
    __device__ int find_score(int wanted) {
        constexpr int kLastStep = SmemLayout::kBins - 2;  // bin 0 counts empty slots
        float low = kMaxScore;
        float high = -kMaxScore;
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            if ((scored >> s & 1u) != 0) {
                const float score = fminf(fmaxf(__int_as_float(key[s]), -kMaxScore), kMaxScore);
                key[s] = __float_as_int(score);
                low = fminf(low, score);
                high = fmaxf(high, score);
            }
        }
        words(4).put(warp, lane, warp_min(ordered_bits(low)));
        words(5).put(warp, lane, warp_min(~ordered_bits(high)));
        __syncthreads();
        low = from_ordered_bits(warp_min(lane < kWarps ? words(4).words[lane] : ~0u));
        high = from_ordered_bits(~warp_min(lane < kWarps ? words(5).words[lane] : ~0u));
        const float range = high - low;
        const float scale = range >= kMinScoreRange ? kLastStep / range : 0.0f;
        uint32_t* bins = at<uint32_t>(layout.bins);
#pragma unroll
        for (int s = 0; s < kSlots; ++s) {
            if ((scored >> s & 1u) != 0) {
                // Added to 2^23, what is rounded are the bits: a conversion takes eight times longer.
                const float step_at = __fmul_rn(__int_as_float(key[s]) - low, scale);
                key[s] = __float_as_int(__fadd_rn(step_at, 0x1p23f)) - __float_as_int(0x1p23f) + 1;
                atomicAdd(&bins[key[s]], 1u);
            } else {
                key[s] = (empty >> s & 1u) != 0 ? 0 : kNeverEvict;
            }
        }
        const unsigned num_empty = warp_sum(__popc(empty));
        if (lane == 0 && num_empty != 0) {
            atomicAdd(&bins[0], num_empty);
        }
        __syncthreads();
        static_assert(SmemLayout::kBins == 2 * kWarpSize, "two bins a lane");
        const unsigned second = bins[2 * lane + 1];
        const int both = static_cast<int>(warp_inclusive_sum(bins[2 * lane] + second, lane));
        const unsigned too_few = ~__ballot_sync(kFullMask, both >= wanted);
        const unsigned first_too_few =
            ~__ballot_sync(kFullMask, both - static_cast<int>(second) >= wanted);
        // Sums ascend: as many bins before the answer as have too few up to them.
        return ~too_few == 0 ? kNeverEvict - 1 : __popc(too_few) + __popc(first_too_few);
    }

    // Smallest T with count(key <= T) >= wanted, or kNeverEvict - 1 if there is none; `low`: not
    // above the lowest key but -1.
    __device__ int find_threshold(int low, int wanted) {
        int high = kNeverEvict - 1;
        int first = -1;
        int second = low;
        int third = min(low, high - 2) + 2;
        for (int round = 0;; ++round) {
            unsigned first_two = 0;
            unsigned last = 0;
#pragma unroll
            for (int s = 0; s < kSlots; ++s) {
                first_two += (key[s] <= first ? 1u : 0u) + (key[s] <= second ? 1u << 16 : 0u);
                last += key[s] <= third ? 1u : 0u;
            }
            const int buffer = 4 + 2 * (round % 2);
            words(buffer).put(warp, lane, warp_sum(first_two));
            words(buffer + 1).put(warp, lane, warp_sum(last));
            __syncthreads();
            first_two = words(buffer).total(kWarps, lane);
            if (static_cast<int>(first_two & 0xffffu) >= wanted) {
                high = first;
                low = round == 0 ? first : low;
            } else if (static_cast<int>(first_two >> 16) >= wanted) {
                low = round == 0 ? second : first + 1;
                high = second;
            } else if (static_cast<int>(words(buffer + 1).total(kWarps, lane)) >= wanted) {
                low = second + 1;
                high = third;
            } else {
                low = third + 1;
            }
            if (low >= high) {
                return high;
            }
            // Unbounded above: steps that grow eightfold; else quarters.
            const int span = high - low;
            const int step_up = 1 << min(3 * round + 2, 28);
            const int quarter = min(span / 4, step_up);
            first = low + quarter;
            second = low + 2 * quarter + (quarter < step_up ? span % 4 / 2 : 0);
            third = low + 3 * quarter + (quarter < step_up ? 3 * (span % 4) / 4 : 0);
        }
    }

    // Gives each miss its victim slot and updates the tables: rank 0.
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
                    if (is_first) {
                        position_of_slot[slot] = position[e];
                        slot_of_position[position[e]] = slot;
                        last_use[slot] = step;
                    }
                }
            }
        }
    }

    // Sorts the plan by host slot unless it is so already.
    __device__ void sort_plan(int count) {
        bool is_in_order = true;
#pragma unroll 1
        for (int i = tid; i + 1 < count; i += kThreads) {
            is_in_order &= miss_host()[i] < miss_host()[i + 1];
        }
        if (__syncthreads_and(is_in_order)) {
            return;
        }
        uint64_t* keys = at<uint64_t>(layout.scratch);
        if (count <= kThreads) {
            sort_by_counting(keys, count);
        } else {
            sort_by_network(keys, count);
        }
        __syncthreads();
#pragma unroll 1
        for (int i = tid; i < count; i += kThreads) {
            miss_host()[i] = static_cast<int32_t>(keys[i] >> 16);
            victim()[i] = static_cast<uint16_t>(keys[i] & 0xffffu);
        }
        __syncthreads();
    }

    __device__ uint64_t sort_key(int i) const {
        return static_cast<uint64_t>(miss_host()[i]) << 16 | victim()[i];
    }

    // Few misses, which is usual: each thread counts the ones below its own.
    __device__ void sort_by_counting(uint64_t* keys, int count) {
        if (tid < count) {
            const int own = miss_host()[tid];
            const int4* four = at<int4>(layout.miss_host);
            int below = 0;
#pragma unroll 4
            for (int i = 0; i < count / 4; ++i) {
                const int4 other = four[i];
                below += (other.x < own) + (other.y < own) + (other.z < own) + (other.w < own);
            }
            for (int i = count / 4 * 4; i < count; ++i) {
                below += miss_host()[i] < own;
            }
            keys[below] = sort_key(tid);
        }
    }

    // Many: a bitonic network, padded to a power of two.
    __device__ void sort_by_network(uint64_t* keys, int count) {
        const int size = SmemLayout::power_of_two(count);
#pragma unroll 1
        for (int i = tid; i < size; i += kThreads) {
            keys[i] = i < count ? sort_key(i) : ~uint64_t{0};
        }
#pragma unroll 1
        for (int block = 2; block <= size; block *= 2) {
#pragma unroll 1
            for (int stride = block / 2; stride > 0; stride /= 2) {
                __syncthreads();
#pragma unroll 1
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
#pragma unroll 1
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
