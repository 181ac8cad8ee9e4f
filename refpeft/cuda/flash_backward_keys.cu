#include "common.cuh"
#include "mma.cuh"
#include "flash.cuh"

// dv = p^T g and dk = scale (p (g v^T - sum of g y))^T q, with p = exp(scale q k^T - lse) computed again: one of them,
// or both, as the constants DK and DV say. All is transposed here: a warp holds rows of keys, so that p^T and dp^T are
// left operands as they lie in its registers. A block treats BLOCK keys of a key head, blockIdx = (tile of keys, key
// head, batch), and walks over the queries of the `group` heads which share that key head, in their order: sums are
// always added up in the same order. `statistics` is made by flash_statistics. A block's shared memory: a tile of k,
// one of v if DK; twice a tile of q, one of g, and COLUMNS statistics of each kind.
constexpr int TILES = 2 * COLUMNS * STRIDE + 4 * COLUMNS;  // of q and g and, as floats, the statistics

extern "C" __global__ void __launch_bounds__(THREADS) flash_backward_keys(
    const real* g, long long g_batch, long long g_head, long long g_time,
    const real* q, long long q_batch, long long q_head, long long q_time,
    const real* k, long long k_batch, long long k_head, long long k_time,
    const real* v, long long v_batch, long long v_head, long long v_time,
    const float* statistics, real* dk, long long dk_batch, long long dk_head, long long dk_time,
    real* dv, long long dv_batch, long long dv_head, long long dv_time, int rows, int group, float scale,
    int queries, int keys, int extra, int causal, int window, const Numbers* of_queries, const Numbers* of_keys) {
    extern __shared__ __align__(16) unsigned char shared[];
    real* k_tile = reinterpret_cast<real*>(shared);
    real* v_tile = k_tile + BLOCK * STRIDE;
    real* buffers = DK ? v_tile + BLOCK * STRIDE : v_tile;

    int kv_heads = gridDim.y, kv_head = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int start = blockIdx.x * BLOCK, row = start + warp * ROWS;
    Mask mask = {queries, keys, extra, causal, window,
                 numbers_of(of_queries, b, queries), numbers_of(of_keys, b, keys)};
    int first_head = kv_head * group;
    g += b * g_batch + first_head * g_head;
    q += b * q_batch + first_head * q_head;
    k += b * k_batch + kv_head * k_head;
    v += b * v_batch + kv_head * v_head;
    statistics += 2 * ((long long)b * kv_heads * group + first_head) * rows;

    Kind kind;
    int earliest = causal ? max(0, start - mask.position(0)) / COLUMNS * COLUMNS : 0;  // tile of queries that sees any
    auto visible = [&](int query) {  // the first query of the next tile that is not hidden, from this tile on
        for (; query < queries; query += COLUMNS)
            if ((kind = mask.kind(query, query + COLUMNS, start, start + BLOCK)) != HIDDEN) break;
        return query;
    };
    auto load = [&](int head, int query, int stage) {
        real* tiles = buffers + stage * TILES;
        load_tile<COLUMNS>(tiles, q + head * q_head, q_time, query, queries);
        load_tile<COLUMNS>(tiles + COLUMNS * STRIDE, g + head * g_head, g_time, query, queries);
        float* of_tile = reinterpret_cast<float*>(tiles + 2 * COLUMNS * STRIDE);
        const float* from = statistics + 2 * (long long)head * rows + query;  // `rows` is a multiple of 128
        for (int at = threadIdx.x; at < COLUMNS / 2; at += THREADS) {
            int which = at / (COLUMNS / 4), four = at % (COLUMNS / 4) * 4;
            cp_async_16(of_tile + which * COLUMNS + four, from + which * rows + four, true);
        }
    };

    float of_k[DOWN][WIDE][4] = {}, of_v[DOWN][WIDE][4] = {};
    float per_score = scale * LOG2E;

    load_tile<BLOCK>(k_tile, k, k_time, start, keys);
    if (DK) load_tile<BLOCK>(v_tile, v, v_time, start, keys);
    int head = 0, query = visible(earliest);
    if (query >= queries) head = group;  // no query sees any of these keys
    else load(head, query, 0);
    cp_async_commit();
    for (int stage = 0, next_head, next; head < group; stage ^= 1, head = next_head, query = next) {
        Kind now = kind == PART ? mask.kind(query, query + COLUMNS, row, row + ROWS) : kind;  // to this warp's keys
        next_head = head;
        next = visible(query + COLUMNS);
        if (next >= queries) {
            next_head++;
            next = visible(earliest);
        }
        cp_async_wait<0>();
        __syncthreads();  // these tiles are here, and all have done with the ones before
        if (next_head < group) load(next_head, next, stage ^ 1);
        cp_async_commit();
        if (now == HIDDEN) continue;

        const real* q_tile = buffers + stage * TILES;
        const real* g_tile = q_tile + COLUMNS * STRIDE;
        const float* of_tile = reinterpret_cast<const float*>(g_tile + COLUMNS * STRIDE) + lane % 4 * 2;
        float p[DOWN][ACROSS][4] = {};
        multiply_rows(p, k_tile + warp * ROWS * STRIDE, q_tile);
        if (now == PART) hide<true>(p, mask, row, query);
#pragma unroll
        for (int n = 0; n < ACROSS; n++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                float lse = of_tile[8 * n + odd];
#pragma unroll
                for (int r = 0; r < 2 * DOWN; r++) {
                    float& each = p[r / 2][n][r % 2 * 2 + odd];
                    each = exp2_fast(fmaf(each, per_score, -lse));
                }
            }
        if (DV) add_weighted(of_v, p, g_tile);
        if (DK) {
            float dp[DOWN][ACROSS][4] = {};
            multiply_rows(dp, v_tile + warp * ROWS * STRIDE, g_tile);
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
#pragma unroll
                for (int odd = 0; odd < 2; odd++) {
                    float delta = of_tile[COLUMNS + 8 * n + odd];
#pragma unroll
                    for (int r = 0; r < 2 * DOWN; r++) {
                        int e = r % 2 * 2 + odd;
                        dp[r / 2][n][e] = p[r / 2][n][e] * (dp[r / 2][n][e] - delta);
                    }
                }
            add_weighted(of_k, dp, q_tile);
        }
    }

    cp_async_wait<0>();
    __syncthreads();  // where no query sees these keys, they are still on their way to what is used again below
    if (DV) {
        dv += b * dv_batch + kv_head * dv_head + row * dv_time;
        store_rows(of_v, k_tile + warp * ROWS * STRIDE, dv, dv_time, keys - row);
        __syncwarp();  // before the rows in shared memory are used again
    }
    if (DK) {
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int n = 0; n < WIDE; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) of_k[m][n][e] *= scale;
        dk += b * dk_batch + kv_head * dk_head + row * dk_time;
        store_rows(of_k, k_tile + warp * ROWS * STRIDE, dk, dk_time, keys - row);
    }
}
