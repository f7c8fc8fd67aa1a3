// step.cu: what a captured step does around the denoiser. Everything that changes from step to step is read on the device:
// row *step of a table, so that one recorded graph serves all of them.
#include "common/reduce.cuh"
#include "common/step.cuh"

constexpr int kThreads = 256;
constexpr int kReduceThreads = 512;  // of the kernels with a block per image

// scale_input: y[r][i] = input_scale * x[i] with the scale of i's image, rounded once, for every r < repeats.
//   y [repeats, count] T   x [count] f32   table [steps, kColumns] f32   step as above
// Memory bound: (4 + repeats * sizeof(T)) * count bytes. Launch: grid ceil(count / kThreads), block kThreads.
template <class T>
DEVICE void scale_input(T* y, const float* x, const float* table, const unsigned* step, int step_images,
                        int64_t per_image, int64_t count, int repeats) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (GUARD(i < count)) {
        const T value = from_f32<T>(row(table, step, i / per_image, step_images)[kInputScale] * x[i]);
        for (int r = 0; r < repeats; r++) y[r * count + i] = value;
    }
}

// sampler_step: guidance, x0 and update in one pass, in place, for images that have not ended.
//   e  = (guided ? uncond + scale (cond - uncond) : output[i]) * factor
//   x0 = clamp(x0_from_x x + x0_from_e e), or with a threshold s clamp to [-s, s], over s
//   x' = next_from_x x + next_from_e e + next_from_x0 x0 + sum_j next_from_history[j] history[j] + next_from_noise d noise
//   d  = 1, or where the row learns it exp((f log_largest + (1 - f) log_smallest) / 2) with f = (v + 1) / 2 of the v that the
//        network predicts for each value, with guidance in the conditional half; arXiv:2102.09672, eq. (15)
//   history, if the row keeps: kept_from_x x + kept_from_e e + kept_from_x0 x0 before those that were there
//   x, x0, noise [count] f32 (noise may be null)   history [depth, count] f32, depth <= 3
//   guidance [images, 2], factors, thresholds [images] f32, each may be null   step as above
// Memory bound: (16 or 20) * count + (1 or 2) * sizeof(T) * count bytes, and of the history what the row says.
// Launch as scale_input.
template <class T>
DEVICE void sampler_step(float* x, float* x0, float* history, const Output<T>& output, const float* thresholds,
                         const float* noise, const float* table, const unsigned* step, int step_images, int depth,
                         int64_t per_image) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, count = output.count;
    if (!GUARD(i < count)) return;
    const int64_t image = i / per_image;
    if (step[step_images + image % step_images] == 0) return;
    const float* k = row(table, step, image, step_images);
    const float e = output.at(i, image), now = x[i];
    const float bound = thresholds ? thresholds[image] : k[kClip];
    // NaN stays NaN: neither comparison holds.
    const auto clipped = [=](float value) {
        value = value > bound ? bound : value < -bound ? -bound : value;
        return thresholds ? value / bound : value;
    };
    const float clean = clipped(k[kX0FromX] * now + k[kX0FromE] * e);
    float next = k[kNextFromX] * now + k[kNextFromE] * e + k[kNextFromX0] * clean;
    for (int j = 0; j < depth; j++) {
        const float weight = k[kNextFromHistory + j];
        if (weight != 0.f) next += weight * history[j * count + i];
    }
    if (k[kNextFromNoise] != 0.f) {
        float weight = k[kNextFromNoise];
        if (k[kLearnsNoise] != 0.f) {
            const float fraction = (output.variance(i) + 1.f) / 2.f;
            weight *= expf(0.5f * (fraction * k[kLogLargest] + (1.f - fraction) * k[kLogSmallest]));
        }
        next += weight * noise[i];
    }
    if (depth > 0 && k[kKeeps] != 0.f) {
        for (int j = depth - 1; j > 0; j--) history[j * count + i] = history[(j - 1) * count + i];
        history[i] = k[kKeptFromX] * now + k[kKeptFromE] * e + k[kKeptFromX0] * clean;
    }
    x0[i] = k[kX0FromNext] != 0.f ? clipped(k[kX0FromX] * next + k[kX0FromE] * e) : clean;
    x[i] = next;
}

