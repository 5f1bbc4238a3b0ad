// Storing rows and indexer keys in their layouts, and copying rows of all layers between pools
// (a plain C interface, called through ctypes).
//
// | kernel                  | a warp does                        | written                     |
// |-------------------------|------------------------------------|-----------------------------|
// | store_rows_kernel       | packs one token's KV row           | rows[slot]                  |
// | store_index_keys_kernel | packs one token's indexer key      | pages[slot / page_size]     |
// | copy_rows_kernel        | moves rows (layer, pair), strided  | target[layer][target row]   |
//
// Slots and rows outside their pool are skipped: the CPU reference raises, a kernel cannot.
// No kernel allocates or synchronises with the host. Launchers return a cudaError_t.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "transfer_item.cuh"

namespace tidepool {

constexpr int kStoreThreads = 128;
constexpr int kCopyRowsThreads = 512;
constexpr int kFp8Block = 128;
constexpr float kE4m3Max = 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr float kAmaxLimit = 3.0e38f;

enum Float : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum RowKind : int32_t { kRowBf16 = 0, kRowFp8 = 1, kRowFp32 = 2 };

// kernels/cuda_rows.py mirrors these structs: 8-byte members first.
struct StoreRowsParams {
    const void* latent;      // [T, C], rows latent_stride values apart
    const void* rope;        // [T, R], rows rope_stride values apart
    const int64_t* slots;    // [T], -1 = skip
    char* rows;              // [N, row bytes]; written
    int64_t latent_stride;
    int64_t rope_stride;
    int64_t row_stride;      // bytes between rows
    int64_t num_rows;        // N
    int64_t num_tokens;      // T
    int32_t latent_dim;      // C
    int32_t rope_dim;        // R
    int32_t latent_float;    // Float
    int32_t rope_float;      // Float
    int32_t row_kind;        // RowKind
};

struct StoreKeysParams {
    const void* key;         // [T, D], rows key_stride values apart
    const int64_t* slots;    // [T], -1 = skip
    char* pages;             // [P, page bytes]; written
    int64_t key_stride;
    int64_t page_stride;     // bytes between pages
    int64_t num_slots;       // P * page size
    int64_t num_tokens;      // T
    int32_t key_dim;         // D
    int32_t key_float;       // Float
    int32_t page_size;
    int32_t is_fp8;          // else fp32
};

struct CopyRowsParams {
    const char* source;          // [L, N, X]
    char* target;                // [L, M, X]; written
    const int64_t* source_rows;  // [T], -1 = skip
    const int64_t* target_rows;  // [T], -1 = skip
    int64_t source_layer_stride;  // bytes, as all strides here
    int64_t source_row_stride;
    int64_t target_layer_stride;
    int64_t target_row_stride;
    int64_t num_source_rows;     // N
    int64_t num_target_rows;     // M
    int64_t row_bytes;           // X
    int64_t num_pairs;           // T
    int64_t num_layers;          // L
};

__device__ __forceinline__ float load_float(const void* values, int64_t at, int32_t kind) {
    if (kind == kBfloat16) {
        return __bfloat162float(static_cast<const __nv_bfloat16*>(values)[at]);
    }
    if (kind == kFloat16) {
        return __half2float(static_cast<const __half*>(values)[at]);
    }
    return static_cast<const float*>(values)[at];
}

// Largest magnitude in the warp, floored; NaN if any value is NaN, as torch's amax.
__device__ __forceinline__ float warp_amax(float amax, bool has_nan) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, offset));
    }
    amax = fminf(fmaxf(amax, kAmaxFloor), kAmaxLimit);
    return __any_sync(kFullMask, has_nan) ? __int_as_float(0x7fc00000) : amax;
}

__device__ __forceinline__ uint8_t to_e4m3(float value, float scale) {
    const float scaled = __fdiv_rn(value, scale);
    return static_cast<uint8_t>(__nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3));
}

// Stores `count` values as bf16 or fp32.
__device__ __forceinline__ void store_plain(const void* values, int64_t first, int32_t kind,
                                            int count, char* to, bool is_fp32, int lane) {
    for (int i = lane; i < count; i += kWarpSize) {
        const float value = load_float(values, first + i, kind);
        if (is_fp32) {
            reinterpret_cast<float*>(to)[i] = value;
        } else {
            reinterpret_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(value);
        }
    }
}

__global__ void __launch_bounds__(kStoreThreads)
    store_rows_kernel(const __grid_constant__ StoreRowsParams p) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t token = (int64_t{blockIdx.x} * kStoreThreads + threadIdx.x) / kWarpSize;
    if (token >= p.num_tokens) {
        return;
    }
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_rows) {
        return;
    }
    char* row = p.rows + slot * p.row_stride;
    const int64_t latent = token * p.latent_stride;
    const int64_t rope = token * p.rope_stride;
    if (p.row_kind != kRowFp8) {
        const bool is_fp32 = p.row_kind == kRowFp32;
        store_plain(p.latent, latent, p.latent_float, p.latent_dim, row, is_fp32, lane);
        store_plain(p.rope, rope, p.rope_float, p.rope_dim, row + p.latent_dim * (is_fp32 ? 4 : 2),
                    is_fp32, lane);
        return;
    }
    constexpr int kValues = kFp8Block / kWarpSize;
    float* scales = reinterpret_cast<float*>(row + p.latent_dim);
    const int num_blocks = p.latent_dim / kFp8Block;
    for (int block = 0; block < num_blocks; ++block) {
        float value[kValues];
        float amax = 0.0f;
        bool has_nan = false;
        const int first = block * kFp8Block + lane * kValues;
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            value[v] = load_float(p.latent, latent + first + v, p.latent_float);
            has_nan |= isnan(value[v]);
            amax = fmaxf(amax, fabsf(value[v]));
        }
        const float scale = __fdiv_rn(warp_amax(amax, has_nan), kE4m3Max);
        uint32_t word = 0;
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
            word |= uint32_t{to_e4m3(value[v], scale)} << (8 * v);
        }
        *reinterpret_cast<uint32_t*>(row + first) = word;
        if (lane == 0) {
            scales[block] = scale;
        }
    }
    store_plain(p.rope, rope, p.rope_float, p.rope_dim, row + p.latent_dim + 4 * num_blocks, false,
                lane);
}

