// patches.cu: boxes of cells on the maps of a batch, gathered for the network, stepped one by one and averaged where they
// overlap: crops (MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113; DemoFusion, Du et al. 2023, arXiv:2311.16973,
// sec. 3.3) and strided samples (there, sec. 3.4). No crop is a tensor: the first kernel in front of the network reads the
// map, the one behind it writes the map. Patches that are stepped more than once are merged by weight (PixelRush,
// arXiv:2602.12769).
#include "common/step.cuh"

constexpr int kThreads = 256;

// A group of `count` patches of each image, from *first on of the `total` that an image has. Cell (i, j) of a patch is the
// map's (top + i stride, left + j stride), (top, left) = origins[image][patch], which may lie outside of the map; with
// `wraps` a column is taken modulo the map's width, and left is one of the map's.
struct Patches {
    const int* origins;     // [images, total, 2]
    const unsigned* first;  // on the device, so that one recorded step serves every group
    int total;
    int count;
    int rows, columns;  // of a patch
    int stride;
    int wraps;
    int height, width, channels;  // of the map
};

// The origin of patch `index` of an image.
DEVICE const int* origin(const Patches& p, int64_t image, int index) { return p.origins + (image * p.total + index) * 2; }

// Which cell of a patch with this origin is the map's (row, column): `at` = i * columns + j; false: none is.
DEVICE bool cell_of(int& at, const Patches& p, const int* origin, int row, int column) {
    const int below = row - origin[0];
    int right = column - origin[1];
    if (p.wraps && right < 0) right += p.width;
    if (below < 0 || right < 0 || below % p.stride != 0 || right % p.stride != 0) return false;
    const int i = below / p.stride, j = right / p.stride;
    at = i * p.columns + j;
    return GUARD(i < p.rows) && GUARD(j < p.columns);
}

// Where an element of maps or patches [n, rows, columns, C] is.
struct Place {
    int64_t n;
    int row, column, channel;

    __device__ __forceinline__ Place(int64_t element, int rows, int columns, int channels) {
        channel = int(element % channels);
        element /= channels;
        column = int(element % columns);
        element /= columns;
        row = int(element % rows);
        n = element / rows;
    }
};

// gather_patches: what the network reads of a group's patches.
//   y[r][image][patch][i][j] = input_scale * x(cell), 0 outside of the map, rounded once, for every r < repeats
//   with moments first (x - mean) * (std' / std) + mean' inside: x with the mean' and std' of another map
//   y [repeats, images, count, rows, columns, C] T   x [images, height, width, C] f32
//   from, to [images, 2] f32, mean and std, both or neither null   table, step as in step.cuh, one step for all images
//   elements = images * count * rows * columns * C
// Memory bound: (4 + repeats * sizeof(T)) * elements bytes. Launch: grid ceil(elements / kThreads), block kThreads.
template <class T>
DEVICE void gather_patches(T* y, const float* x, const float* from, const float* to, const float* table,
                           const unsigned* step, int64_t elements, int repeats, const Patches& p) {
    const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(at < elements)) return;
    const Place cell(at, p.rows, p.columns, p.channels);
    const int64_t image = cell.n / p.count;
    const int* first = origin(p, image, int(*p.first) + int(cell.n % p.count));
    const int row = first[0] + cell.row * p.stride;
    int column = first[1] + cell.column * p.stride;
    if (p.wraps) column %= p.width;
    float value = 0.f;
    if (GUARD(row >= 0) && GUARD(row < p.height) && GUARD(column >= 0) && GUARD(column < p.width)) {
        value = x[((image * p.height + row) * p.width + column) * p.channels + cell.channel];
        if (from) {
            const float *a = from + 2 * image, *b = to + 2 * image;
            value = (value - a[0]) * (b[1] / a[1]) + b[0];
        }
    }
    const T result = from_f32<T>(table[size_t(step[0]) * kColumns + kInputScale] * value);
    for (int r = 0; r < repeats; r++) y[r * elements + at] = result;
}

