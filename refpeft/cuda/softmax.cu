// softmax and log_softmax over the last axis of rows of any width, by `lanes` threads a row. A row is read several times,
// but only once from memory; backward reads x, not the rounded output.

#include "common.cuh"
#include "rows.cuh"

struct Softmax {
    float top, sum;  // e**(x - top) / sum

    __device__ float operator()(float x) const { return expf(x - top) / sum; }
};

// Where `there` does not hold, threads take part without reading.
__device__ inline Softmax softmax_of(const real* x, bool there, int width, int lane, int lanes) {
    float top = -INFINITY, sum = 0.f;
    for (int i = lane; i < width && there; i += lanes) top = fmaxf(top, wide(x[i]));
    top = row_max(top, lanes);
    for (int i = lane; i < width && there; i += lanes) sum += expf(wide(x[i]) - top);
    return {top, row_sum(sum, lanes)};
}

extern "C" __global__ void softmax_forward(const real* x, real* y, int rows, int width, int lanes, int log) {
    int lane = threadIdx.x % lanes;
    long row = (long)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    bool there = row < rows;
    x += row * width;
    y += row * width;
    Softmax p = softmax_of(x, there, width, lane, lanes);
    float log_sum = logf(p.sum);
    for (int i = lane; i < width && there; i += lanes) {
        float v = wide(x[i]);
        y[i] = narrow(log ? v - p.top - log_sum : p(v));
    }
}

// p (g - sum(g p)), and for the logarithm g - p sum(g).
extern "C" __global__ void softmax_backward(const real* x, const real* g, real* dx, int rows, int width, int lanes, int log) {
    int lane = threadIdx.x % lanes;
    long row = (long)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    bool there = row < rows;
    x += row * width;
    g += row * width;
    dx += row * width;
    Softmax p = softmax_of(x, there, width, lane, lanes);
    float sum = 0.f;
    for (int i = lane; i < width && there; i += lanes) sum += log ? wide(g[i]) : wide(g[i]) * p(wide(x[i]));
    sum = row_sum(sum, lanes);
    for (int i = lane; i < width && there; i += lanes) {
        float own = p(wide(x[i])), d = wide(g[i]);
        dx[i] = narrow(log ? d - own * sum : own * (d - sum));
    }
}
