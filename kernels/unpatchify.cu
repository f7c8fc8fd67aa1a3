// unpatchify.cu: a picture from the tokens of its patches; the last layer of a diffusion transformer (Peebles & Xie 2023,
//   arXiv:2212.09748, sec. 3.2).
//   y[n, h p + i, w p + j, c] = x[n, h, w, i, j, c]      x [N, H, W, p, p, C]   y [N, H p, W p, C]
// Row i of a patch, p C elements, lies in one piece in both: a `run`. Memory bound: every element once each way.
// Launch: grid ceil(units / kThreads), block kThreads, a unit a thread: 16 bytes, or an element where p C is no whole number of
// them or an address is not aligned. `run`, counted in units.
#include "common/vector.cuh"

constexpr int kThreads = 256;

template <class Unit>
DEVICE void unpatchify(Unit* y, const Unit* x, int64_t units, int width, int patch, int run) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < units)) return;
    // In the order of y: [N H, p, W, run].
    const int in_run = int(i % run);
    const int64_t of_y = i / run;
    const int w = int(of_y % width), row = int(of_y / width % patch);
    const int64_t h = of_y / width / patch;
    y[i] = x[((h * width + w) * patch + row) * run + in_run];
}

#define ENTRY(name, Unit)                                                                                   \
    KERNEL(name, kThreads, 1)(Unit* y, const Unit* x, int64_t units, int width, int patch, int run) {       \
        follow_previous();                                                                                  \
        unpatchify(y, x, units, width, patch, run);                                                         \
    }                                                                                                       \
    REGISTER_KERNEL(name)

ENTRY(unpatchify_wide, uint4)
ENTRY(unpatchify_f32, float)
ENTRY(unpatchify_f16, f16)
ENTRY(unpatchify_bf16, bf16)
