// How fast does a GPU gather rows of host memory, by kind of memory, span, order and warps in flight?
//
//     nvcc -O2 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o host_memory benchmarks/host_memory.cu
//     ./host_memory KIND GIB
//
// | KIND      | memory                                                                          |
// |-----------|---------------------------------------------------------------------------------|
// | shared    | shared anonymous mmap, registered: what pools use (a memfd is the same memory)  |
// | thp       | private anonymous mmap with huge pages asked for, registered                    |
// | hugetlb   | pages of 2 MiB (echo N > /proc/sys/vm/nr_hugepages first), registered           |
// | hostalloc | cudaHostAlloc                                                                   |
// | numa      | cuMemCreate on host NUMA node 0, mapped in units of 2 MiB                       |
//
// One line a point: median of 6 launches with fresh rows. "cold" points write 256 MiB of device memory
// before each launch, so that nothing of the one before is left in the GPU's caches. Last: what a small
// kernel takes beside a gather, by how many warps gather. No figure is asserted; see
// benchmarks/results/2026-11-20-host-memory.md.
#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int kCalls = 7;  // the first is not counted
constexpr size_t kGiB = size_t{1} << 30;
constexpr size_t kJunkBytes = size_t{256} << 20;
constexpr int kRequestRows = 65536;
constexpr int kMissed = 137;

void check(int code, const char* what) {
    if (code != 0) {
        fprintf(stderr, "%s: error %d\n", what, code);
        exit(1);
    }
}
#define CHECK(call) check(static_cast<int>(call), #call)

__device__ uint4 load_once(const uint4* source) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source));
    return value;
}

// A warp takes two rows at a time, as swap-in does. in_parts: each CTA a stretch of the list; else
// the list is dealt out one by one.
__global__ void __launch_bounds__(512, 2)
    gather(const char* host, char* device, const int64_t* offset, int count, int row, bool in_parts) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int64_t all = count;
    const int first = in_parts ? all * blockIdx.x / gridDim.x + warp : warp * gridDim.x + blockIdx.x;
    const int end = in_parts ? all * (blockIdx.x + 1) / gridDim.x : count;
    const int stride = in_parts ? warps : warps * gridDim.x;
    for (int base = first; base < end; base += 2 * stride) {
        uint4 word[2][3];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int item = base + r * stride;
#pragma unroll
            for (int w = 0; w < 3; ++w) {
                if (item < end && lane + 32 * w < row / 16) {
                    const char* from = host + offset[item];
                    word[r][w] = load_once(reinterpret_cast<const uint4*>(from) + lane + 32 * w);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int64_t item = base + r * stride;
#pragma unroll
            for (int w = 0; w < 3; ++w) {
                if (item < end && lane + 32 * w < row / 16) {
                    reinterpret_cast<uint4*>(device + item * row)[lane + 32 * w] = word[r][w];
                }
            }
        }
    }
}

__global__ void write_all(uint4* target, size_t count, unsigned value) {
    const size_t first = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
    for (size_t i = first; i < count; i += size_t{gridDim.x} * blockDim.x) {
        target[i] = {value, value, value, value};
    }
}

__global__ void spin(long long cycles) {
    for (const long long start = clock64(); clock64() - start < cycles;) {
    }
}

// Each CTA changes 1 KiB somewhere in `room` bytes, as a layer's small kernels do.
__global__ void touch_rows(char* target, size_t room, unsigned salt) {
    uint64_t hash = (blockIdx.x + 1) * 0x9E3779B97F4A7C15ull + salt;
    hash = (hash ^ hash >> 29) * 0xBF58476D1CE4E5B9ull;
    uint4* word = reinterpret_cast<uint4*>(target + hash % (room / 1024) * 1024) + threadIdx.x;
    uint4 value = *word;
    ++value.x;
    *word = value;
}

char* registered(size_t bytes, int flags, bool asks_for_huge) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    if (asks_for_huge) {
        madvise(memory, bytes, MADV_HUGEPAGE);
    }
    std::vector<std::thread> threads;  // to touch it takes one thread seconds
    for (int part = 0; part < 16; ++part) {
        threads.emplace_back([=] {
            for (size_t at = bytes / 16 * part; at < bytes / 16 * (part + 1); at += 4096) {
                static_cast<char*>(memory)[at] = 0;
            }
        });
    }
    for (auto& thread : threads) {
        thread.join();
    }
    CHECK(cudaHostRegister(memory, bytes, 0));
    return static_cast<char*>(memory);
}

