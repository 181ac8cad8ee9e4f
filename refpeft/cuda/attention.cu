#include "common.cuh"

// How many queries and keys each row has, of rows padded on their right: `asked` is all queries, `seen` the `extra` keys
// in front and those whose number in `segments` (rows, tokens) is not negative; at least one, as of none there would be
// no softmax. One warp a row.
extern "C" __global__ void lengths(const int* segments, int* asked, int* seen, int queries, int tokens, int extra) {
    int row = blockIdx.x, count = 0;
    for (int t = threadIdx.x; t < tokens; t += 32) count += segments[(long long)row * tokens + t] >= 0;
    for (int step = 16; step; step >>= 1) count += __shfl_xor_sync(0xffffffffu, count, step);
    if (threadIdx.x == 0) {
        asked[row] = queries;
        seen[row] = max(extra + count, 1);
    }
}
