// Functions of up to three arrays, number by number, and sums of them along axes. The arrays are float, bfloat16 or
// bool, in any mixture and of any strides (0 along an axis of broadcasting); all is computed in float and rounded once.

#include "common.cuh"
#include "rows.cuh"

enum { NUMBER, FLOAT, BFLOAT16, BOOL, KIND = 3, IN_EIGHTS = 4 };  // `kind` of an operand: one of the four, and a flag

struct Operand {
    const void* data;
    int kind;     // IN_EIGHTS: eight numbers in a row may be read at once, by the strides and the address
    float value;  // where there is no array
};

__device__ inline float read(const Operand& from, long at) {
    int kind = from.kind & KIND;
    if (kind == FLOAT) return static_cast<const float*>(from.data)[at];
    if (kind == BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(from.data)[at]);
    if (kind == BOOL) return static_cast<const unsigned char*>(from.data)[at] ? 1.f : 0.f;
    return from.value;
}

// `count` numbers, at most eight, from `at` on, `step` apart.
__device__ inline void read8(const Operand& from, long at, int step, int count, float* to) {
    if (count == 8 && from.kind == (FLOAT | IN_EIGHTS)) return load8(static_cast<const float*>(from.data) + at, to);
    if (count == 8 && from.kind == (BFLOAT16 | IN_EIGHTS))
        return load8(static_cast<const __nv_bfloat16*>(from.data) + at, to);
#pragma unroll
    for (int k = 0; k < 8; k++) to[k] = k < count ? read(from, at + (long)k * step) : 0.f;
}

__device__ inline float logistic(float x) { return 1.f / (1.f + expf(-x)); }

constexpr float ROOT_HALF = 0.70710678f, DENSITY = 0.39894228f;  // sqrt(1 / 2), 1 / sqrt(2 pi)
constexpr float BEND = 0.044715f, TWICE = 1.5957691f;            // of gelu's approximation: 2 sqrt(2 / pi)

__device__ inline float gelu(float x) { return 0.5f * x * (1.f + erff(x * ROOT_HALF)); }
__device__ inline float gelu_slope(float x) {
    return 0.5f * (1.f + erff(x * ROOT_HALF)) + x * DENSITY * expf(-0.5f * x * x);
}
__device__ inline float gelu_tanh(float x) { return x * logistic(TWICE * x * (1.f + BEND * x * x)); }
__device__ inline float gelu_tanh_slope(float x) {
    float p = logistic(TWICE * x * (1.f + BEND * x * x));
    return p + x * p * (1.f - p) * TWICE * (1.f + 3.f * BEND * x * x);
}
__device__ inline float silu_slope(float x) {
    float s = logistic(x);
    return s * (1.f + x * (1.f - s));
}
__device__ inline float tanh_slope(float x) {
    float y = tanhf(x);
    return 1.f - y * y;
}
__device__ inline float power(float x, float exponent) { return exponent == 2.f ? x * x : powf(x, exponent); }

#define EACH(expression)                          \
    _Pragma("unroll") for (int k = 0; k < 8; k++) { \
        float a = A[k], b = B[k], c = C[k];       \
        y[k] = (expression);                      \
    }                                             \
    break;

// The one function that this is compiled for, by its number in FUNCTIONS of maps.py: the constant FUNCTION. Where it is
// a gradient, a is that of the output.
__device__ inline void apply(const float* A, const float* B, const float* C, float* y) {
    switch (FUNCTION) {
        case 0: EACH(a)
        case 1: EACH(a + b)
        case 2: EACH(a - b)
        case 3: EACH(a * b)
        case 4: EACH(a / b)
        case 5: EACH(-a)
        case 6: EACH(c != 0.f ? a : b)
        case 7: EACH(c != 0.f ? b : a)
        case 8: EACH(a > b || a != a ? a : b)
        case 9: EACH(power(a, b))
        case 10: EACH(expf(a))
        case 11: EACH(logf(a))
        case 12: EACH(sqrtf(a))
        case 13: EACH(fabsf(a))
        case 14: EACH(tanhf(a))
        case 15: EACH(logistic(a))
        case 16: EACH(a > 0.f || a != a ? a : 0.f)
        case 17: EACH(a * logistic(a))
        case 18: EACH(gelu(a))
        case 19: EACH(gelu_tanh(a))
        case 20: EACH(-(a / b) * (c / b))                        // div's second input: b, and c the first
        case 21: EACH(b > c ? a : b == c ? 0.5f * a : 0.f)       // maximum's input b, beside c
        case 22: EACH(a * c * power(b, c - 1.f))                 // power
        case 23: EACH(a * expf(b))                               // the others: of the input b
        case 24: EACH(a / (2.f * sqrtf(b)))
        case 25: EACH(b > 0.f ? a : b < 0.f ? -a : 0.f)
        case 26: EACH(a * tanh_slope(b))
        case 27: EACH(a * logistic(b) * (1.f - logistic(b)))
        case 28: EACH(b > 0.f ? a : 0.f)
        case 29: EACH(a * silu_slope(b))
        case 30: EACH(a * gelu_slope(b))
        case 31: EACH(a * gelu_tanh_slope(b))
    }
}

__device__ inline void write8(real* to, int step, bool in_eights, int count, const float* from) {
    if (in_eights && count == 8) return store8(to, from);
#pragma unroll
    for (int k = 0; k < 8; k++)
        if (k < count) to[(long)k * step] = narrow(from[k]);
}