template <class Function>
Function driver(const char* name) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    CHECK(cudaGetDriverEntryPointByVersion(name, &found, 13000, cudaEnableDefault, &result));
    return reinterpret_cast<Function>(found);
}

char* on_numa_node(size_t bytes) {
    CUmemAllocationProp prop = {};
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location = {CU_MEM_LOCATION_TYPE_HOST_NUMA, 0};
    CUmemAccessDesc access[2] = {};
    access[0].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access[1].location = prop.location;
    CUmemGenericAllocationHandle handle;
    CUdeviceptr address = 0;
    CHECK(driver<decltype(&cuMemCreate)>("cuMemCreate")(&handle, bytes, &prop, 0));
    CHECK(driver<decltype(&cuMemAddressReserve)>("cuMemAddressReserve")(&address, bytes, kGiB, 0, 0));
    CHECK(driver<decltype(&cuMemMap)>("cuMemMap")(address, bytes, 0, handle, 0));
    for (auto& party : access) {
        party.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        CHECK(driver<decltype(&cuMemSetAccess)>("cuMemSetAccess")(address, bytes, &party, 1));
    }
    return reinterpret_cast<char*>(address);
}

char* allocate(const std::string& kind, size_t bytes) {
    if (kind == "hostalloc") {
        void* memory = nullptr;
        CHECK(cudaHostAlloc(&memory, bytes, cudaHostAllocMapped));
        return static_cast<char*>(memory);
    }
    if (kind == "numa") {
        return on_numa_node(bytes);
    }
    if (kind == "hugetlb") {
        return registered(bytes, MAP_PRIVATE | MAP_HUGETLB, false);
    }
    return registered(bytes, kind == "thp" ? MAP_PRIVATE : MAP_SHARED, kind == "thp");
}

using Lists = std::vector<std::vector<int64_t>>;
std::mt19937_64 rng(1);

Lists random_rows(int count, int row, size_t span, bool sorts) {
    Lists lists(kCalls, std::vector<int64_t>(count));
    for (auto& list : lists) {
        for (auto& offset : list) {
            offset = static_cast<int64_t>(rng() % (span / row)) * row;
        }
        if (sorts) {
            std::sort(list.begin(), list.end());
        }
    }
    return lists;
}

// 64 requests miss 137 rows each of a run of 65,536; call c in layer c % layers.
Lists requests(int row, int layers) {
    Lists lists(kCalls);
    for (int c = 0; c < kCalls; ++c) {
        for (int64_t run = c % layers * 64; run < c % layers * 64 + 64; ++run) {
            for (int i = 0; i < kMissed; ++i) {
                lists[c].push_back((run * kRequestRows + rng() % kRequestRows) * row);
            }
            std::sort(lists[c].end() - kMissed, lists[c].end());
        }
    }
    return lists;
}

struct Bench {
    std::string kind;
    char* host;
    char* device;
    uint4* junk;
    int64_t* offsets;
    cudaStream_t stream;

