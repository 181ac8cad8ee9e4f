// Going back through layers that read the same x, whose low-rank factors add u up^T: du = g up and dB = g^T u from one
// pass over g (rows, out). Two products would read g twice, and take as long as that.
//
// A strip is up to STRIP columns of g, all of one layer. A block walks over some rows of a strip, in chunks of ROWS that
// are copied to shared memory while the ones before are in use. Of a chunk each warp multiplies a few rows by the
// strip's rows of `up`, which stay in its registers: a part of du, over a strip. And it multiplies the transpose of a few
// columns by the chunk's rows of u, and keeps the sums: in the end a part of dB, over the block's rows. `add_parts` adds
// up parts, always in the same order. They are written and read once: for each number of g 64 / STRIP bytes of du's, and
// 64 / (a block's rows) of dB's, of RANK numbers each.

#include "common.cuh"
#include "mma.cuh"

constexpr int RANK = 16, ROWS = 64, STAGES = 3, WARPS = 4, THREADS = 32 * WARPS;
constexpr int STEPS = STRIP / 16;         // of sums over a strip's columns
constexpr int DOWN = STRIP / WARPS / 16;  // tiles of 16 columns that a warp makes dB of
constexpr int WIDE = STRIP + 8, NARROW = RANK + 8;  // odd numbers of 16 bytes: what ldmatrix reads lies in all banks
constexpr int STAGE = ROWS * (WIDE + NARROW);

struct Strip {
    int column, width;  // of g, and rows of `up`; the width is a multiple of 8
    int u, rank;        // columns of u, du and `up`: the layer's; the rank is a multiple of 8, RANK at most
};

// Starts to copy rows of `width` numbers to rows of COLUMNS in shared memory; zeros in the place of what there is not.
template <int COUNT, int COLUMNS, int STEP>
__device__ inline void load(real* to, const real* from, long long step, int rows, int width) {
    constexpr int ACROSS = COLUMNS / 8;
    for (int at = threadIdx.x; at < COUNT * ACROSS; at += THREADS) {
        int row = at / ACROSS, column = at % ACROSS * 8;
        cp_async_16(to + row * STEP + column, from + row * step + column, row < rows && column < width);
    }
}

// Parts of du: (strips, rows, RANK). Parts of dB: (segments, strips * STRIP, RANK). Grid: (strips, segments), each
// segment `chunks` times ROWS rows. Shared memory: STAGES times STAGE.
extern "C" __global__ void __launch_bounds__(THREADS, 2) both_ways(
    const real* g, long long g_step, const real* u, long long u_step, const real* up, long long up_step,
    const Strip* strips, int rows, int chunks, float* du_parts, float* dB_parts) {
    extern __shared__ __align__(16) unsigned char shared[];
    real* stages = reinterpret_cast<real*>(shared);
    Strip strip = strips[blockIdx.x];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first = blockIdx.y * chunks, count = min(chunks, (rows + ROWS - 1) / ROWS - first);
    g += strip.column;
    u += strip.u;
    up += strip.column * up_step + strip.u;

    auto fetch = [&](int chunk) {
        if (chunk < count) {
            real* stage = stages + chunk % STAGES * STAGE;
            int row = (first + chunk) * ROWS;
            load<ROWS, STRIP, WIDE>(stage, g + row * g_step, g_step, rows - row, strip.width);
            load<ROWS, RANK, NARROW>(stage + ROWS * WIDE, u + row * u_step, u_step, rows - row, strip.rank);
        }
        cp_async_commit();
    };

    real* rows_of_up = stages + 2 * STAGE;  // until the third chunk is fetched
    load<STRIP, RANK, NARROW>(rows_of_up, up, up_step, strip.width, strip.rank);
    cp_async_commit();
    fetch(0);
    fetch(1);
    cp_async_wait<2>();
    __syncthreads();
    unsigned int factor[STEPS][4];
#pragma unroll
    for (int k = 0; k < STEPS; k++)
        ldmatrix_x4_trans(factor[k], rows_of_up + (16 * k + lane % 16) * NARROW + lane / 16 * 8);

    float dB[DOWN][2][4] = {};
    for (int chunk = 0; chunk < count; chunk++) {
        cp_async_wait<1>();
        __syncthreads();  // this chunk is here, and all have done with the one before
        fetch(chunk + 2);
        const real* rows_of_g = stages + chunk % STAGES * STAGE;
        const real* rows_of_u = rows_of_g + ROWS * WIDE;

        float du[2][2][4] = {};  // sums over even and over odd steps, which do not wait for each other
        const real* mine = rows_of_g + (16 * warp + lane % 16) * WIDE + lane / 16 * 8;
#pragma unroll
        for (int k = 0; k < STEPS; k++) {
            unsigned int left[4];
            ldmatrix_x4(left, mine + 16 * k);
            mma_bf16(du[k % 2][0], left, factor[k]);
            mma_bf16(du[k % 2][1], left, factor[k] + 2);
        }
        int row = (first + chunk) * ROWS + 16 * warp + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++)
                if (row + 8 * half < rows) {
                    float* to = du_parts + ((long long)blockIdx.x * rows + row + 8 * half) * RANK + 8 * n + lane % 4 * 2;
                    *reinterpret_cast<float2*>(to) = make_float2(du[0][n][2 * half] + du[1][n][2 * half],
                                                                 du[0][n][2 * half + 1] + du[1][n][2 * half + 1]);
                }

        mine = rows_of_g + (lane % 8 + lane / 16 * 8) * WIDE + STRIP / WARPS * warp + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < ROWS; k += 16) {
            unsigned int right[4];
            ldmatrix_x4_trans(right, rows_of_u + (k + lane % 16) * NARROW + lane / 16 * 8);
#pragma unroll
            for (int m = 0; m < DOWN; m++) {
                unsigned int left[4];
                ldmatrix_x4_trans(left, mine + k * WIDE + 16 * m);
                mma_bf16(dB[m][0], left, right);
                mma_bf16(dB[m][1], left, right + 2);
            }
        }
    }
    cp_async_wait<0>();

    dB_parts += ((long long)blockIdx.y * gridDim.x + blockIdx.x) * STRIP * RANK;
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int n = 0; n < 2; n++) {
                int column = STRIP / WARPS * warp + 16 * m + 8 * half + lane / 4;
                float* to = dB_parts + column * RANK + 8 * n + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(dB[m][n][2 * half], dB[m][n][2 * half + 1]);
            }
}

