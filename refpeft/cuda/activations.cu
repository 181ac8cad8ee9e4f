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

// Every index is known when this is compiled: arrays stay in registers.
__device__ inline void read8(const real* from, int count, float* to) {
    if (count == 8) return load8(from, to);
#pragma unroll
    for (int k = 0; k < 8; k++) to[k] = k < count ? wide(from[k]) : 0.f;
}

__device__ inline void write8(real* to, int count, const float* from) {
    if (count == 8) return store8(to, from);
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (k < count) to[k] = narrow(from[k]);
}

#ifdef REAL_IS_BFLOAT16  // results have eight bits: what is right in twenty is enough, and takes half the instructions
__device__ inline float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }
#else
__device__ inline float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
#endif

// y = gate sigmoid(gate) up. Reads both, writes y: 6 bytes a number in bfloat16.
extern "C" __global__ void silu_mul_forward(const real* gate, const real* up, real* y, unsigned int groups, long width,
                                            long gate_step, long up_step, long own_step) {
    Group at = my_group(groups, width);
    if (!at.count) return;
    float a[8], b[8];
    read8(gate + at.row * gate_step + at.column, at.count, a);
    read8(up + at.row * up_step + at.column, at.count, b);
#pragma unroll
    for (int k = 0; k < 8; k++) a[k] = a[k] * sigmoid(a[k]) * b[k];
    write8(y + at.row * own_step + at.column, at.count, a);
}

// The gradients of gate and up, and y again, each of which may be null; g and y are contiguous. Reads three arrays, writes
// up to three: 10 or 12 bytes a number in bfloat16.
extern "C" __global__ void silu_mul_backward(const real* gate, const real* up, const real* g, real* d_gate, real* d_up,
                                             real* y, unsigned int groups, long width, long gate_step, long up_step,
                                             long own_step) {
    Group at = my_group(groups, width);
    if (!at.count) return;
    long own = at.row * own_step + at.column;
    float a[8], b[8], d[8];
    read8(gate + at.row * gate_step + at.column, at.count, a);
    read8(up + at.row * up_step + at.column, at.count, b);
    read8(g + at.row * width + at.column, at.count, d);
#pragma unroll
    for (int k = 0; k < 8; k++) {
        float s = sigmoid(a[k]), x = a[k], times = b[k], slope = d[k];
        a[k] = slope * times * s * (1.f + x * (1.f - s));
        b[k] = slope * x * s;
        d[k] = x * s * times;
    }
    if (d_gate) write8(d_gate + own, at.count, a);
    if (d_up) write8(d_up + own, at.count, b);
    if (y) write8(y + at.row * width + at.column, at.count, d);
}
