// linear.cuh: what a linear is, whichever instructions make its sums.
//   y[M, N] = gate[r(m), N] * activation(x[M, K] weight[columns, K]^T + bias[columns]) + residual[M, N]
//   activation: none, SiLU, GELU (exact), quick GELU, GELU by tanh: columns = N; GEGLU (exact, by tanh): columns = 2 N, weight
//   rows interleaved, row 2j is value j and row 2j + 1 its gate: y_j = value_j gelu(gate_j)
//   gate: rows of a table by each image's step (step_rows.cuh), of which one is for `image_rows` rows of x; only where
//   there is no activation
//   y, x, weight, bias, residual: T = f32 | f16 | bf16, contiguous; bias, residual and the table may be null. y overlaps
//   nothing.
// Bias, activation, gate and residual in f32, one rounding at the store.
#pragma once
#include "activation.cuh"
#include "step_rows.cuh"

// Bits of `wide`: these rows are whole aligned chunks.
enum LinearWide { kWideX = 1, kWideWeight = 2, kWideOutput = 4 };

// The kernels' parameter, as src/ops/cuda/linear.rs has it; tests/kernel_arguments.rs compares the two. `In`: of x and
// weight, where it is not T.
template <class T, class In = T>
struct LinearArgs {
    T* y;
    const In* x;
    const In* weight;
    const T* bias;
    const T* residual;
    StepRowsArgs<T> gate;
    int m;           // rows of x and y
    int columns;     // rows of weight
    int k;
    int activation;
    int wide;
    int image_rows;  // rows of x that share one row of the gate
};

// What GEGLU multiplies a value by.
template <int kActivation, class T>
DEVICE float gate_for(float z) {
    static_assert(kActivation == kGeglu || kActivation == kGegluTanh);
    return kActivation == kGeglu ? gelu_for<T>(z) : gelu_tanh(z);
}
