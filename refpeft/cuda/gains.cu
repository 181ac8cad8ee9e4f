// Going back through y = gain x, a gain for each column of rows x: both gradients from one pass over g and x.

#include "common.cuh"

constexpr int LINES = 8;  // rows that a block treats at once, a warp each

// dx = gain g, and sums of g x over the `per` rows of a part: (parts, width). Rows are `width` numbers of columns that
// are a multiple of eight, g_step, x_step and dx_step apart. A block takes 256 columns of a part, eight a thread. The
// order of sums goes by the shape alone. Reads g and x once and writes dx once: 6 bytes a number.
extern "C" __global__ void gain_backward(const real* g, long long g_step, const real* x, long long x_step,
                                         const float* gain, real* dx, long long dx_step, float* sums, int rows,
                                         int width, int per) {
    __shared__ float of_line[LINES][256];
    int line = threadIdx.x / 32, lane = threadIdx.x % 32;
    int column = blockIdx.x * 256 + lane * 8, stop = min(rows, (blockIdx.y + 1) * per);
    float total[8] = {};
    if (column < width) {
        float by[8];  // gains are not on a multiple of 16 bytes where they are a part of a flat buffer
#pragma unroll
        for (int k = 0; k < 8; k++) by[k] = gain[column + k];
        for (int row = blockIdx.y * per + line; row < stop; row += LINES) {
            float G[8], X[8];
            load8(g + row * g_step + column, G);
            load8(x + row * x_step + column, X);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                total[k] += G[k] * X[k];
                G[k] *= by[k];
            }
            store8(dx + row * dx_step + column, G);
        }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) of_line[line][lane * 8 + k] = total[k];
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < LINES; i++) sum += of_line[i][threadIdx.x];
    int mine = blockIdx.x * 256 + threadIdx.x;
    if (mine < width) sums[(long long)blockIdx.y * width + mine] = sum;
}
