// The warpgroups that multiply in sparse_mla.cu.
//
// For its tiles a group makes logits, then weights. The weights of a tile go from registers into the
// product with the group's own half of the columns, and through shared memory to the other group. Per
// tile t, in group t % 2:
//
//   half the logits of t | output += weights of t - 1 | the other half, weights of t | output += those
//
// while the other group is half a period behind. Tiles are added in order, and each tile's weights
// refer to the largest logit so far, so what was summed before never needs to be scaled up.
#pragma once

#include "mla_tile.cuh"

namespace tidepool {

template <bool kIsFp8>
struct Consumer {
    const MlaParams& p;
    MlaSmem& smem;
    int group;
    int lane;
    int top;        // the thread has heads `top` and `top` + 8
    float best[2];  // what `acc` and `sum` refer to
    float sum[2];   // over the group's own tiles
    float logits[kTileRows / 2];
    uint32_t packed[kTileRows / 4];
    float acc[kHalfColumns / 2];

    __device__ __forceinline__ void wait_full(int part, int t) {
        barrier_wait(&smem.full[group][part], t / kGroups % 2);
        if constexpr (!kIsFp8) {
            fence_async();  // cp.async wrote; FP8's producer has fenced its own stores
        }
    }

    template <int kCount>
    __device__ __forceinline__ void add_logits(int panel, bool is_first) {
        const uint64_t query =
            descriptor_along_rows(shared_address(smem.query) + panel * kPanelBytes);
        const uint64_t tile =
            descriptor_along_rows(shared_address(smem.tile[group]) + panel * kPanelBytes);
#pragma unroll
        for (int step = 0; step < 4 * kCount; ++step) {
            const int offset = step / 4 * kPanelBytes + step % 4 * 32;
            wgmma_n64(logits, advanced(query, offset), advanced(tile, offset),
                      !(is_first && step == 0));
        }
    }

    // Queues what the group's own columns and the rope columns give to the logits of its tile t.
    __device__ __forceinline__ void start_logits(int t) {
        wait_full(0, t);
        wgmma_begin();
        add_logits<1>(kPanels - 1, true);
        add_logits<kHalfPanels>(first_panel(group), false);
        wgmma_commit();
    }

    // Queues the rest.
    __device__ __forceinline__ void finish_logits(int t) {
        wait_full(1, t);
        wgmma_begin();
        add_logits<kHalfPanels>(first_panel(group ^ 1), false);
        wgmma_commit();
    }

    // Queues output += weights * values of this group's columns of a tile. `weight(step)`: of 16 rows.
    template <class Weight>
    __device__ __forceinline__ void start_output(int owner, const Weight& weight) {
        const uint64_t values = descriptor_across_rows(
            shared_address(smem.tile[owner]) + first_panel(group) * kPanelBytes, kPanelBytes);
        wgmma_begin();
#pragma unroll
        for (int step = 0; step < kTileRows / 16; ++step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int offset = half * kHalfPanels / 2 * kPanelBytes + step * kSixteenRows;
                wgmma_n128(acc + half * kHalfColumns / 4, weight(step), advanced(values, offset));
            }
        }
        wgmma_commit();
    }

    __device__ __forceinline__ void start_output_of_other() {
        const uint64_t weight = descriptor_along_rows(shared_address(smem.weight));
        start_output(group ^ 1, [&](int step) { return advanced(weight, step * 32); });
    }

    __device__ __forceinline__ void start_output_of_own() {
        start_output(group, [&](int step) { return packed + 4 * step; });
    }