struct Layer {
    Strip all;  // its columns of g and u
    int strip;  // the first of its strips
    int unused[3];
};

__device__ inline float4 plus(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// du, and the same in `twin` where that is given, and dB (out, dB_step): scale times the sum, added to what is there if
// `add`. What lies beside a layer's columns in its rows of dB is left alone. A thread makes four numbers. Grid: (blocks,
// layers), with enough threads for all rows of du and then for the columns of the widest layer.
extern "C" __global__ void add_parts(const float4* du_parts, const float4* dB_parts, const Layer* layers, real* du,
                                     long long du_step, real* twin, long long twin_step, float* dB, long long dB_step,
                                     int rows, int strips, int segments, float scale, int add) {
    constexpr int ACROSS = RANK / 4;
    Layer layer = layers[blockIdx.y];
    int at = blockIdx.x * blockDim.x + threadIdx.x, column = at % ACROSS * 4, row = at / ACROSS;
    if (column >= layer.all.rank) return;
    float4 sum = make_float4(0, 0, 0, 0);
    if (row < rows) {
        const float4* part = du_parts + (long long)layer.strip * rows * ACROSS + at;
        int count = (layer.all.width + STRIP - 1) / STRIP;
#pragma unroll 8
        for (int i = 0; i < count; i++) sum = plus(sum, part[(long long)i * rows * ACROSS]);
        uint2 rounded = make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
        *reinterpret_cast<uint2*>(du + row * du_step + layer.all.u + column) = rounded;
        if (twin) *reinterpret_cast<uint2*>(twin + row * twin_step + layer.all.u + column) = rounded;
        return;
    }
    row -= rows;
    if (row >= layer.all.width) return;
    const float4* part = dB_parts + ((long long)layer.strip * STRIP + row) * ACROSS + column / 4;
#pragma unroll 8
    for (int i = 0; i < segments; i++) sum = plus(sum, part[(long long)i * strips * STRIP * ACROSS]);
    float4* to = reinterpret_cast<float4*>(dB + (layer.all.column + row) * dB_step + layer.all.u + column);
    float4 before = add ? *to : make_float4(0, 0, 0, 0);
    *to = make_float4(fmaf(scale, sum.x, before.x), fmaf(scale, sum.y, before.y), fmaf(scale, sum.z, before.z),
                      fmaf(scale, sum.w, before.w));
}
