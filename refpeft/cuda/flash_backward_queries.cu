#include "common.cuh"
#include "mma.cuh"
#include "flash.cuh"

// What the backward pass needs of each query, (batch, heads, 2, rows): log2(e) lse, and the sum of g y over DIM; zeros
// from `queries` to `rows`. Reads g and y once: 4 DIM bytes a query; `share` threads, a power of two, treat one, eight
// numbers each.
extern "C" __global__ void flash_statistics(
    const real* g, long long g_batch, long long g_head, long long g_time,
    const real* y, long long y_batch, long long y_head, long long y_time,
    const float* lse, float* statistics, int queries, int rows, int share) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) / share, column = threadIdx.x % share * 8;
    long long head = (long long)blockIdx.z * gridDim.y + blockIdx.y;
    float sum = 0;
    if (i < queries && column < DIM) {
        float left[8], right[8];
        load8(g + blockIdx.z * g_batch + blockIdx.y * g_head + i * g_time + column, left);
        load8(y + blockIdx.z * y_batch + blockIdx.y * y_head + i * y_time + column, right);
#pragma unroll
        for (int e = 0; e < 8; e++) sum = fmaf(left[e], right[e], sum);
    }
    for (int step = share / 2; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (column == 0 && i < rows) {
        statistics[2 * head * rows + i] = i < queries ? lse[head * queries + i] * LOG2E : 0;
        statistics[(2 * head + 1) * rows + i] = sum;
    }
}

// dq = scale (p (g v^T - sum of g y)) k, with p = exp(scale q k^T - lse) computed again. Blocks as in flash_forward; a
// block's shared memory: a tile of q, one of g, two of k, two of v.
extern "C" __global__ void __launch_bounds__(THREADS) flash_backward_queries(
    const real* g, long long g_batch, long long g_head, long long g_time,
    const real* q, long long q_batch, long long q_head, long long q_time,
    const real* k, long long k_batch, long long k_head, long long k_time,
    const real* v, long long v_batch, long long v_head, long long v_time,
    const float* statistics, real* dq, long long dq_batch, long long dq_head, long long dq_time,
    int rows, int group, float scale,
    int queries, int keys, int extra, int causal, int window, const Numbers* of_queries, const Numbers* of_keys) {
    extern __shared__ __align__(16) unsigned char shared[];
    real* q_tile = reinterpret_cast<real*>(shared);
    real* g_tile = q_tile + BLOCK * STRIDE;
    real* buffers = g_tile + BLOCK * STRIDE;

    int heads = gridDim.y, head = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int start = (gridDim.x - 1 - blockIdx.x) * BLOCK, row = start + warp * ROWS;
    Mask mask = {queries, keys, extra, causal, window,
                 numbers_of(of_queries, b, queries), numbers_of(of_keys, b, keys)};
    g += b * g_batch + head * g_head;
    q += b * q_batch + head * q_head;
    k += b * k_batch + head / group * k_head;
    v += b * v_batch + head / group * v_head;
    statistics += 2 * ((long long)b * heads + head) * rows;

    Kind kind;
    int end = causal ? min(keys, mask.position(min(start + BLOCK, queries) - 1) + 1) : keys;
    auto visible = [&](int key) {  // the first key of the next tile that is not hidden, from this tile on
        for (; key < end; key += COLUMNS)
            if ((kind = mask.kind(start, start + BLOCK, key, key + COLUMNS)) != HIDDEN) break;
        return key;
    };
    auto load = [&](int key, int stage) {
        real* tiles = buffers + stage * 2 * COLUMNS * STRIDE;
        load_tile<COLUMNS>(tiles, k, k_time, key, keys);
        load_tile<COLUMNS>(tiles + COLUMNS * STRIDE, v, v_time, key, keys);
    };

    float sums[DOWN][WIDE][4] = {}, lse[DOWN][2], delta[DOWN][2];
#pragma unroll
    for (int r = 0; r < 2 * DOWN; r++) {  // `rows` is a multiple of 128: no row of a block is beyond
        lse[r / 2][r % 2] = statistics[row + 8 * r + lane / 4];
        delta[r / 2][r % 2] = statistics[rows + row + 8 * r + lane / 4];
    }
    float per_score = scale * LOG2E;

    load_tile<BLOCK>(q_tile, q, q_time, start, queries);
    load_tile<BLOCK>(g_tile, g, g_time, start, queries);
    int key = visible(0);
    if (key < end) load(key, 0);
    cp_async_commit();
    for (int stage = 0, next; key < end; stage ^= 1, key = next) {
        Kind now = kind == PART ? mask.kind(row, row + ROWS, key, key + COLUMNS) : kind;  // to this warp's queries
        next = visible(key + COLUMNS);
        cp_async_wait<0>();
        __syncthreads();  // this tile is here, and all have done with the one before
        if (next < end) load(next, stage ^ 1);
        cp_async_commit();
        if (now == HIDDEN) continue;

        const real* k_tile = buffers + stage * 2 * COLUMNS * STRIDE;
        float p[DOWN][ACROSS][4] = {}, dp[DOWN][ACROSS][4] = {};
        multiply_rows(p, q_tile + warp * ROWS * STRIDE, k_tile);
        if (now == PART) hide<false>(p, mask, row, key);
        multiply_rows(dp, g_tile + warp * ROWS * STRIDE, k_tile + COLUMNS * STRIDE);
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float weight = exp2_fast(fmaf(p[m][n][e], per_score, -lse[m][e / 2]));
                    dp[m][n][e] = weight * (dp[m][n][e] - delta[m][e / 2]);
                }
        add_weighted(sums, dp, k_tile);
    }

    cp_async_wait<0>();
    __syncthreads();  // where all tiles were hidden, the queries are still on their way to what is used again below
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int n = 0; n < WIDE; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[m][n][e] *= scale;
    dq += b * dq_batch + head * dq_head + row * dq_time;
    store_rows(sums, q_tile + warp * ROWS * STRIDE, dq, dq_time, queries - row);
}
