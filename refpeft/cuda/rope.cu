#include "common.cuh"

// Rotary positions (refpeft.fused.rope): pairs (j, j + half) of each head are turned by the angle of their token.
//
// x (batch, heads, time, 2 half) with the given strides, in numbers; cos and sin (batch, 1, time, half), or one row for
// all, whose `table_row` is 0; y (batch, time, heads, 2 half), its tokens `y_step` numbers apart. `half` is a multiple of 8, and each head begins at a
// multiple of 16 bytes. `sign` is 1, or -1 to turn back. Heads from `turned` on are copied. y may be x.
//
// A thread turns eight pairs of HEADS_EACH heads of a token, so that their cosines and sines are read once for these.
// Neighbouring threads have neighbouring pairs and then heads. x is read and y is written once, nothing else counts.

constexpr int HEADS_EACH = 4;

extern "C" __global__ void rotate(const real* x, long long x_row, long long x_head, long long x_time,
                                  const float* cos, const float* sin, long long table_row, real* y, long long y_step,
                                  unsigned rows, unsigned heads, unsigned turned, unsigned time, unsigned half,
                                  float sign) {
    unsigned eights = half / 8, lanes = (heads + HEADS_EACH - 1) / HEADS_EACH;
    unsigned thread = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned pair = thread % eights * 8, lane = thread / eights % lanes;
    unsigned token = thread / eights / lanes;
    if (token >= rows * time) return;
    unsigned row = token / time, t = token % time;

    float c[8], s[8];
    load8(cos + row * table_row + (long long)t * half + pair, c);
    load8(sin + row * table_row + (long long)t * half + pair, s);
    x += row * x_row + t * x_time + pair;
    y += token * y_step + pair;
    for (unsigned head = lane; head < heads; head += lanes) {
        float a[8], b[8];
        load8(x + head * x_head, a);
        load8(x + head * x_head + half, b);
        if (head < turned) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float before = a[i];
                a[i] = before * c[i] - sign * b[i] * s[i];
                b[i] = b[i] * c[i] + sign * before * s[i];
            }
        }
        store8(y + (long long)head * 2 * half, a);
        store8(y + (long long)head * 2 * half + half, b);
    }
}
