// Arguments of the swap-in kernels. kernels/cuda_swap_in.py mirrors these structs with ctypes: keep
// the order of the fields and use only 8-byte and 4-byte members, pointers first.
//
// Sizes: B batch rows, K selected positions, S seats, P pages of a sequence, C positions of a
// sequence, H hot rows, R ring rows, N host rows of one layer, M device rows of one layer
// (seat s owns [s * (H + R), (s + 1) * (H + R))).
#pragma once

#include <cstdint>

namespace tidepool {

constexpr int kFaultPosition = 1;  // position < -1, past the end, or older than the ring holds
constexpr int kFaultHole = 2;      // a miss whose page has no host page
constexpr int kFaultFull = 4;      // more distinct misses than slots that this step does not use
constexpr int kFaultSeat = 8;      // the row's seat is not below S

constexpr int kMaxTopk = 2048;
constexpr int kMaxHotRows = 16384;
constexpr int kMaxBatch = 512;

struct ResolveParams {
    const int32_t* topk_idx;    // [B, K] positions, -1 = none
    const void* seq_lens;       // [B] int32 or int64
    const void* seats;          // [B] int32 or int64, -1 = padded row
    const int32_t* page_table;  // [S, P] host page, -1 = hole
    const int32_t* ring_start;  // [S] first position of the ring
    int32_t* position_of_slot;  // [S, H] -1 = empty; read and written
    int32_t* slot_of_position;  // [S, C] -1 = not resident; read and written
    int32_t* last_use;          // [S, H] step of the last use; read and written
    const int32_t* step;        // [1] the current step
    int32_t* hot_idx;           // [B, K] device row or -1; written
    int64_t* miss_host_slot;    // [B, K] first num_misses written
    int64_t* miss_device_row;   // [B, K] first num_misses written
    int32_t* num_misses;        // [B] written
    int32_t* fault;             // [B] kFault* flags; written
    const float* scores;        // [B, W] newest index scores, or null: LRU
    int32_t batch;              // B
    int32_t topk;               // K, 1 .. kMaxTopk
    int32_t num_seats;          // S
    int32_t hot_rows;           // H, 1 .. kMaxHotRows
    int32_t num_positions;      // C
    int32_t num_pages;          // P
    int32_t page_shift;         // log2 of the tokens a host page
    int32_t ring_rows;          // R
    int32_t seq_lens_are_64;    // seq_lens is int64
    int32_t seats_are_64;       // seats is int64
    int32_t rank_shift;   // log2 of the CTAs a batch row: each resolves it, they share the copy
    int32_t copy_warps;   // warps of a CTA that copy
    int32_t sort_misses;  // list misses by ascending host slot where they do not come so
    int32_t is_eager;     // load what misses need before it is known that there are any
    int32_t num_scores;   // W; positions behind have no score
    int32_t score_stride;  // floats from one row of scores to the next
};

// Where the rows of one layer are. Plain rows: row i at i * value_bytes. Paged rows (DeepSeek-V4):
// row i = (page, offset); value at page * page_bytes + offset * value_bytes, scale at
// page * page_bytes + scale_offset + offset * scale_bytes.
struct CopyParams {
    const char* host;         // N rows, pinned and mapped
    char* device;             // M rows; written
    int64_t num_host_rows;    // N
    int64_t num_device_rows;  // M
    int64_t value_bytes;      // bytes of a row, or of its value
    int64_t page_bytes;       // 0 = plain rows
    int64_t scale_offset;     // paged rows only
    int32_t scale_bytes;      // paged rows only: 8
    int32_t page_shift;       // paged rows only
};

// A plan to execute: what `resolve` left behind.
struct PlanParams {
    const int64_t* miss_host_slot;   // [B, K]
    const int64_t* miss_device_row;  // [B, K]
    const int32_t* num_misses;       // [B]
    int32_t batch;                   // B, 1 .. kMaxBatch
    int32_t topk;                    // K
};

}  // namespace tidepool
