#include "common.cuh"

// A row of logits for one block, z = logits + bias: its loss (log sum_j e^z_j - z_target) * weight, 0 where the target
// is negative, and where `slope` is given the derivative by the logits, (e^z_j / sum - [j is the target]) * weight /
// denominator, which may take the logits' place. Rows lie `stride` numbers apart; their first `whole` words, a multiple
// of eight, are read eight at a time. A target that is no word makes the loss infinite.
//
// The row comes from memory once, 2 bytes a logit in bfloat16, and goes back once. The second pass runs backwards, as
// what was read last is still near: a row of 128,256 words is 250 KiB, about a core's L1, and all rows at work fit in L2.
extern "C" __global__ void __launch_bounds__(1024) row_losses(
    const real* logits, real* slope, float* losses, const int* targets, const float* weights, const float* bias,
    const float* denominator, float number, int words, long long stride, int whole) {
    const int row = blockIdx.x, step = 8 * blockDim.x, mine = 8 * threadIdx.x;
    const real* from = logits + row * stride;
    const int target = targets[row];
    const float weight = target < 0 ? 0.f : weights ? weights[row] : 1.f;
    const bool known = target >= 0 && target < words;
    const float at_target = known ? wide(from[target]) + (bias ? bias[target] : 0.f) : 0.f;  // before it is replaced

    float top = -3e38f, total = 0.f;  // of this thread: the largest so far, and the sum of exponentials below it
#pragma unroll 4
    for (int at = mine; at < whole; at += step) {
        float z[8];
        load8(from + at, z);
        float most = top;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (bias) z[i] += bias[at + i];
            most = fmaxf(most, z[i]);
        }
        total *= __expf(top - most);
#pragma unroll
        for (int i = 0; i < 8; i++) total += __expf(z[i] - most);
        top = most;
    }
    for (int at = whole + threadIdx.x; at < words; at += blockDim.x) {
        float z = wide(from[at]) + (bias ? bias[at] : 0.f);
        float most = fmaxf(top, z);
        total = total * __expf(top - most) + __expf(z - most);
        top = most;
    }
    const float highest = block_max(top);
    const float sum = block_sum(total * __expf(top - highest));
    if (threadIdx.x == 0) {
        float loss = (logf(sum) - (at_target - highest)) * weight;
        losses[row] = target < words ? (target < 0 ? 0.f : loss) : INFINITY;
    }
    if (!slope) return;

    real* to = slope + row * stride;
    const float scale = weight / (denominator ? *denominator : number), share = 1.f / sum;
    for (int at = mine + (whole - 1) / step * step; at >= 0; at -= step) {
        if (at >= whole) continue;
        float z[8];
        load8(from + at, z);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (bias) z[i] += bias[at + i];
            z[i] = (__expf(z[i] - highest) * share - (at + i == target ? 1.f : 0.f)) * scale;
        }
        store8(to + at, z);
    }
    for (int at = whole + threadIdx.x; at < words; at += blockDim.x) {
        float z = wide(from[at]) + (bias ? bias[at] : 0.f);
        to[at] = narrow((__expf(z - highest) * share - (at == target ? 1.f : 0.f)) * scale);
    }
}

// The sum of `count` losses over the denominator, by one block, in the same order every time.
extern "C" __global__ void mean_loss(const float* losses, float* loss, const float* denominator, float number,
                                     int count) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = sum / (denominator ? *denominator : number);
}

// x *= factor, eight numbers a thread. A loss's own gradient nearly always is 1: then nothing is read or written.
extern "C" __global__ void scale_by(real* x, const float* factor, long long size) {
    const float by = *factor;
    const long long at = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (by == 1.f || at >= size) return;
    if (at + 8 <= size) {
        float part[8];
        load8(x + at, part);
#pragma unroll
        for (int i = 0; i < 8; i++) part[i] *= by;
        store8(x + at, part);
        return;
    }
    for (long long i = at; i < size; i++) x[i] = narrow(wide(x[i]) * by);
}