// guidance_rescale: what each image's guided output is multiplied by; Lin et al. 2023, arXiv:2305.08891, eqs. (15), (16).
//   factors[image] = rescale std(cond) / std(uncond + scale (cond - uncond)) + 1 - rescale
//   output [2, images, per_image] T, of which a predicted variance is no part   guidance [images, 2]   factors [images] f32
// The deviations' common divisor is left out. Sums in an order that depends on nothing but per_image.
// Reads the output twice, the second time from L2. Launch: a block of kReduceThreads per image.
template <class T>
DEVICE void guidance_rescale(float* factors, const Output<T>& output, int per_image) {
    constexpr int kWarps = kReduceThreads / 32;
    SHARED_STATIC(float, cond_sums, [kWarps]);
    SHARED_STATIC(float, guided_sums, [kWarps]);
    SHARED_STATIC(float, cond_squares, [kWarps]);
    SHARED_STATIC(float, guided_squares, [kWarps]);
    const int64_t image = blockIdx.x;
    const float scale = output.guidance[2 * image], rescale = output.guidance[2 * image + 1];
    const T* uncond = output.values + output.place(image * per_image);
    const T* cond = uncond + output.half();
    const auto guided = [=](unsigned at) { return to_f32(uncond[at]) + scale * (to_f32(cond[at]) - to_f32(uncond[at])); };
    float c = 0.f, g = 0.f;
    for (int i = threadIdx.x; i < per_image; i += kReduceThreads) {
        const unsigned at = output.place_in_image(i);
        c += to_f32(cond[at]);
        g += guided(at);
    }
    const float c_mean = block_sum(c, cond_sums) / per_image, g_mean = block_sum(g, guided_sums) / per_image;
    float c_square = 0.f, g_square = 0.f;
    for (int i = threadIdx.x; i < per_image; i += kReduceThreads) {
        const unsigned at = output.place_in_image(i);
        const float dc = to_f32(cond[at]) - c_mean, dg = guided(at) - g_mean;
        c_square += dc * dc;
        g_square += dg * dg;
    }
    const float c_std = sqrtf(block_sum(c_square, cond_squares)), g_std = sqrtf(block_sum(g_square, guided_squares));
    if (threadIdx.x == 0) factors[image] = rescale == 0.f ? 1.f : rescale * (c_std / g_std) + (1.f - rescale);
}