// y[i0, i1, i2, i3] = function(a, b, c at the same place), for `eights` groups of up to eight numbers along the last of
// four axes, n0 ... n3 long. y0 ... are the strides of y, in numbers, a0 ... those of a. Where arrays are contiguous the
// axes are one, of any length. Reads each array once and writes y: 6 bytes a number for the sum of two bfloat16 arrays.
extern "C" __global__ void map(unsigned int eights, int n1, int n2, long n3,  //
                               real* y, int y_in_eights, int y0, int y1, int y2, int y3,    //
                               const void* a, int a_kind, float a_value, int a0, int a1, int a2, int a3,
                               const void* b, int b_kind, float b_value, int b0, int b1, int b2, int b3,
                               const void* c, int c_kind, float c_value, int c0, int c1, int c2, int c3) {
    unsigned int mine = blockIdx.x * blockDim.x + threadIdx.x;
    if (mine >= eights) return;
    unsigned int per_row = (n3 + 7) / 8, row = 0;
    long i0 = 0, i1 = 0, i2 = 0;
    if (eights > per_row) {  // divisions take longer than all else, and where there is one row they are not needed
        row = mine / per_row;
        i2 = row % n2, i1 = row / n2 % n1, i0 = row / n2 / n1;
    }
    long i3 = (long)(mine - row * per_row) * 8;
    int count = (int)min(8l, n3 - i3);
    float A[8], B[8], C[8], Y[8];
    read8({a, a_kind, a_value}, i0 * a0 + i1 * a1 + i2 * a2 + i3 * a3, a3, count, A);
    read8({b, b_kind, b_value}, i0 * b0 + i1 * b1 + i2 * b2 + i3 * b3, b3, count, B);
    read8({c, c_kind, c_value}, i0 * c0 + i1 * c1 + i2 * c2 + i3 * c3, c3, count, C);
    apply(A, B, C, Y);
    write8(y + i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3, y3, y_in_eights, count, Y);
}

// What a sum over `per` of the middle one of three axes came to: into the result, or a partial one, to be summed again.
__device__ inline void put(real* y, float* partial, int add, long at, float sum) {
    if (partial) partial[at] = sum;
    else y[at] = narrow(add ? wide(y[at]) + sum : sum);
}

// Sums of function(a, b, c) over the middle one of three axes (outer, n, width), by blocks of 256 columns, eight a thread
// and eight rows at a time: y (outer, width), or partial (outer, parts, width) with sums over `per` rows each. The order
// goes by the shape alone. Reads each array once.
extern "C" __global__ void sum_columns(real* y, float* partial, int add, int parts, int per, int n, int width,
                                       const void* a, int a_kind, float a_value, int a0, int a1, int a2,
                                       const void* b, int b_kind, float b_value, int b0, int b1, int b2,
                                       const void* c, int c_kind, float c_value, int c0, int c1, int c2) {
    __shared__ float of_line[8][256];
    int line = threadIdx.x / 32, lane = threadIdx.x % 32;
    int blocks = (width + 255) / 256;  // a row
    long outer = blockIdx.x / blocks / parts;
    int part = blockIdx.x / blocks % parts, first = blockIdx.x % blocks * 256, column = first + lane * 8;
    int stop = min((long)n, (part + 1l) * per), count = min(8, width - column);
    float sums[8] = {};
    for (long row = (long)part * per + line; row < stop && count > 0; row += 8) {
        float A[8], B[8], C[8], Y[8];
        read8({a, a_kind, a_value}, outer * a0 + row * a1 + (long)column * a2, a2, count, A);
        read8({b, b_kind, b_value}, outer * b0 + row * b1 + (long)column * b2, b2, count, B);
        read8({c, c_kind, c_value}, outer * c0 + row * c1 + (long)column * c2, c2, count, C);
        apply(A, B, C, Y);
#pragma unroll
        for (int k = 0; k < 8; k++) sums[k] += Y[k];
    }
    for (int k = 0; k < 8; k++) of_line[line][lane * 8 + k] = sums[k];
    __syncthreads();
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += of_line[i][threadIdx.x];
    int mine = first + threadIdx.x;
    if (mine < width) put(y, partial, add, (outer * parts + part) * width + mine, sum);
}

// The same for a width of 1, by `lanes` threads a row: y (outer,), or partial (outer, parts).
extern "C" __global__ void sum_rows(real* y, float* partial, int add, int outers, int parts, long per, long n,
                                    int lanes,  //
                                    const void* a, int a_kind, float a_value, int a0, int a1,
                                    const void* b, int b_kind, float b_value, int b0, int b1,
                                    const void* c, int c_kind, float c_value, int c0, int c1) {
    long mine = (long)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
    long outer = mine / parts, start = mine % parts * per, stop = min(n, start + per);
    float sum = 0.f;
    for (long at = start + threadIdx.x % lanes * 8; at < stop && outer < outers; at += lanes * 8) {
        int count = (int)min(8l, stop - at);
        float A[8], B[8], C[8], Y[8];
        read8({a, a_kind, a_value}, outer * a0 + at * a1, a1, count, A);
        read8({b, b_kind, b_value}, outer * b0 + at * b1, b1, count, B);
        read8({c, c_kind, c_value}, outer * c0 + at * c1, c1, count, C);
        apply(A, B, C, Y);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += k < count ? Y[k] : 0.f;
    }
    sum = row_sum(sum, lanes);
    if (outer < outers && threadIdx.x % lanes == 0) put(y, partial, add, mine, sum);
}
