// The gated unit of MLPs, eight numbers a thread. `gate` and `up` may be halves of the rows of a wider array, and there
// may be room behind the rows of what is made: their rows are `gate_step`, `up_step` and `own_step` numbers apart. Where
// everything is contiguous there is one row.

#include "common.cuh"

struct Group {  // up to eight numbers of a row
    long row, column;
    int count;
};

// Of `groups` in all; one that is not has a count of 0.
__device__ inline Group my_group(unsigned int groups, long width) {
    unsigned int mine = blockIdx.x * blockDim.x + threadIdx.x, per_row = (width + 7) / 8;
    if (mine >= groups) return {0, 0, 0};
    long row = mine / per_row, column = (long)(mine % per_row) * 8;
    return {row, column, (int)min(8l, width - column)};
}

__device__ inline void read8(const real* from, int count, float* to) {
    if (count == 8) return load8(from, to);
    for (int k = 0; k < 8; k++) to[k] = k < count ? wide(from[k]) : 0.f;
}

__device__ inline void write8(real* to, int count, const float* from) {
    if (count == 8) return store8(to, from);
    for (int k = 0; k < count; k++) to[k] = narrow(from[k]);
}

// y = gate sigmoid(gate) up. Reads both, writes y: 6 bytes a number in bfloat16.
extern "C" __global__ void silu_mul_forward(const real* gate, const real* up, real* y, unsigned int groups, long width,
                                            long gate_step, long up_step, long own_step) {
    Group at = my_group(groups, width);
    if (!at.count) return;
    float a[8], b[8];
    read8(gate + at.row * gate_step + at.column, at.count, a);
    read8(up + at.row * up_step + at.column, at.count, b);
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = a[k] / (1.f + expf(-a[k])) * b[k];
    write8(y + at.row * own_step + at.column, at.count, a);
}

// The gradients of gate and up, either of which may be null; g is contiguous. Reads three arrays, writes two: 10 bytes a
// number in bfloat16.
extern "C" __global__ void silu_mul_backward(const real* gate, const real* up, const real* g, real* d_gate, real* d_up,
                                             unsigned int groups, long width, long gate_step, long up_step,
                                             long own_step) {
    Group at = my_group(groups, width);
    if (!at.count) return;
    long own = at.row * own_step + at.column;
    float a[8], b[8], d[8], by_gate[8], by_up[8];
    read8(gate + at.row * gate_step + at.column, at.count, a);
    read8(up + at.row * up_step + at.column, at.count, b);
    read8(g + at.row * width + at.column, at.count, d);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float s = 1.f / (1.f + expf(-a[k]));
        by_gate[k] = d[k] * b[k] * s * (1.f + a[k] * (1.f - s));
        by_up[k] = d[k] * a[k] * s;
    }
    if (d_gate) write8(d_gate + own, at.count, by_gate);
    if (d_up) write8(d_up + own, at.count, by_up);
}
