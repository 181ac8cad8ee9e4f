#include "common.cuh"

// Copies values into the margins of weights: `count` numbers of float32, rows of `width` one after the other, times
// `scale`, to rows of bfloat16 that are `step` numbers apart. Each block has one entry of the table.
struct Entry {
    long long from, to, count, width, step, scale;  // addresses, numbers, and the bits of a float
};

extern "C" __global__ void copy_values(const Entry* entries) {
    Entry entry = entries[blockIdx.x];
    const float* from = reinterpret_cast<const float*>(entry.from);
    __nv_bfloat16* to = reinterpret_cast<__nv_bfloat16*>(entry.to);
    float scale = __int_as_float((int)entry.scale);
    int width = (int)entry.width;
    for (int i = threadIdx.x; i < (int)entry.count; i += blockDim.x)
        to[(i / width) * entry.step + i % width] = __float2bfloat16_rn(scale * from[i]);
}
