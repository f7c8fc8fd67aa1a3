// latents.cu: what DemoFusion (Du et al. 2023, arXiv:2311.16973) does to whole latents between the network's calls, in f32.
// Tables are read by the step's index on the device, so that a recorded step serves all.
#include "common/reduce.cuh"

constexpr int kThreads = 256;
constexpr int kReduceThreads = 512;  // of latent_moments

// The row of an image of a table of `columns` columns: its step's.   step: of `step_images` images, as in step.cuh
DEVICE const float* row_of(const float* table, const unsigned* step, int64_t image, int step_images, int columns) {
    return table + size_t(step[image % step_images]) * columns;
}

// mix_latents: x = k0 x + k1 a + k2 b in place, k the row of the image's step; what has the factor 0 is not read.
//   x, a, b [images, per_image], count of them all; b null: k2 is 0   factors [steps, 3]
// Memory bound: 16 * count bytes. Launch: grid ceil(count / kThreads), block kThreads.
KERNEL(mix_latents_f32, kThreads, 1)(float* x, const float* a, const float* b, const float* factors, const unsigned* step,
                                     int step_images, int64_t per_image, int64_t count) {
    follow_previous();
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < count)) return;
    const float* k = row_of(factors, step, i / per_image, step_images, 3);
    float sum = k[1] == 0.f ? 0.f : k[1] * a[i];
    if (k[0] != 0.f) sum += k[0] * x[i];
    if (b && k[2] != 0.f) sum += k[2] * b[i];
    x[i] = sum;
}
REGISTER_KERNEL(mix_latents_f32)

// latent_moments: mean and standard deviation (of a sample: over the count less 1) of each image with `padding` zeros.
//   moments [images, 2] f32: mean, std   x [images, per_image] f32
// Sums in an order that depends on per_image alone; the deviations are summed in a second pass, from L2.
// Launch: a block of kReduceThreads per image.
KERNEL(latent_moments_f32, kReduceThreads, 1)(float* moments, const float* x, int per_image, int padding) {
    follow_previous();
    constexpr int kWarps = kReduceThreads / 32;
    SHARED_STATIC(float, sums, [kWarps]);
    SHARED_STATIC(float, squares, [kWarps]);
    x += int64_t(blockIdx.x) * per_image;
    const float count = float(per_image) + float(padding);
    float sum = 0.f;
    for (int i = threadIdx.x; i < per_image; i += kReduceThreads) sum += x[i];
    const float mean = block_sum(sum, sums) / count;
    float square = 0.f;
    for (int i = threadIdx.x; i < per_image; i += kReduceThreads) square += (x[i] - mean) * (x[i] - mean);
    square = block_sum(square, squares) + float(padding) * mean * mean;
    if (threadIdx.x == 0) {
        moments[2 * blockIdx.x] = mean;
        moments[2 * blockIdx.x + 1] = sqrtf(square / (count - 1.f));
    }
}
REGISTER_KERNEL(latent_moments_f32)

// standardise_latents: y = (x - mean) * (std' / std) + mean'.
//   y, x [images, per_image] f32, count of them all   from: mean, std; to: mean', std' [images, 2]
// Memory bound: 8 * count bytes. Launch as mix_latents.
KERNEL(standardise_latents_f32, kThreads, 1)(float* y, const float* x, const float* from, const float* to,
                                             int64_t per_image, int64_t count) {
    follow_previous();
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < count)) return;
    const float *a = from + 2 * (i / per_image), *b = to + 2 * (i / per_image);
    y[i] = (x[i] - a[0]) * (b[1] / a[1]) + b[0];
}
REGISTER_KERNEL(standardise_latents_f32)

// blur_latents: the map with `top` rows and `left` columns of zeros before it, filtered along both axes by the taps of the
// image's step, zeros outside.
//   y(i, j) = sum over a, b < taps of w[a] w[b] x(i - top + a - taps / 2, j - left + b - taps / 2)
//   y [images, top + height, left + width, C]   x [images, height, width, C]   weights [steps, taps], taps odd
// Compute bound, and small: taps^2 products per element, 49 at four times the side. Launch: grid ceil(count / kThreads).
KERNEL(blur_latents_f32, kThreads, 1)(float* y, const float* x, const float* weights, const unsigned* step,
                                      int step_images, int taps, int height, int width, int channels, int top, int left,
                                      int64_t count) {
    follow_previous();
    const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(element < count)) return;
    const int channel = int(element % channels);
    int64_t rest = element / channels;
    const int column = int(rest % (left + width)) - left - taps / 2;
    rest /= left + width;
    const int row = int(rest % (top + height)) - top - taps / 2;
    const int64_t image = rest / (top + height);
    const float* w = row_of(weights, step, image, step_images, taps);
    x += image * height * width * channels + channel;
    float sum = 0.f;
    for (int a = 0; a < taps; a++) {
        if (!(GUARD(row + a >= 0) && GUARD(row + a < height))) continue;
        float of_row = 0.f;
        for (int b = 0; b < taps; b++) {
            if (!(GUARD(column + b >= 0) && GUARD(column + b < width))) continue;
            of_row += w[b] * x[(int64_t(row + a) * width + column + b) * channels];
        }
        sum += w[a] * of_row;
    }
    y[element] = sum;
}
REGISTER_KERNEL(blur_latents_f32)
