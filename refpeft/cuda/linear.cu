#include "common.cuh"

// y[i] += bias[i % width], eight numbers a thread where width is a multiple of eight: reads and writes y once.
extern "C" __global__ void add_bias(real* y, const float* bias, long long size, int width) {
    long long at = (long long)blockIdx.x * 2048 + 8 * threadIdx.x;
    if (at >= size) return;
    if (width % 8 == 0) {
        float row[8];
        load8(y + at, row);
        const float* of = bias + at % width;
#pragma unroll
        for (int i = 0; i < 8; i++) row[i] += of[i];
        store8(y + at, row);
        return;
    }
    for (long long i = at; i < at + 8 && i < size; i++) y[i] = narrow(wide(y[i]) + bias[i % width]);
}