// step_patches: the sampler's step of each patch of a group, added up over the patches that hold a cell, in their order; the
// last group divides by how many of all patches hold it. So the mean has the same bits however the patches are grouped.
//   next = next_from_x x + next_from_e e + next_from_x0 clamp(x0_from_x x + x0_from_e e)
//   sums = (first group ? 0 : sums) + sum of next; behind the last group the mean, or x where no patch is
//   sums, x [images, height, width, C] f32   output [images, count, rows, columns, C] T, guided twice that, of which a
//   predicted variance is no part
//   guidance [images * count, 2]   factors [images * count]   elements = images * height * width * C
// Memory bound: 12 * elements bytes and the output once. Launch: grid ceil(elements / kThreads), block kThreads.
template <class T>
DEVICE void step_patches(float* sums, const float* x, const Output<T>& output, const float* table, const unsigned* step,
                         int64_t elements, const Patches& p) {
    const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(element < elements)) return;
    const Place cell(element, p.height, p.width, p.channels);
    const int first = int(*p.first);
    const float* k = table + size_t(step[0]) * kColumns;
    const float now = x[element], clip = k[kClip];
    float sum = first == 0 ? 0.f : sums[element];
    int at = 0;
    for (int index = 0; index < p.count; index++) {
        if (!cell_of(at, p, origin(p, cell.n, first + index), cell.row, cell.column)) continue;
        const int64_t patch = cell.n * p.count + index;
        const float e = output.at((patch * p.rows * p.columns + at) * p.channels + cell.channel, patch);
        float clean = k[kX0FromX] * now + k[kX0FromE] * e;
        // NaN stays NaN: neither comparison holds.
        clean = clean > clip ? clip : clean < -clip ? -clip : clean;
        sum += k[kNextFromX] * now + k[kNextFromE] * e + k[kNextFromX0] * clean;
    }
    if (first + p.count == p.total) {
        int holders = 0;
        for (int index = 0; index < p.total; index++) {
            if (cell_of(at, p, origin(p, cell.n, index), cell.row, cell.column)) holders++;
        }
        sum = holders == 0 ? now : sum / float(holders);
    }
    sums[element] = sum;
}

// merge_patches: all patches of each image, weighed by their rows and columns where they overlap.
//   y(cell) = sum_p rows[i] columns[j] values[p][i][j] / sum_p rows[i] columns[j], over the patches p that hold the cell, in
//   their order; 0 where there is none
//   y [images, height, width, C]   values [images, total, p.rows, p.columns, C]   rows [p.rows], columns [p.columns]; all f32
//   elements = images * height * width * C
// Memory bound: y and values once. Launch: grid ceil(elements / kThreads), block kThreads.
KERNEL(merge_patches, kThreads, 1)
(float* y, const float* values, const float* rows, const float* columns, int64_t elements, GRID_CONST Patches patches) {
    follow_previous();
    const Patches& p = patches;
    const int64_t element = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(element < elements)) return;
    const Place cell(element, p.height, p.width, p.channels);
    float sum = 0.f, weights = 0.f;
    int at = 0;
    for (int index = 0; index < p.total; index++) {
        if (!cell_of(at, p, origin(p, cell.n, index), cell.row, cell.column)) continue;
        const float weight = rows[at / p.columns] * columns[at % p.columns];
        const int64_t patch = cell.n * p.total + index;
        sum += weight * values[(patch * p.rows * p.columns + at) * p.channels + cell.channel];
        weights += weight;
    }
    y[element] = weights == 0.f ? 0.f : sum / weights;
}
REGISTER_KERNEL(merge_patches)

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(gather_patches_##suffix, kThreads, 1)                                                                       \
    (T* y, const float* x, const float* from, const float* to, const float* table, const unsigned* step,               \
     int64_t elements, int repeats, GRID_CONST Patches patches) {                                                      \
        follow_previous();                                                                                             \
        gather_patches<T>(y, x, from, to, table, step, elements, repeats, patches);                                    \
    }                                                                                                                  \
    REGISTER_KERNEL(gather_patches_##suffix)                                                                           \
    KERNEL(step_patches_##suffix, kThreads, 1)                                                                         \
    (float* sums, const float* x, const T* output, const float* guidance, const float* factors, const float* table,    \
     const unsigned* step, int64_t elements, int64_t outputs, int variance_channels, GRID_CONST Patches patches) {     \
        follow_previous();                                                                                             \
        const Output<T> guided{output, guidance, factors, outputs, variance_channels};                                 \
        step_patches<T>(sums, x, guided, table, step, elements, patches);                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(step_patches_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
