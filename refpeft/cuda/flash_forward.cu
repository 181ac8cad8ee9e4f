#include "common.cuh"
#include "mma.cuh"
#include "flash.cuh"

// The numbers of the documents that queries and keys belong to, 32 of them a block: blockIdx.z is 0 for queries, which
// are tokens, the last of the keys, where `asking` is null; virtual tokens have number 0.
extern "C" __global__ void flash_numbers(const int* segments, const int* asking, Numbers* of_queries, Numbers* of_keys,
                                         int queries, int keys, int extra) {
    bool for_keys = blockIdx.z;
    int b = blockIdx.y, at = blockIdx.x * GRANULE + threadIdx.x, count = for_keys ? keys : queries;
    if (blockIdx.x >= (count + 127) / 128 * (128 / GRANULE)) return;
    int place = for_keys ? at : at + keys - queries;  // among the keys
    bool counts = at < count && (!for_keys || place >= extra);
    int number = 0;
    if (counts && asking && !for_keys) number = asking[(long long)b * queries + at];
    else if (counts && place >= extra) number = segments[(long long)b * (keys - extra) + place - extra];
    int least = counts ? number : LARGEST, most = counts ? number : -LARGEST;
    for (int step = 16; step; step >>= 1) {
        least = min(least, __shfl_xor_sync(0xffffffffu, least, step));
        most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
    }
    Numbers* here = const_cast<Numbers*>(numbers_of(for_keys ? of_keys : of_queries, b, count)) + blockIdx.x;
    here->of[threadIdx.x] = number;
    if (threadIdx.x == 0) {
        here->least = least;
        here->most = most;
    }
}

// y = softmax(scale q k^T + mask) v, and the log of each row's sum of exponentials; +inf for a row that sees nothing,
// whose y is 0. q (batch, heads, queries, DIM) etc. with the given strides; lse (batch, heads, queries). A block treats
// BLOCK queries of a head, blockIdx = (tile of queries, head, batch); tiles of many keys come first. Its shared memory:
// a tile of queries, two of keys, two of values.
extern "C" __global__ void __launch_bounds__(THREADS) flash_forward(
    const real* q, long long q_batch, long long q_head, long long q_time,
    const real* k, long long k_batch, long long k_head, long long k_time,
    const real* v, long long v_batch, long long v_head, long long v_time,
    real* y, long long y_batch, long long y_head, long long y_time, float* lse, int group, float scale,
    int queries, int keys, int extra, int causal, int window, const Numbers* of_queries, const Numbers* of_keys) {
    extern __shared__ __align__(16) unsigned char shared[];
    real* q_tile = reinterpret_cast<real*>(shared);
    real* buffers = q_tile + BLOCK * STRIDE;

    int heads = gridDim.y, head = blockIdx.y, b = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int start = (gridDim.x - 1 - blockIdx.x) * BLOCK, row = start + warp * ROWS;
    Mask mask = {queries, keys, extra, causal, window,
                 numbers_of(of_queries, b, queries), numbers_of(of_keys, b, keys)};
    q += b * q_batch + head * q_head;
    k += b * k_batch + head / group * k_head;
    v += b * v_batch + head / group * v_head;

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

    float sums[DOWN][WIDE][4] = {}, top[DOWN][2], total[DOWN][2] = {};  // this thread's part of each of its rows
#pragma unroll
    for (int r = 0; r < 2 * DOWN; r++) top[r / 2][r % 2] = -INFINITY;
    float per_score = scale * LOG2E;  // exponentials are powers of two

    load_tile<BLOCK>(q_tile, q, q_time, start, queries);
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
        float p[DOWN][ACROSS][4] = {};
        multiply_rows(p, q_tile + warp * ROWS * STRIDE, k_tile);
        if (now == PART) hide<false>(p, mask, row, key);
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float best = top[m][half], sum = 0;
#pragma unroll
                for (int n = 0; n < ACROSS; n++) best = fmaxf(best, fmaxf(p[m][n][2 * half], p[m][n][2 * half + 1]));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 1));
                best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, 2));
                float base = best == -INFINITY ? 0 : best * per_score;  // nothing seen so far: no inf - inf
                float shrunk = exp2_fast(fmaf(top[m][half], per_score, -base));
#pragma unroll
                for (int i = 0; i < 2 * ACROSS; i++) {
                    float& each = p[m][i / 2][2 * half + i % 2];
                    each = exp2_fast(fmaf(each, per_score, -base));
                    sum += each;
                }
                top[m][half] = best;
                total[m][half] = fmaf(total[m][half], shrunk, sum);
#pragma unroll
                for (int i = 0; i < 2 * WIDE; i++) sums[m][i / 2][2 * half + i % 2] *= shrunk;
            }
        add_weighted(sums, p, k_tile + COLUMNS * STRIDE);
    }

    cp_async_wait<0>();
    __syncthreads();  // where all tiles were hidden, the queries are still on their way to what is used again below
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            float inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
            for (int i = 0; i < 2 * WIDE; i++) sums[m][i / 2][2 * half + i % 2] *= inverse;
            int i = row + 16 * m + 8 * half + lane / 4;
            float log_sum = sum == 0 ? INFINITY : fmaf(top[m][half], scale, logf(sum));
            if (lane % 4 == 0 && i < queries) lse[((long long)b * heads + head) * queries + i] = log_sum;
        }
    y += b * y_batch + head * y_head + row * y_time;
    store_rows(sums, q_tile + warp * ROWS * STRIDE, y, y_time, queries - row);
}
