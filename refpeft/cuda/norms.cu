// RMSNorm and LayerNorm over the last axis. An RMSNorm is a LayerNorm that takes no mean away and adds no shift: its
// `mean` and `shift` are null. A row's normalized numbers are n = (x - mean) scale; y = n gain + shift.
//
// `lanes` threads share a row (see rows.cuh) and keep it in registers, KEPT times eight numbers each, so that it is read
// once. Of each row only `mean` and `scale`, float, outlive the forward pass.

#include "common.cuh"
#include "rows.cuh"

struct Row {
    int lane;    // of the row's threads
    long index;  // of the row
    bool there;  // the last block may have threads of rows that are not
};

__device__ inline Row my_row(int rows, int lanes) {
    long index = (long)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    return {(int)threadIdx.x % lanes, index, index < rows};
}

// Reads x, writes y: 2 + 2 bytes a number in bfloat16 (gain and shift stay in the caches). With `known`, mean and scale
// are those of an earlier call, and y is the same again, to the bit. The rows of y are `step` numbers apart. With `plus`
// it is the norm of x + plus, which goes to `total`: 4 bytes a number more.
extern "C" __global__ void __launch_bounds__(1024) norm_forward(
    const real* x, const float* gain, const float* shift, real* y, float* mean, float* scale, int known, int rows,
    int dim, int lanes, float eps, int step, const real* plus, real* total) {
    Row row = my_row(rows, lanes);
    x += row.index * dim;
    y += row.index * step;
    float kept[KEPT][8], sum = 0.f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int at = (row.lane + k * lanes) * 8;
        if (!row.there || at >= dim) continue;
        load8(x + at, kept[k]);
        if (plus) {
            float more[8];
            load8(plus + row.index * dim + at, more);
#pragma unroll
            for (int j = 0; j < 8; j++) kept[k][j] = wide(narrow(kept[k][j] + more[j]));
            store8(total + row.index * dim + at, kept[k]);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) sum += kept[k][j];
    }
    float m = 0.f, r = 0.f;
    if (known) {
        if (row.there) {
            m = mean ? mean[row.index] : 0.f;
            r = scale[row.index];
        }
    } else {
        if (mean) m = row_sum(sum, lanes) / dim;
        float squares = 0.f;
#pragma unroll
        for (int k = 0; k < KEPT; k++) {
            if (!row.there || (row.lane + k * lanes) * 8 >= dim) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) squares += (kept[k][j] - m) * (kept[k][j] - m);
        }
        r = rsqrtf(row_sum(squares, lanes) / dim + eps);
        if (row.there && row.lane == 0) {
            if (mean) mean[row.index] = m;
            scale[row.index] = r;
        }
    }
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int at = (row.lane + k * lanes) * 8;
        if (!row.there || at >= dim) continue;
        float w[8], b[8];
        load8(gain + at, w);
        if (shift) load8(shift + at, b);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float v = (kept[k][j] - m) * r * w[j];
            kept[k][j] = shift ? v + b[j] : v;
        }
        store8(y + at, kept[k]);
    }
}

// dx = scale (d - mean(d) - n mean(d n)) with d = g gain, where mean(d) is left out of an RMSNorm; plus `onto`, which
// may be null, or dx itself. Rows of these are `onto_step` and `step` numbers apart. Where y is not null it becomes the
// norm again, to the bit. Reads x, g and onto, writes dx and y: 2 bytes a number for each in bfloat16.
extern "C" __global__ void __launch_bounds__(1024) norm_backward(
    const real* x, const float* gain, const real* g, const float* mean, const float* scale, const real* onto, real* dx,
    const float* shift, real* y, int rows, int dim, int lanes, int onto_step, int step) {
    Row row = my_row(rows, lanes);
    long start = row.index * dim;
    if (onto) onto += row.index * onto_step;
    dx += row.index * step;
    float m = row.there && mean ? mean[row.index] : 0.f, r = row.there ? scale[row.index] : 0.f;
    float n[KEPT][8], d[KEPT][8], sum = 0.f, product = 0.f;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int at = (row.lane + k * lanes) * 8;
        if (!row.there || at >= dim) continue;
        float w[8];
        load8(x + start + at, n[k]);
        load8(g + start + at, d[k]);
        load8(gain + at, w);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            n[k][j] = (n[k][j] - m) * r;
            d[k][j] *= w[j];
            sum += d[k][j];
            product += d[k][j] * n[k][j];
        }
        if (!y) continue;
        float b[8];
        if (shift) load8(shift + at, b);
#pragma unroll
        for (int j = 0; j < 8; j++) w[j] = shift ? n[k][j] * w[j] + b[j] : n[k][j] * w[j];
        store8(y + start + at, w);
    }
    float mean_d = mean ? row_sum(sum, lanes) / dim : 0.f;
    float mean_dn = row_sum(product, lanes) / dim;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        int at = (row.lane + k * lanes) * 8;
        if (!row.there || at >= dim) continue;
        float before[8];
        if (onto) load8(onto + at, before);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float v = r * (d[k][j] - mean_d - n[k][j] * mean_dn);
            d[k][j] = onto ? before[j] + v : v;
        }
        store8(dx + at, d[k]);
    }
}

// Sums over `per` rows a block, of g n into row `part` of `gains` (parts, dim) and of g into that of `shifts`; either may
// be null. A block of 256 threads has 256 columns, eight a thread, and eight rows at a time. Reads x and g once: 4 bytes
// a number in bfloat16.
extern "C" __global__ void norm_gains(const real* x, const real* g, const float* mean, const float* scale, float* gains,
                                      float* shifts, int rows, int dim, int per) {
    __shared__ float of_line[8][256];
    int line = threadIdx.x / 32, lane = threadIdx.x % 32, part = blockIdx.y, column = (blockIdx.x * 32 + lane) * 8;
    int stop = min(rows, (part + 1) * per);
    float gain[8] = {}, shift[8] = {};
    for (int row = part * per + line; row < stop && column < dim; row += 8) {
        float m = mean ? mean[row] : 0.f, r = scale[row], n[8], d[8];
        load8(x + (long)row * dim + column, n);
        load8(g + (long)row * dim + column, d);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            gain[j] += d[j] * (n[j] - m) * r;
            shift[j] += d[j];
        }
    }
    for (int which = 0; which < 2; which++) {
        float* into = which ? shifts : gains;
        if (!into) continue;
        __syncthreads();
        for (int j = 0; j < 8; j++) of_line[line][lane * 8 + j] = which ? shift[j] : gain[j];
        __syncthreads();
        float sum = 0.f;
        for (int i = 0; i < 8; i++) sum += of_line[i][threadIdx.x];
        int mine = blockIdx.x * 256 + threadIdx.x;
        if (mine < dim) into[(long)part * dim + mine] = sum;
    }
}
