// elementwise.cu: the few pointwise ops that no other kernel absorbs.   T, U = f32 | f16 | bf16
//
// Memory bound: every operand once. Launch of all: grid ceil(count / (kThreads kVector)), block kThreads; a thread takes
// kVector elements, 16 bytes at a time where the addresses allow it. Any alignment. concat: one unit per thread.
#include "common/activation.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;

// y[i] = f(x[i]) in f32.
template <class T, class F>
DEVICE void map(T* y, const T* x, int64_t count, F f) {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    if (aligned16(x) && aligned16(y) && first + kVector <= count) {
        float values[kVector];
        load<kVector>(values, x + first);
        UNROLL
        for (int j = 0; j < kVector; j++) values[j] = f(values[j]);
        store<kVector>(y + first, values);
        return;
    }
    for (int64_t i = first; i < first + kVector; i++) {
        if (GUARD(i < count)) y[i] = from_f32<T>(f(to_f32(x[i])));
    }
}

// activation: y = f(x), all but GEGLU.   y, x [count]
template <class T>
DEVICE void activation(T* y, const T* x, int kind, int64_t count) {
    map(y, x, count, [kind](float v) {
        switch (kind) {
            case kSilu: return silu(v);
            case kGelu: return gelu(v);
            case kQuickGelu: return quick_gelu(v);
            case kGeluTanh: return gelu_tanh(v);
            default: return v;
        }
    });
}

// y = a + factor(i) b in f32, rounded once. `whole`: elements of a vector have one factor.
template <class T, class Factor>
DEVICE void add_by(T* y, const T* a, const T* b, int64_t count, bool whole, Factor factor) {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    if (whole && aligned16(a) && aligned16(b) && aligned16(y) && first + kVector <= count) {
        const float of_vector = factor(first);
        float sums[kVector], values[kVector];
        load<kVector>(sums, a + first);
        load<kVector>(values, b + first);
        UNROLL
        for (int j = 0; j < kVector; j++) sums[j] = fmaf(of_vector, values[j], sums[j]);
        store<kVector>(y + first, sums);
        return;
    }
    for (int64_t i = first; i < first + kVector; i++) {
        if (GUARD(i < count)) y[i] = from_f32<T>(fmaf(factor(i), to_f32(b[i]), to_f32(a[i])));
    }
}

// add: y = a + scale b.   y, a, b [count]
template <class T>
DEVICE void add(T* y, const T* a, const T* b, float scale, int64_t count) {
    add_by(y, a, b, count, true, [scale](int64_t) { return scale; });
}

// add_masked: y = a + scale mask b; the mask has one for each token.
//   y, a, b [count / (tokens channels), tokens, channels], mask [tokens] f32
template <class T>
DEVICE void add_masked(T* y, const T* a, const T* b, const float* mask, float scale, int tokens, int channels,
                       int64_t count) {
    // Whole vectors lie within a token.
    const bool whole = channels % kVector == 0;
    add_by(y, a, b, count, whole, [=](int64_t i) { return scale * mask[i / channels % tokens]; });
}

// scale_cast: y[r] = scale x + shift in U, r < repeats.   y [repeats, count], x [count]
template <class U, class T>
DEVICE void scale_cast(U* y, const T* x, float scale, float shift, int64_t count, int repeats) {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    // With several copies, each must begin at an aligned address.
    const bool vectors = aligned16(x) && aligned16(y) && (repeats == 1 || count % kVector == 0);
    if (vectors && first + kVector <= count) {
        float values[kVector];
        load<kVector>(values, x + first);
        UNROLL
        for (int j = 0; j < kVector; j++) values[j] = fmaf(scale, values[j], shift);
        for (int r = 0; r < repeats; r++) store<kVector>(y + r * count + first, values);
        return;
    }
    for (int64_t i = first; i < first + kVector; i++) {
        if (!GUARD(i < count)) break;
        const U value = from_f32<U>(fmaf(scale, to_f32(x[i]), shift));
        for (int r = 0; r < repeats; r++) y[r * count + i] = value;
    }
}

struct alignas(16) Bytes16 {
    unsigned words[4];
};

// concat: y = a and b side by side, copied in units U: elements, or 16 bytes where rows and addresses are whole ones.
//   y [rows, Ca + Cb], a [rows, Ca], b [rows, Cb], the sizes in units. Launch: grid ceil(rows (Ca + Cb) / kThreads).
template <class U>
DEVICE void concat(U* y, const U* a, const U* b, int channels_a, int channels_b, int64_t rows) {
    const int channels = channels_a + channels_b;
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (!GUARD(i < rows * channels)) return;
    const int64_t row = i / channels;
    const int c = int(i - row * channels);
    y[i] = c < channels_a ? a[row * channels_a + c] : b[row * channels_b + (c - channels_a)];
}

