// linear.cu, linear: y[M, N] = gate[r(m), N] activation(x[M, K] weight[columns, K]^T + bias[columns]) + residual[M, N],
//   for every card; what the names are, and what is done to a sum, is in common/linear.cuh.
// Compute bound from M ~ 300 on (bf16, H100-class): 2 M columns K flops; below, the weight's columns K sizeof(T) bytes.
// Launch: linear_<tile>_<dtype>, grid ceil(M / kM) * ceil(columns / kN), block Tile::kThreads, dynamic shared memory
// sizeof(Tile::Shared); src/ops/cuda/tiles.rs has the table. `general` takes any K and alignment; the others ask that
// K % Chunk<T>::kCount == 0 and that x and weight are aligned to 16 bytes.
#include "common/epilogue_linear.cuh"

template <class Tile>
DEVICE void linear(const LinearArgs<typename Tile::T>& args) {
    SHARED_DYNAMIC(typename Tile::Shared, s);
    const TileOrigin origin = tile_origin<Tile>(args.m, args.columns);
    auto a = dense_rows<Tile>(args.x, origin.m, args.m, args.k, 0, args.wide & kWideX);
    auto b = dense_rows<Tile>(args.weight, origin.n, args.columns, args.k, 0, args.wide & kWideWeight);
    Sums<Tile> sums = {};
    product<Tile>(sums, s, a, b, (args.k + Tile::kSlice - 1) / Tile::kSlice);
    write_out<Tile>(sums, s, origin, args);
}

#define LINEAR(name, T, min_blocks, ...)                                                         \
    KERNEL(linear_##name, (Tile<T, __VA_ARGS__>::kThreads), min_blocks)(const LinearArgs<T> args) { \
        follow_previous();                                                                          \
        linear<Tile<T, __VA_ARGS__>>(args);                                                      \
    }                                                                                            \
    REGISTER_KERNEL(linear_##name)

#include "common/tiles.cuh"
TILES(LINEAR)
