// repaint.cu: what inpainting keeps of a picture goes back into the samples after each evaluation, noised to the level at
// which the next one is made. As diffusers' StableDiffusionInpaintPipeline; Lugmayr et al. 2022, arXiv:2201.09865, eq. (8).
//   x = known where the mask is below 1/2: signal * known + sigma * noise; as it was elsewhere
//   x, known, noise [images, pixels, channels] f32   mask [pixels] f32, the same for all images   count = all of x
//   levels [steps, 2] f32: signal and sigma after the evaluation of that row
//   step [2, step_images]: of each image its row, then how many evaluations it still makes, of which none: it has ended and
//   keeps its samples. A larger batch repeats the step_images.
// Memory bound: 12 bytes per value that is kept, 4 per pixel. Launch: grid ceil(count / kThreads), block kThreads.
#include "common/device.cuh"

constexpr int kThreads = 256;

KERNEL(repaint_f32, kThreads, 1)(float* x, const float* known, const float* noise, const float* mask, const float* levels,
                                 const unsigned* step, int step_images, int64_t per_image, int channels, int64_t count) {
    follow_previous();
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < count)) return;
    const int64_t image = i / per_image % step_images;
    if (step[step_images + image] == 0 || !(mask[i % per_image / channels] < 0.5f)) return;
    const float* level = levels + size_t(step[image]) * 2;
    x[i] = fmaf(level[0], known[i], level[1] * noise[i]);
}
REGISTER_KERNEL(repaint_f32)
