// linear_fp8.cuh: linear (common/linear.cuh) of operands in 8-bit floats, whichever instructions make its sums:
//   y[M, N] = gate * activation((x[M, K] weight[columns, K]^T) x_scales[M] weight_scales[columns] + bias) + residual
//   x, weight: e4m3   x_scales, weight_scales: f32   y, bias, residual: T = f32 | f16 | bf16
#pragma once
#include "e4m3.cuh"
#include "linear.cuh"

// The kernels' parameter, as src/ops/cuda/linear_fp8.rs has it; tests/kernel_arguments.rs compares the two.
template <class T>
struct LinearFp8Args {
    LinearArgs<T, e4m3> linear;
    const float* x_scales;
    const float* weight_scales;
};
