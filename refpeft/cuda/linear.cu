#include "common.cuh"

// y[i] = row[i % width], eight numbers a thread where width is a multiple of eight: writes y once.
extern "C" __global__ void write_rows(real* y, const float* row, long long size, int width) {
    long long at = (long long)blockIdx.x * 2048 + 8 * threadIdx.x;
    if (at >= size) return;
    if (width % 8 == 0) {
        const float* from = row + at % width;  // not on a multiple of 16 bytes where it is a part of a flat buffer
        float eight[8];
#pragma unroll
        for (int i = 0; i < 8; i++) eight[i] = from[i];
        store8(y + at, eight);
        return;
    }
    for (long long i = at; i < at + 8 && i < size; i++) y[i] = narrow(row[i % width]);
}
