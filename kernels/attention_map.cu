// attention_map.cu: what cross-attention attends to, as a map over its queries, and attention by a map that is given. FreCaS,
// Zhang et al. 2024, arXiv:2410.18410.
//
//   attention_map         sum (+)= mean over heads of softmax(scale q k^T)
//   blend_attention_map   y = (1 - weight) x + weight map v, the same map for every head
//     q [N, queries, heads, head_dim] T   kv [rows, keys, 2, heads, head_dim] T, of which each row serves `images` of the N
//     sum, map [N, queries, keys] f32   x, y [N, queries, heads, head_dim] T   T = f32 | f16 | bf16
// attention_map: one warp per query, a lane has every 32nd key; scores are computed twice, so that their number has no limit. K is
// read from L2 for each query: it is for one evaluation of a run. Launch: grid ceil(N queries / kWarps).
// blend_attention_map: y and x once, v once per kQueries queries, 2 keys flops per element of y. A block has kQueries queries and
// kChannels channels (of all heads, which lie side by side), a thread 4 x 2 sums. Launch: grid (ceil(queries / kQueries),
// ceil(channels / kChannels), N). Block kThreads, both.
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/vector.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kQueries = 32;
constexpr int kChannels = 64;
constexpr int kKeys = 16;  // of a step of the sums

DEVICE float warp_max(float value) {
    UNROLL
    for (int lanes = 16; lanes > 0; lanes /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
    return value;
}

template <int V, class T>
DEVICE float dot(const T* a, const T* b, int count) {
    float sum = 0.f;
    for (int i = 0; i < count; i += V) {
        float of_a[V], of_b[V];
        load<V>(of_a, a + i);
        load<V>(of_b, b + i);
        UNROLL
        for (int v = 0; v < V; v++) sum = fmaf(of_a[v], of_b[v], sum);
    }
    return sum;
}

template <int V, class T>
DEVICE void attention_map(float* sum, const T* q, const T* kv, int queries, int keys, int heads, int head_dim, int images,
                          float scale, int adds, int64_t count) {
    const int64_t query = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (!GUARD(query < count)) return;
    const int lane = threadIdx.x % 32, channels = heads * head_dim;
    const T* k = kv + query / queries / images * keys * 2 * channels;
    q += query * channels;
    sum += query * keys;
    const float share = 1.f / float(heads);
    for (int head = 0; head < heads; head++, q += head_dim, k += head_dim) {
        const auto score = [=](int key) { return scale * dot<V>(q, k + int64_t(key) * 2 * channels, head_dim); };
        // Not fmaxf, which drops NaN: a total that has seen one keeps it.
        float top = -INFINITY, total = 0.f;
        for (int key = lane; key < keys; key += 32) {
            const float s = score(key), higher = fmaxf(top, s);
            total = total * exp2_approx(kLog2E * (top - higher)) + exp2_approx(kLog2E * (s - higher));
            top = higher;
        }
        const float highest = warp_max(top);
        total = warp_sum(total * exp2_approx(kLog2E * (top - highest)));
        for (int key = lane; key < keys; key += 32) {
            const float p = exp2_approx(kLog2E * (score(key) - highest)) / total;
            sum[key] = fmaf(p, share, adds != 0 || head > 0 ? sum[key] : 0.f);
        }
    }
}

template <class T>
DEVICE void blend_attention_map(T* y, const T* x, const float* map, const T* kv, int queries, int keys, int channels,
                                int images, float weight) {
    SHARED_STATIC(float, shares, [kKeys][kQueries + 1]);
    SHARED_STATIC(float, values, [kKeys][kChannels]);
    const int first_query = blockIdx.x * kQueries, first_channel = blockIdx.y * kChannels;
    const int thread = threadIdx.x, column = thread % 32, row = thread / 32 * 4;
    map += int64_t(blockIdx.z) * queries * keys;
    const T* v = kv + (int64_t(blockIdx.z) / images * keys * 2 + 1) * channels;
    float sums[4][2] = {};
    for (int first = 0; first < keys; first += kKeys) {
        __syncthreads();
        UNROLL
        for (int i = thread; i < kKeys * kQueries; i += kThreads) {
            const int key = first + i % kKeys, query = first_query + i / kKeys;
            const bool inside = GUARD(key < keys) && GUARD(query < queries);
            shares[i % kKeys][i / kKeys] = inside ? map[int64_t(query) * keys + key] : 0.f;
        }
        UNROLL
        for (int i = thread; i < kKeys * kChannels; i += kThreads) {
            const int key = first + i / kChannels, channel = first_channel + i % kChannels;
            const bool inside = GUARD(key < keys) && GUARD(channel < channels);
            values[i / kChannels][i % kChannels] = inside ? to_f32(v[int64_t(key) * 2 * channels + channel]) : 0.f;
        }
        __syncthreads();
        UNROLL
        for (int key = 0; key < kKeys; key++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int j = 0; j < 2; j++) {
                    sums[i][j] = fmaf(shares[key][row + i], values[key][column + 32 * j], sums[i][j]);
                }
            }
        }
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int j = 0; j < 2; j++) {
            const int query = first_query + row + i, channel = first_channel + column + 32 * j;
            if (!GUARD(query < queries) || !GUARD(channel < channels)) continue;
            const int64_t at = (int64_t(blockIdx.z) * queries + query) * channels + channel;
            y[at] = from_f32<T>((1.f - weight) * to_f32(x[at]) + weight * sums[i][j]);
        }
    }
}

#define ENTRIES(T, suffix)                                                                                             \
    KERNEL(attention_map_##suffix, kThreads, 1)(float* sum, const T* q, const T* kv, int queries, int keys, int heads, \
                                                int head_dim, int images, float scale, int adds, int vector,           \
                                                int64_t count) {                                                       \
        follow_previous();                                                                                             \
        if (vector) {                                                                                                  \
            attention_map<kVector>(sum, q, kv, queries, keys, heads, head_dim, images, scale, adds, count);            \
        } else {                                                                                                       \
            attention_map<1>(sum, q, kv, queries, keys, heads, head_dim, images, scale, adds, count);                  \
        }                                                                                                              \
    }                                                                                                                  \
    REGISTER_KERNEL(attention_map_##suffix)                                                                            \
    KERNEL(blend_attention_map_##suffix, kThreads, 1)(T* y, const T* x, const float* map, const T* kv, int queries,    \
                                                      int keys, int channels, int images, float weight) {              \
        follow_previous();                                                                                             \
        blend_attention_map(y, x, map, kv, queries, keys, channels, images, weight);                                   \
    }                                                                                                                  \
    REGISTER_KERNEL(blend_attention_map_##suffix)

ENTRIES(float, f32)
ENTRIES(f16, f16)
ENTRIES(bf16, bf16)
