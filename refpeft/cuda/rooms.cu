#include "common.cuh"

// Copies between values, whose rows lie side by side, and rooms, whose rows are `step` numbers apart: each block has one
// entry of a table, some rows of one array, whose first number is read at `from` and written at `to`.
struct Entry {
    long long from, to, row, rows, width, step, scale;  // `scale`: the bits of a float
};

// Values of float32, times `scale`, to a room of bfloat16. `from` and `to` are addresses.
extern "C" __global__ void copy_values(const Entry* entries) {
    Entry entry = entries[blockIdx.x];
    int width = (int)entry.width;
    const float* from = reinterpret_cast<const float*>(entry.from) + entry.row * width;
    __nv_bfloat16* to = reinterpret_cast<__nv_bfloat16*>(entry.to) + entry.row * entry.step;
    float scale = __int_as_float((int)entry.scale);
    for (int i = threadIdx.x; i < (int)entry.rows * width; i += blockDim.x)
        to[(i / width) * entry.step + i % width] = __float2bfloat16_rn(scale * from[i]);
}

// Gradients in a room's order, at `gradients`[from], times `scale`: added to those of values, at the address `to`.
extern "C" __global__ void add_gradients(const Entry* entries, const float* gradients) {
    Entry entry = entries[blockIdx.x];
    int width = (int)entry.width;
    const float* from = gradients + entry.from + entry.row * entry.step;
    float* to = reinterpret_cast<float*>(entry.to) + entry.row * width;
    float scale = __int_as_float((int)entry.scale);
    for (int i = threadIdx.x; i < (int)entry.rows * width; i += blockDim.x)
        to[i] += scale * from[(i / width) * entry.step + i % width];
}
