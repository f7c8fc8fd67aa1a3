// embedding.cu: tokens to vectors.
#include "common/vector.cuh"

constexpr int kThreads = 128;

// embedding: y[n, l] = table[ids[n, l]] + positions[l], in f32, rounded once.
//   y [N, L, C]   ids [N, L], each below V: the op has checked   table [V, C]   positions [>= L, C]   T = f32 | f16 | bf16
// Launch: grid N * L, block kThreads. `vector`: C is a multiple of kVector and the tensors are aligned to 16 bytes.
template <int V, class T>
DEVICE void embedding(T* y, const unsigned* ids, const T* table, const T* positions, int length, int channels) {
    y += int64_t(blockIdx.x) * channels;
    table += int64_t(ids[blockIdx.x]) * channels;
    positions += int64_t(blockIdx.x % length) * channels;
    for (int c = threadIdx.x * V; c < channels; c += kThreads * V) {
        float token[V], position[V];
        load<V>(token, table + c);
        load<V>(position, positions + c);
        UNROLL
        for (int j = 0; j < V; j++) token[j] += position[j];
        store<V>(y + c, token);
    }
}

#define ENTRIES(T, suffix)                                                                                          \
    KERNEL(embedding_##suffix, kThreads, 1)(T* y, const unsigned* ids, const T* table, const T* positions,          \
                                            int length, int channels, int vector) {                                 \
        follow_previous();                                                                                          \
        if (vector) {                                                                                               \
            embedding<kVector>(y, ids, table, positions, length, channels);                                         \
        } else {                                                                                                    \
            embedding<1>(y, ids, table, positions, length, channels);                                               \
        }                                                                                                           \
    }                                                                                                               \
    REGISTER_KERNEL(embedding_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
