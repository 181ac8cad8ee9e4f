#include "common.cuh"

// x of a x = b, for matrices a (n, n) and b (n, k): by Gauss and Jordan's elimination, with the largest number of a
// column as its pivot. A block takes one matrix and COLUMNS columns of b, and has both in shared memory; blocks of the
// same matrix do the same to a.
extern "C" __global__ void solve(const float* a, const float* b, float* x, int n, int k) {
    extern __shared__ float memory[];
    const int first = blockIdx.y * COLUMNS, width = n + COLUMNS;  // of a row of [a b]
    a += (long long)blockIdx.x * n * n;
    b += (long long)blockIdx.x * n * k;
    x += (long long)blockIdx.x * n * k;
    for (int i = threadIdx.x; i < n * width; i += blockDim.x) {
        const int row = i / width, column = i % width, of_b = first + column - n;
        memory[i] = column < n ? a[row * n + column] : of_b < k ? b[(long long)row * k + of_b] : 0.f;
    }
    for (int p = 0; p < n; p++) {
        __syncthreads();
        int best = p;
        for (int row = p + 1; row < n; row++) {
            if (fabsf(memory[row * width + p]) > fabsf(memory[best * width + p])) best = row;
        }
        const float pivot = memory[best * width + p];
        __syncthreads();
        for (int column = p + threadIdx.x; column < width; column += blockDim.x) {
            const float below = memory[p * width + column];
            memory[p * width + column] = memory[best * width + column] / pivot;
            if (best != p) memory[best * width + column] = below;
        }
        __syncthreads();
        const int rest = width - p - 1;  // columns to the right of the pivot's, which is not read again
        for (int i = threadIdx.x; i < n * rest; i += blockDim.x) {
            const int row = i / rest, column = p + 1 + i % rest;
            if (row != p) {
                memory[row * width + column] -= memory[row * width + p] * memory[p * width + column];
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n * COLUMNS; i += blockDim.x) {
        const int row = i / COLUMNS, column = i % COLUMNS;
        if (first + column < k) x[(long long)row * k + first + column] = memory[row * width + n + column];
    }
}