// count_non_finite: counter [1] += the number of NaN and infinities in x [count].
template <class T>
DEVICE void count_non_finite(int* counter, const T* x, int64_t count) {
    const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kVector;
    int found = 0;
    if (aligned16(x) && first + kVector <= count) {
        float values[kVector];
        load<kVector>(values, x + first);
        UNROLL
        for (int j = 0; j < kVector; j++) found += !is_finite(values[j]);
    } else {
        for (int64_t i = first; i < first + kVector; i++) {
            if (GUARD(i < count)) found += !is_finite(to_f32(x[i]));
        }
    }
    found = warp_sum(found);
    if (threadIdx.x % 32 == 0 && found > 0) atomicAdd(counter, found);
}

#define ENTRIES(T, suffix)                                                                                            \
    KERNEL(activation_##suffix, kThreads, 1)(T* y, const T* x, int kind, int64_t count) {                             \
        follow_previous();                                                                                            \
        activation(y, x, kind, count);                                                                                \
    }                                                                                                                 \
    REGISTER_KERNEL(activation_##suffix)                                                                              \
    KERNEL(add_##suffix, kThreads, 1)(T* y, const T* a, const T* b, float scale, int64_t count) {                     \
        follow_previous();                                                                                            \
        add(y, a, b, scale, count);                                                                                   \
    }                                                                                                                 \
    REGISTER_KERNEL(add_##suffix)                                                                                     \
    KERNEL(add_masked_##suffix, kThreads, 1)(T* y, const T* a, const T* b, const float* mask, float scale,            \
                                             int tokens, int channels, int64_t count) {                               \
        follow_previous();                                                                                            \
        add_masked(y, a, b, mask, scale, tokens, channels, count);                                                    \
    }                                                                                                                 \
    REGISTER_KERNEL(add_masked_##suffix)                                                                              \
    KERNEL(clamp_##suffix, kThreads, 1)(T* y, const T* x, float low, float high, int64_t count) {                     \
        follow_previous();                                                                                            \
        map(y, x, count, [=](float v) { return clamp(v, low, high); });                                               \
    }                                                                                                                 \
    REGISTER_KERNEL(clamp_##suffix)                                                                                   \
    KERNEL(scale_cast_##suffix##_f32, kThreads, 1)(float* y, const T* x, float scale, float shift, int64_t count,     \
                                                   int repeats) {                                                     \
        follow_previous();                                                                                            \
        scale_cast(y, x, scale, shift, count, repeats);                                                               \
    }                                                                                                                 \
    REGISTER_KERNEL(scale_cast_##suffix##_f32)                                                                        \
    KERNEL(scale_cast_##suffix##_f16, kThreads, 1)(f16* y, const T* x, float scale, float shift, int64_t count,       \
                                                   int repeats) {                                                     \
        follow_previous();                                                                                            \
        scale_cast(y, x, scale, shift, count, repeats);                                                               \
    }                                                                                                                 \
    REGISTER_KERNEL(scale_cast_##suffix##_f16)                                                                        \
    KERNEL(scale_cast_##suffix##_bf16, kThreads, 1)(bf16* y, const T* x, float scale, float shift, int64_t count,     \
                                                    int repeats) {                                                    \
        follow_previous();                                                                                            \
        scale_cast(y, x, scale, shift, count, repeats);                                                               \
    }                                                                                                                 \
    REGISTER_KERNEL(scale_cast_##suffix##_bf16)                                                                       \
    KERNEL(count_non_finite_##suffix, kThreads, 1)(int* counter, const T* x, int64_t count) {                         \
        follow_previous();                                                                                            \
        count_non_finite(counter, x, count);                                                                          \
    }                                                                                                                 \
    REGISTER_KERNEL(count_non_finite_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)

#define CONCAT(U, suffix)                                                                                             \
    KERNEL(concat_##suffix, kThreads, 1)(U* y, const U* a, const U* b, int channels_a, int channels_b, int64_t rows) { \
        follow_previous();                                                                                            \
        concat(y, a, b, channels_a, channels_b, rows);                                                                \
    }                                                                                                                 \
    REGISTER_KERNEL(concat_##suffix)

CONCAT(float, f32)
CONCAT(f16, f16)
CONCAT(bf16, bf16)
CONCAT(Bytes16, wide)