    void point(const char* what, int row, double gib, const Lists& lists, int grid, int threads,
               bool in_parts, bool is_cold) {
        cudaEvent_t start, end;
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&end));
        const int count = static_cast<int>(lists[0].size());
        std::vector<float> times;
        for (int c = 0; c < kCalls; ++c) {
            CHECK(cudaMemcpy(offsets, lists[c].data(), count * 8, cudaMemcpyHostToDevice));
            CHECK(cudaDeviceSynchronize());
            if (is_cold) {
                write_all<<<264, 512, 0, stream>>>(junk, kJunkBytes / 16, c);
            } else {
                spin<<<1, 1, 0, stream>>>(60000);
            }
            CHECK(cudaEventRecord(start, stream));
            gather<<<grid, threads, 0, stream>>>(host, device, offsets, count, row, in_parts);
            CHECK(cudaEventRecord(end, stream));
            CHECK(cudaStreamSynchronize(stream));
            float ms = 0;
            CHECK(cudaEventElapsedTime(&ms, start, end));
            times.push_back(ms * 1000);
        }
        std::sort(times.begin() + 1, times.end());
        const double us = times[kCalls / 2 + 1];
        printf("%-9s %-34s row %4d n %6d span %5.2f GiB: %8.1f us %6.2f GB/s %5.1f ns a row\n",
               kind.c_str(), what, row, count, gib, us, count * double(row) / us / 1e3,
               us * 1e3 / count);
    }

    void beside(size_t span, int grid, int threads) {
        cudaStream_t other;
        cudaEvent_t start, end;
        char* room;
        CHECK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
        CHECK(cudaEventCreate(&start));
        CHECK(cudaEventCreate(&end));
        CHECK(cudaMalloc(&room, 8 * kGiB));
        const Lists lists = random_rows(65536, 656, span, false);
        CHECK(cudaMemcpy(offsets, lists[0].data(), 65536 * 8, cudaMemcpyHostToDevice));
        CHECK(cudaDeviceSynchronize());
        if (grid > 0) {
            gather<<<grid, threads, 0, other>>>(host, device, offsets, 65536, 656, false);
        }
        spin<<<1, 1, 0, stream>>>(60000);
        CHECK(cudaEventRecord(start, stream));
        for (int i = 0; i < 20; ++i) {
            touch_rows<<<64, 64, 0, stream>>>(room, 8 * kGiB, i);
        }
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaDeviceSynchronize());
        float ms = 0;
        CHECK(cudaEventElapsedTime(&ms, start, end));
        printf("%-9s a small kernel beside %3d CTAs of %3d: %6.2f us\n", kind.c_str(), grid, threads,
               ms * 1000 / 20);
        CHECK(cudaFree(room));
        CHECK(cudaStreamDestroy(other));
    }
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3 || atoi(argv[2]) < 4) {
        fprintf(stderr, "usage: host_memory shared|thp|hugetlb|hostalloc|numa GIB (4 at least)\n");
        return 2;
    }
    const int gib = atoi(argv[2]);
    const size_t bytes = gib * kGiB;
    Bench bench = {argv[1]};
    CHECK(cudaFree(nullptr));
    bench.host = allocate(bench.kind, bytes);
    CHECK(cudaStreamCreateWithFlags(&bench.stream, cudaStreamNonBlocking));
    CHECK(cudaMalloc(&bench.device, 65536 * 1152));
    CHECK(cudaMalloc(&bench.junk, kJunkBytes));
    CHECK(cudaMalloc(&bench.offsets, 65536 * 8));
    for (const int row : {656, 1152}) {
        for (const int span : {1, 4, gib}) {
            for (const int count : {4096, 8768, 65536}) {
                const Lists lists = random_rows(count, row, span * kGiB, false);
                bench.point("random", row, span, lists, 64, 512, false, false);
                const Lists others = random_rows(count, row, span * kGiB, false);
                bench.point("random, cold", row, span, others, 64, 512, false, true);
                bench.point("the same rows again, cold", row, span, others, 64, 512, false, true);
                Lists sorted = random_rows(count, row, span * kGiB, true);
                bench.point("sorted", row, span, sorted, 64, 512, false, false);
                sorted = random_rows(count, row, span * kGiB, true);
                bench.point("sorted, a part a CTA, cold", row, span, sorted, 128, 512, true, true);
            }
        }
        const int layers = static_cast<int>(bytes / (size_t{64} * kRequestRows * row));
        for (const int turns : {1, layers}) {
            if (turns > 0) {
                const std::string what = "64 requests, layers in turn: " + std::to_string(turns);
                bench.point(what.c_str(), row, gib, requests(row, turns), 64, 512, true, true);
            }
        }
    }
    bench.beside(bytes, 0, 0);  // loads the kernel
    bench.beside(bytes, 0, 0);
    const int shapes[][2] = {{8, 128}, {4, 512}, {16, 128}, {8, 512}, {16, 512}, {64, 512}};
    for (const auto& shape : shapes) {
        const std::string what =
            "random, " + std::to_string(shape[0]) + " x " + std::to_string(shape[1]) + " threads";
        const Lists lists = random_rows(8768, 656, bytes, false);
        bench.point(what.c_str(), 656, gib, lists, shape[0], shape[1], false, true);
        const Lists near = random_rows(8768, 656, kGiB, false);
        bench.point(what.c_str(), 656, 1, near, shape[0], shape[1], false, true);
        bench.beside(bytes, shape[0], shape[1]);
    }
    return 0;
}