    // Makes `acc` and `sum` refer to `now`. Maxima seldom grow after the first tiles.
    __device__ __forceinline__ void refer_to(const float (&now)[2]) {
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            factor[r] = exp2_fast(best[r] - now[r]);
            best[r] = now[r];
            sum[r] *= factor[r];
        }
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int i = 0; i < kHalfColumns / 2; ++i) {
                acc[i] *= factor[i / 2 % 2];
            }
        }
    }

    // Scales the logits. `now`: in, the maximum before; out, with this tile.
    __device__ __forceinline__ void find_best(float (&now)[2]) {
        const float* bias = smem.bias[group] + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kTileRows / 2; i += 4) {
            const float2 of_row = *reinterpret_cast<const float2*>(bias + i * 2);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float* pair = logits + i + 2 * r;
                pair[0] = fmaf(pair[0], p.scale_log2, of_row.x);
                pair[1] = fmaf(pair[1], p.scale_log2, of_row.y);
                now[r] = fmaxf(now[r], fmaxf(pair[0], pair[1]));
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 1));
            now[r] = fmaxf(now[r], __shfl_xor_sync(0xffffffffu, now[r], 2));
        }
    }

    // Logits to weights in `packed`; adds to their sums.
    __device__ __forceinline__ void weigh(const float (&now)[2], float (&tile_sum)[2]) {
#pragma unroll
        for (int i = 0; i < kTileRows / 2; i += 2) {
            const int r = i / 2 % 2;
            const float low = exp2_fast(logits[i] - now[r]);
            const float high = exp2_fast(logits[i + 1] - now[r]);
            tile_sum[r] += low + high;
            const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
            packed[i / 2] = *reinterpret_cast<const uint32_t*>(&both);
        }
    }

    // Hands the weights and the maximum to the other group.
    __device__ __forceinline__ void publish(const float (&now)[2]) {
#pragma unroll
        for (int i = 0; i < kTileRows / 4; ++i) {
            const int at = swizzled(top + i % 2 * 8, i / 2) + lane % 4 * 4;
            *reinterpret_cast<uint32_t*>(smem.weight + at) = packed[i];
        }
        if (lane % 4 == 0) {
            smem.best[group][top] = now[0];
            smem.best[group][top + 8] = now[1];
        }
        fence_async();
        barrier_arrive(&smem.weighed[group]);
    }

    // Waits for the other group's weights of tile t; returns its maxima.
    __device__ __forceinline__ void wait_weighed(int t, float (&now)[2]) {
        barrier_wait(&smem.weighed[group ^ 1], t / kGroups % 2);
        now[0] = smem.best[group ^ 1][top];
        now[1] = smem.best[group ^ 1][top + 8];
    }

    // Forgets the last token.
    __device__ __forceinline__ void start() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            best[r] = kLowest;
            sum[r] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kHalfColumns / 2; ++i) {
            acc[i] = 0.0f;
        }
    }

    // A token's tiles, the CTA's from `first` to `end`, at least one.
    __device__ __forceinline__ void run(int first, int end) {
        for (int t = first + ((first ^ group) & 1); t < end; t += kGroups) {
            float now[2] = {kLowest, kLowest};
            float tile_sum[2] = {0.0f, 0.0f};
            start_logits(t);
            if (t > first) {
                wait_weighed(t - 1, now);
                refer_to(now);
                keep(acc);
                start_output_of_other();
            }
            wgmma_wait<0>();
            keep(acc);
            keep(logits);
            if (t > first) {
                barrier_arrive(&smem.empty[group ^ 1][1]);
            }
            finish_logits(t);
            barrier_wait(&smem.biased[group], t / kGroups % 2);
            wgmma_wait<0>();
            keep(logits);
            find_best(now);
            weigh(now, tile_sum);
            group_barrier(group);  // all its warps have read `weight`
            publish(now);
            refer_to(now);
            sum[0] += tile_sum[0];
            sum[1] += tile_sum[1];
            keep(acc);
            start_output_of_own();
            wgmma_wait<0>();
            keep(acc);
            barrier_arrive(&smem.empty[group][0]);
        }
        if ((end - 1) % kGroups != group) {
            float now[2];
            wait_weighed(end - 1, now);
            refer_to(now);
            keep(acc);
            start_output_of_other();
            wgmma_wait<0>();
            keep(acc);
            barrier_arrive(&smem.empty[group ^ 1][1]);
        }
    }

    // 1 / the sum of all weights of heads `top` and `top` + 8, or 0; and the sums.
    __device__ __forceinline__ void close(float (&total)[2], float (&factor)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
            sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
        }
        if (lane % 4 == 0) {
            smem.sum[group][top] = sum[0];
            smem.sum[group][top + 8] = sum[1];
        }
        consumers_barrier();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] = smem.sum[0][top + 8 * r] + smem.sum[1][top + 8 * r];
            factor[r] = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
        }
    }

    __device__ __forceinline__ float lse(int r, float total) const {
        return total > 0.0f ? best[r] + log2f(total) : kLowest;
    }

    // Leaves the result in shared memory, where the cluster finds it.
    __device__ __forceinline__ void leave_part() {
        float total[2];
        float factor[2];
        close(total, factor);
        PartSmem& left = *reinterpret_cast<PartSmem*>(&smem);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* part = left.part[top + 8 * r] + group * kHalfColumns + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kHalfColumns / 8; ++j) {
                *reinterpret_cast<float2*>(part + 8 * j) =
                    make_float2(acc[4 * j + 2 * r] * factor[r], acc[4 * j + 2 * r + 1] * factor[r]);
            }
            if (group == 0 && lane % 4 == 0) {
                left.lse[top + 8 * r] = lse(r, total[r]);
            }
        }
    }

    // Writes the result, or if `part` is not negative, that part of one for join_kernel.
    __device__ __forceinline__ void finish(int b, int part, int head) {
        float total[2];
        float factor[2];
        close(total, factor);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int h = head + top + 8 * r;
            if (h >= p.num_heads) {
                continue;
            }
            const int column = group * kHalfColumns + lane % 4 * 2;
            if (part < 0) {
                __nv_bfloat16* out = p.out + b * p.out_stride_b + h * p.out_stride_h + column;
#pragma unroll
                for (int j = 0; j < kHalfColumns / 8; ++j) {
                    *reinterpret_cast<__nv_bfloat162*>(out + 8 * j) = __floats2bfloat162_rn(
                        acc[4 * j + 2 * r] * factor[r], acc[4 * j + 2 * r + 1] * factor[r]);
                }
                continue;
            }
            const int64_t at = int64_t{part} * p.num_heads + h;
            float* values = p.parts + at * kLatent + column;
#pragma unroll
            for (int j = 0; j < kHalfColumns / 8; ++j) {
                *reinterpret_cast<float2*>(values + 8 * j) =
                    make_float2(acc[4 * j + 2 * r] * factor[r], acc[4 * j + 2 * r + 1] * factor[r]);
            }
            if (group == 0 && lane % 4 == 0) {
                p.lse[at] = lse(r, total[r]);
            }
        }
    }
};

}  // namespace tidepool
