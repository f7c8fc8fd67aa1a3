// step_rows.cuh: rows of a table for the images of a batch, where they lie, by each image's step.
//   table [steps * rows, stride], from the first column that is read on: `rows` conditioning rows a step
//   step [images]: on the device, so that a captured graph replays for every step; images 0, images, 2 images, ... are one
#pragma once
#include "device.cuh"

// As src/ops/cuda/step_rows.rs has it; tests/kernel_arguments.rs compares the two.
template <class T>
struct StepRowsArgs {
    const T* table;  // null: there is none
    const unsigned* step;
    int stride;          // elements from one row to the next
    int images;          // with a step of their own
    int rows;            // of a step
    int images_per_row;  // images of the batch / rows
};

// The row of an image of the batch: step[image % images] * rows + image / images_per_row.
template <class T>
DEVICE const T* row_of(const StepRowsArgs<T>& r, int image) {
    const int64_t row = int64_t(r.step[image % r.images]) * r.rows + image / r.images_per_row;
    return r.table + row * r.stride;
}
