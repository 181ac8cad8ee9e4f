// Sums over a row that `lanes` threads share: a power of two of at most 32 of them, or all threads of a block. The order
// is always the same, every thread gets the result, and all threads of the block must call.

__device__ inline float row_sum(float x, int lanes) {
    if (lanes > 32) return block_sum(x);
    for (int step = lanes / 2; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline float row_max(float x, int lanes) {
    if (lanes > 32) return block_max(x);
    for (int step = lanes / 2; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
