#include "common.cuh"

// AdamW on a stretch of the flat buffers: refpeft.optim.AdamW.update, operation by operation. Each is rounded on its own
// (the compiler would fuse a product and a sum into one), so that values and moments are NumPy's to the last bit.
// Where `norm` is given and is not a finite number, nothing changes. Reads 16 bytes a value and writes 12.
extern "C" __global__ void adamw(float* p, const float* g, float* m, float* v, const float* norm, const float* decay,
                                 const float* unbias, const float* rate, float beta1, float rest1, float beta2,
                                 float rest2, float eps, long long size) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const float gradient = g[i], value = p[i];
    const float mean = __fadd_rn(__fmul_rn(m[i], beta1), __fmul_rn(rest1, gradient));
    const float square = __fadd_rn(__fmul_rn(v[i], beta2), __fmul_rn(rest2, __fmul_rn(gradient, gradient)));
    const float root = __fadd_rn(__fmul_rn(sqrtf(square), *unbias), eps);
    if (norm && !(*norm < INFINITY)) return;
    m[i] = mean;
    v[i] = square;
    p[i] = __fadd_rn(__fmul_rn(value, *decay), -__fmul_rn(*rate, mean / root));
}

// The sum of squares of every block's share, always the same numbers in the same order.
extern "C" __global__ void sums_of_squares(const float* g, float* of_block, long long size) {
    const long long step = (long long)gridDim.x * blockDim.x;
    float sum = 0.f;
#pragma unroll 4
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) sum += g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) of_block[blockIdx.x] = sum;
}

// The root of their sum, by one block.
extern "C" __global__ void root_of_sum(const float* of_block, float* norm, int blocks) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += of_block[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *norm = sqrtf(sum);
}

// Scales gradients whose norm is above the limit, as torch does; others are not even read.
extern "C" __global__ void clip(float* g, const float* norm, float limit, long long size) {
    const long long step = (long long)gridDim.x * blockDim.x;
    const float factor = limit / (*norm + 1e-6f);
    if (!(factor < 1.f)) return;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += step) g[i] *= factor;
}
