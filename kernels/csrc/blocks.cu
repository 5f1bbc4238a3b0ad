// Copying blocks of memory, many a launch, between any addresses that the device can reach: its own
// memory, a peer's, pinned host memory (a plain C interface, called through ctypes).
//
// | what               | copies by                     | used for                                  |
// |--------------------|-------------------------------|-------------------------------------------|
// | copy_blocks_kernel | warps, kTileBytes at a time   | many small blocks, peers over NVLink      |
// | copy engine        | one batched memcpy            | large blocks: takes no processor          |
//
// No launcher synchronises with the host. Launchers return a cudaError_t.
#include <cuda_runtime.h>

#include <cstdint>

#include "transfer_item.cuh"

namespace tidepool {

constexpr int kBlocksThreads = 512;
constexpr int64_t kTileBytes = 8192;

// kernels/copy_blocks.py mirrors this struct.
struct CopyBlocksParams {
    const int64_t* blocks;  // [3, N]: source addresses, target addresses, bytes
    int64_t num_blocks;     // N
    int64_t max_bytes;      // of the largest block
};

__global__ void __launch_bounds__(kBlocksThreads)
    copy_blocks_kernel(const __grid_constant__ CopyBlocksParams p) {
    constexpr int kWarps = kBlocksThreads / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_tiles = (p.max_bytes + kTileBytes - 1) / kTileBytes;
    const int64_t total = num_tiles * p.num_blocks;
    const int64_t step = int64_t{gridDim.x} * kWarps;
    const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
#pragma unroll 1
    for (int64_t tile = warp; tile < total; tile += step) {
        const int64_t block = tile / num_tiles;
        const int64_t offset = tile % num_tiles * kTileBytes;
        const int64_t bytes = p.blocks[2 * p.num_blocks + block] - offset;
        if (bytes > 0) {
            const char* source = reinterpret_cast<const char*>(p.blocks[block]) + offset;
            char* target = reinterpret_cast<char*>(p.blocks[p.num_blocks + block]) + offset;
            transfer_item_warp(source, target, bytes < kTileBytes ? bytes : kTileBytes, lane);
        }
    }
}

}  // namespace tidepool

extern "C" {

const char* tidepool_error_string(int error) {
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int tidepool_prepare() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, tidepool::copy_blocks_kernel);
}

int tidepool_copy_blocks(const tidepool::CopyBlocksParams* p, int num_ctas, cudaStream_t stream) {
    tidepool::copy_blocks_kernel<<<num_ctas, tidepool::kBlocksThreads, 0, stream>>>(*p);
    return cudaGetLastError();
}

// The copy engine: one call for all blocks where the runtime has it, else one for each.
int tidepool_copy_blocks_engine(void* const* targets, const void* const* sources,
                                const size_t* bytes, size_t num_blocks, cudaStream_t stream) {
#if CUDART_VERSION >= 13000
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    return cudaMemcpyBatchAsync(targets, sources, bytes, num_blocks, &attributes, &first, 1,
                                stream);
#else
    for (size_t i = 0; i < num_blocks; ++i) {
        const cudaError_t error =
            cudaMemcpyAsync(targets[i], sources[i], bytes[i], cudaMemcpyDefault, stream);
        if (error != cudaSuccess) {
            return error;
        }
    }
    return cudaSuccess;
#endif
}

}  // extern "C"
