// Lengths of the rows of a weight that low-rank factors change, which is made in registers and nowhere else; and a few
// columns of rows.

#include "common.cuh"

// Of the weight, that a thread has at once. Its columns are 32 apart, so that a warp reads them in a run.
constexpr int ROWS = 8, COLUMNS = 2;

// norms[i] = |W[i] + alpha B[i] A| and gains[i] = m[i] / norms[i]: W (out, in) with `step` numbers from row to row,
// B (out, r) and A (r, in) of float in C order, m (out). A block makes ROWS of them, its warps share the columns. Shared
// memory: ROWS * r floats. Reads W and B once, and A, which lies in the cache, for every block.
extern "C" __global__ void row_gains(float* gains, float* norms, const float* m, const real* W, long long step,
                                     const float* B, const float* A, float alpha, int out, int in, int r) {
    extern __shared__ __align__(16) float factors[];  // alpha B, ROWS for each number of the rank
    __shared__ float of_warp[ROWS][32];
    int first = blockIdx.x * ROWS, rows = min(ROWS, out - first);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    W += first * step;
    for (int at = threadIdx.x; at < ROWS * r; at += blockDim.x)
        factors[at] = at % ROWS < rows ? alpha * B[(long long)(first + at % ROWS) * r + at / ROWS] : 0.f;
    __syncthreads();

    float squares[ROWS] = {};
    for (int start = warp * 32 * COLUMNS; start < in; start += warps * 32 * COLUMNS) {
        int column[COLUMNS];  // past the last one it is read again, and does not count
        float changed[ROWS][COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            column[j] = min(start + 32 * j + lane, in - 1);
#pragma unroll
            for (int i = 0; i < ROWS; i++) changed[i][j] = i < rows ? wide(W[i * step + column[j]]) : 0.f;
        }
        const float* from = A;
#pragma unroll 8
        for (int k = 0; k < r; k++, from += in)
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) {
                float a = from[column[j]];
#pragma unroll
                for (int i = 0; i < ROWS; i++) changed[i][j] += factors[k * ROWS + i] * a;
            }
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            if (start + 32 * j + lane < in)
#pragma unroll
                for (int i = 0; i < ROWS; i++) squares[i] += changed[i][j] * changed[i][j];
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        float sum = warp_sum(squares[i]);
        if (lane == 0) of_warp[i][warp] = sum;
    }
    __syncthreads();
    if (threadIdx.x < rows) {
        int row = first + threadIdx.x;
        float sum = 0.f;
        for (int i = 0; i < warps; i++) sum += of_warp[threadIdx.x][i];
        norms[row] = sqrtf(sum);
        gains[row] = m[row] / norms[row];
    }
}

// The gradient of m, g / norms, or added to what is there.
extern "C" __global__ void row_gains_backward(float* dm, const float* g, const float* norms, int out, int add) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < out) dm[row] = g[row] / norms[row] + (add ? dm[row] : 0.f);
}

// Of number `at` of z (rows, k): its column, among rows `step` apart.
__device__ inline long long place(long long at, const int* columns, int k, long long step) {
    return at / k * step + columns[at % k];
}

// y[:, columns] += z, of distinct columns.
extern "C" __global__ void add_to_columns(real* y, long long step, const real* z, const int* columns, int k,
                                          long long size) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    real* to = y + place(at, columns, k, step);
    *to = narrow(wide(*to) + wide(z[at]));
}

// z = y[:, columns].
extern "C" __global__ void take_columns(const real* y, long long step, real* z, const int* columns, int k,
                                        long long size) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < size) z[at] = y[place(at, columns, k, step)];
}