// dynamic_threshold: each image's bound of the clean sample; Saharia et al. 2022, arXiv:2205.11487, sec. 2.3.
//   thresholds[image] = min(max(quantile(|x0|), 1), most), the quantile as torch.quantile: between the values at ranks
//   `below` and `above` of the sorted ones, `weight` of the way
//   x [images, per_image] f32, x0 of it and the output as in sampler_step   thresholds [images] f32
// Exact: the bits of |x0| are sorted as its values are, and found eight at a time, highest first: a histogram of the values
// that share the bits found so far says in which bin the rank lies. NaN counts as larger than infinity.
// Reads x and the output five times, from L2 after the first. Launch: a block of kReduceThreads per image.
template <class T>
DEVICE void dynamic_threshold(float* thresholds, const float* x, const Output<T>& output, const float* table,
                              const unsigned* step, int step_images, float most, int below, int above, float weight,
                              int per_image) {
    constexpr int kBins = 256, kWarps = kReduceThreads / 32;
    SHARED_STATIC(int, histogram, [kBins]);
    SHARED_STATIC(unsigned, found, [2]);  // the bits so far, and the rank among the values that share them
    SHARED_STATIC(unsigned, next_larger, [kWarps]);
    SHARED_STATIC(int, at_most, [kWarps]);
    const int64_t image = blockIdx.x, first = image * per_image;
    const float* k = row(table, step, image, step_images);
    const auto bits = [=](int i) {
        const float clean = k[kX0FromX] * x[first + i] + k[kX0FromE] * output.at(first + i, image);
        return __float_as_uint(clean) & 0x7fffffffu;
    };
    if (threadIdx.x == 0) {
        found[0] = 0;
        found[1] = unsigned(below);
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int bin = threadIdx.x; bin < kBins; bin += kReduceThreads) histogram[bin] = 0;
        __syncthreads();
        const unsigned prefix = found[0];
        // Shifts of 32 are undefined: the first round has no bits yet.
        const unsigned mask = shift == 24 ? 0u : ~0u << (shift + 8);
        for (int i = threadIdx.x; i < per_image; i += kReduceThreads) {
            const unsigned value = bits(i);
            if ((value & mask) == prefix) atomicAdd(&histogram[value >> shift & 0xff], 1);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int rank = int(found[1]), bin = 0;
            while (rank >= histogram[bin]) rank -= histogram[bin++];
            found[0] = prefix | unsigned(bin) << shift;
            found[1] = unsigned(rank);
        }
        __syncthreads();
    }
    // The value at `above`: the same where enough values are equal, else the smallest of the larger ones.
    const unsigned lower = found[0];
    unsigned larger = ~0u;
    int count = 0;
    for (int i = threadIdx.x; i < per_image; i += kReduceThreads) {
        const unsigned value = bits(i);
        if (value <= lower) count++;
        if (value > lower && value < larger) larger = value;
    }
    count = warp_sum(count);
    UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        const unsigned other = __shfl_xor_sync(~0u, larger, lanes);
        larger = other < larger ? other : larger;
    }
    if (threadIdx.x % 32 == 0) {
        next_larger[threadIdx.x / 32] = larger;
        at_most[threadIdx.x / 32] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        count = 0;
        larger = ~0u;
        for (int warp = 0; warp < kWarps; warp++) {
            count += at_most[warp];
            larger = next_larger[warp] < larger ? next_larger[warp] : larger;
        }
        const float a = __uint_as_float(lower), b = count > above ? a : __uint_as_float(larger);
        // As torch's lerp, which is exact at both ends.
        const float quantile = weight < 0.5f ? a + weight * (b - a) : b - (b - a) * (1.f - weight);
        const float bound = quantile > 1.f ? quantile : 1.f;
        thresholds[image] = bound < most ? bound : most;
    }
}

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(scale_input_##suffix, kThreads, 1)                                                                          \
    (T* y, const float* x, const float* table, const unsigned* step, int step_images, int64_t per_image,               \
     int64_t count, int repeats) {                                                                                     \
        follow_previous();                                                                                             \
        scale_input<T>(y, x, table, step, step_images, per_image, count, repeats);                                     \
    }                                                                                                                  \
    REGISTER_KERNEL(scale_input_##suffix)                                                                              \
    KERNEL(sampler_step_##suffix, kThreads, 1)                                                                         \
    (float* x, float* x0, float* history, const T* output, const float* guidance, const float* factors,                \
     const float* thresholds, const float* noise, const float* table, const unsigned* step, int step_images, int depth,\
     int64_t per_image, int64_t count, int variance_channels) {                                                        \
        follow_previous();                                                                                             \
        const Output<T> guided{output, guidance, factors, count, variance_channels};                                   \
        sampler_step<T>(x, x0, history, guided, thresholds, noise, table, step, step_images, depth, per_image);        \
    }                                                                                                                  \
    REGISTER_KERNEL(sampler_step_##suffix)                                                                             \
    KERNEL(guidance_rescale_##suffix, kReduceThreads, 1)                                                               \
    (float* factors, const T* output, const float* guidance, int per_image, int images, int variance_channels) {       \
        follow_previous();                                                                                             \
        const Output<T> halves{output, guidance, nullptr, int64_t(images) * per_image, variance_channels};             \
        guidance_rescale<T>(factors, halves, per_image);                                                               \
    }                                                                                                                  \
    REGISTER_KERNEL(guidance_rescale_##suffix)                                                                         \
    KERNEL(dynamic_threshold_##suffix, kReduceThreads, 1)                                                              \
    (float* thresholds, const float* x, const T* output, const float* guidance, const float* factors,                  \
     const float* table, const unsigned* step, int step_images, float most, int below, int above, float weight,        \
     int per_image, int images, int variance_channels) {                                                               \
        follow_previous();                                                                                             \
        const Output<T> guided{output, guidance, factors, int64_t(images) * per_image, variance_channels};             \
        dynamic_threshold<T>(thresholds, x, guided, table, step, step_images, most, below, above, weight, per_image);  \
    }                                                                                                                  \
    REGISTER_KERNEL(dynamic_threshold_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

// advance_step: the last launch of a step. An image that takes its last one stays there. Launch: grid (images), one thread a
// block.
KERNEL(advance_step, 1, 1)(unsigned* step) {
    follow_previous();
    unsigned& left = step[gridDim.x + blockIdx.x];
    if (left > 1) step[blockIdx.x]++;
    if (left > 0) left--;
}
REGISTER_KERNEL(advance_step)
