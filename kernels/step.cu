// step.cu: the step index that every table of a captured step is read by.
#include "common/device.cuh"

// advance_step: index [1] += 1, in the stream's order: the last launch of a captured step. Launch: one thread.
KERNEL(advance_step, 1, 1)(unsigned* index) { *index += 1; }
REGISTER_KERNEL(advance_step)
