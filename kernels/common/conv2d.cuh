// conv2d.cuh: what a convolution is, whichever instructions make its sums.
//   y[N, Hout, Wout, O] = f(scale * (conv(resize(x), weight[O, kh, kw, C]) + bias[O] + row[r(n), O] + residual[N, Hout, Wout, O]))
//   f(v) = v from 0 on, negative_slope * v below (LeakyReLU); a slope of 1 leaves every v as it is, bit for bit.
//   x is one source [N, H, W, Ca], or two side by side (a skip connection), the second [N, H, W, Cb], C = Ca + Cb.
//   resize: nearest neighbour, pixel i of the input is stored pixel i * H / Hin; padding is zeros around the input.
//   y, x, weight, bias, row, residual: T = f32 | f16 | bf16, channels-last; bias, row, residual may be null. y overlaps nothing.
//   row: a table [steps * rows, O] with `rows` conditioning rows a step; `step` [images] on the device, so that a captured
//   graph replays for every step: image n of N reads r(n) = step[n % images] * rows + n / (N / rows), where it lies.
// Sums and what is added to them in f32, one rounding at the store.
#pragma once
#include "device.cuh"

// Bits of `wide`: these rows are whole aligned chunks; kWideOutput: y, bias, row, residual and partial.
enum ConvWide { kWideX = 1, kWideWeight = 2, kWideOutput = 4 };

// The kernels' parameter, as src/ops/cuda/conv.rs has it; tests/kernel_arguments.rs compares the two.
template <class T>
struct ConvArgs {
    T* y;
    float* partial;  // [splits, M, O]: parts of the sums, for conv2d_join; null: y is made at once
    const T* a;
    const T* b;
    const T* weight;
    const T* bias;
    const T* row;  // the table
    const unsigned* step;
    const T* residual;
    float scale, negative_slope;
    int splits;
    int step_images;     // with a step of their own
    int step_rows;       // conditioning rows of a step
    int images_per_row;  // N / step_rows
    int m, outputs;      // output pixels of all images; O
    int channels_a, channels_b;
    int height, width;              // as stored
    int input_height, input_width;  // after the resize
    int output_width, pixels;       // of an output image: Hout * Wout
    int kernel_height, kernel_width;
    int stride, dilation, top, left;
    int first_row;  // of the stored image that is held; a part of an image is alone in its batch
    int wide;
};

// What is stored, from the sum of everything.
template <class T>
DEVICE float finished(const ConvArgs<T>& c, float sum) {
    const float v = sum * c.scale;
    return v < 0.f ? v * c.negative_slope : v;
}

// The table's row of an image, from output channel n on; null without a table.
template <class T>
DEVICE const T* row_of(const ConvArgs<T>& c, int image, int n) {
    if (c.row == nullptr) return nullptr;
    const int64_t first = int64_t(c.step[image % c.step_images]) * c.step_rows;
    return c.row + (first + image / c.images_per_row) * c.outputs + n;
}