__global__ void __launch_bounds__(kStoreThreads)
    store_index_keys_kernel(const __grid_constant__ StoreKeysParams p) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t token = (int64_t{blockIdx.x} * kStoreThreads + threadIdx.x) / kWarpSize;
    if (token >= p.num_tokens) {
        return;
    }
    const int64_t slot = p.slots[token];
    if (slot < 0 || slot >= p.num_slots) {
        return;
    }
    char* page = p.pages + slot / p.page_size * p.page_stride;
    const int64_t offset = slot % p.page_size;
    const int64_t first = token * p.key_stride;
    if (!p.is_fp8) {
        store_plain(p.key, first, p.key_float, p.key_dim, page + offset * p.key_dim * 4, true,
                    lane);
        return;
    }
    float amax = 0.0f;
    bool has_nan = false;
    for (int i = lane; i < p.key_dim; i += kWarpSize) {
        const float value = load_float(p.key, first + i, p.key_float);
        has_nan |= isnan(value);
        amax = fmaxf(amax, fabsf(value));
    }
    const float scale = __fdiv_rn(warp_amax(amax, has_nan), kE4m3Max);
    uint8_t* payload = reinterpret_cast<uint8_t*>(page + offset * p.key_dim);
    for (int i = lane; i < p.key_dim; i += kWarpSize) {
        payload[i] = to_e4m3(load_float(p.key, first + i, p.key_float), scale);
    }
    if (lane == 0) {
        reinterpret_cast<float*>(page + int64_t{p.page_size} * p.key_dim)[offset] = scale;
    }
}

// Items (layer, pair) as one list, layer by layer, dealt to the warps of the grid one by one. A
// lane fetches the addresses of one of the warp's next 32 items.
__global__ void __launch_bounds__(kCopyRowsThreads)
    copy_rows_kernel(const __grid_constant__ CopyRowsParams p) {
    constexpr int kWarps = kCopyRowsThreads / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_warps = int64_t{gridDim.x} * kWarps;
    const int64_t first = threadIdx.x / kWarpSize * int64_t{gridDim.x} + blockIdx.x;
    const int64_t total = p.num_layers * p.num_pairs;
#pragma unroll 1
    for (int64_t base = first; base < total; base += num_warps * kWarpSize) {
        const int64_t item = base + lane * num_warps;
        uint64_t from = 0;
        uint64_t to = 0;
        if (item < total) {
            const int64_t layer = item / p.num_pairs;
            const int64_t pair = item % p.num_pairs;
            const int64_t source = p.source_rows[pair];
            const int64_t target = p.target_rows[pair];
            if (source >= 0 && source < p.num_source_rows && target >= 0 &&
                target < p.num_target_rows) {
                from = reinterpret_cast<uint64_t>(p.source) + layer * p.source_layer_stride +
                       source * p.source_row_stride;
                to = reinterpret_cast<uint64_t>(p.target) + layer * p.target_layer_stride +
                     target * p.target_row_stride;
            }
        }
        const int64_t left = (total - base + num_warps - 1) / num_warps;
        const int count = left < kWarpSize ? static_cast<int>(left) : kWarpSize;
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const uint64_t source = __shfl_sync(kFullMask, from, i);
            const uint64_t target = __shfl_sync(kFullMask, to, i);
            if (target != 0) {
                transfer_item_warp(reinterpret_cast<const char*>(source),
                                   reinterpret_cast<char*>(target), p.row_bytes, lane);
            }
        }
    }
}

template <class Kernel, class Params>
int launch(Kernel kernel, int64_t num_ctas, int threads, cudaStream_t stream, const Params& p) {
    kernel<<<static_cast<unsigned>(num_ctas), threads, 0, stream>>>(p);
    return cudaGetLastError();
}

inline int64_t store_ctas(int64_t num_tokens) {
    constexpr int kTokens = kStoreThreads / kWarpSize;
    return (num_tokens + kTokens - 1) / kTokens;
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// Loads every kernel on the current device, so that a first launch may be inside a graph capture.
int tidepool_prepare() {
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, tidepool::store_rows_kernel);
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, tidepool::store_index_keys_kernel);
    }
    return error == cudaSuccess ? cudaFuncGetAttributes(&attributes, tidepool::copy_rows_kernel)
                                : error;
}

int tidepool_store_rows(const tidepool::StoreRowsParams* p, cudaStream_t stream) {
    using namespace tidepool;
    return launch(store_rows_kernel, store_ctas(p->num_tokens), kStoreThreads, stream, *p);
}

int tidepool_store_index_keys(const tidepool::StoreKeysParams* p, cudaStream_t stream) {
    using namespace tidepool;
    return launch(store_index_keys_kernel, store_ctas(p->num_tokens), kStoreThreads, stream, *p);
}

int tidepool_copy_rows(const tidepool::CopyRowsParams* p, int num_ctas, cudaStream_t stream) {
    using namespace tidepool;
    return launch(copy_rows_kernel, num_ctas, kCopyRowsThreads, stream, *p);
}

}  // extern "C"
