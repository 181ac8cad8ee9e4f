// Rows of arrays by their numbers, and back: copies, rows put or added in place, and sums of rows of the same number in a
// fixed order. Negative numbers count from the end, and those beyond wrap around, as in CuPy.

#include "common.cuh"

__device__ inline long wrapped(long id, long rows) {
    id %= rows;
    return id < 0 ? id + rows : id;
}

// An array of which rows are read or written: the places along its first axis, or the first two (`second` may be null),
// and two axes of numbers, (inner, width), with the steps between them.
struct Rows {
    const int* first;
    const int* second;
    int n0, n1;
    long step0, step1;
    int inner;
    long inner_step;
    int width;
    long width_step;
};

struct Group {  // up to eight numbers in a row
    long here, there;  // where they are in the rows side by side, and in the array
    int count;
};

__device__ inline Group my_group(const Rows& rows, unsigned int groups) {
    unsigned int mine = blockIdx.x * blockDim.x + threadIdx.x, per_line = (rows.width + 7) / 8;
    if (mine >= groups) return {0, 0, 0};
    unsigned int line = mine / per_line;
    int column = mine % per_line * 8, inner = line % rows.inner, row = line / rows.inner;
    long there = wrapped(rows.first[row], rows.n0) * rows.step0 + inner * rows.inner_step + column * rows.width_step;
    if (rows.second) there += wrapped(rows.second[row], rows.n1) * rows.step1;
    return {(long)line * rows.width + column, there, min(8, rows.width - column)};
}

// `to` (rows, inner, width) from an array of float, or of bfloat16 where it is `low`. Reads and writes each number once.
extern "C" __global__ void copy_rows(const void* from, int low, real* to, int in_eights, unsigned int groups,
                                     const int* first, const int* second, int n0, int n1, long step0, long step1, int inner,
                                     long inner_step, int width, long width_step) {
    Rows rows = {first, second, n0, n1, step0, step1, inner, inner_step, width, width_step};
    Group at = my_group(rows, groups);
    const float* wide_from = static_cast<const float*>(from);
    const __nv_bfloat16* low_from = static_cast<const __nv_bfloat16*>(from);
    if (in_eights && at.count == 8) {
        float v[8];
        if (low) load8(low_from + at.there, v);
        else load8(wide_from + at.there, v);
        store8(to + at.here, v);
        return;
    }
    for (int k = 0; k < at.count; k++) {
        long there = at.there + k * width_step;
        to[at.here + k] = narrow(low ? __bfloat162float(low_from[there]) : wide_from[there]);
    }
}

// The rows of `from` (rows, inner, width) put into an array, or added to it: no row twice.
extern "C" __global__ void put_rows(real* to, const real* from, int add, int in_eights, unsigned int groups,
                                    const int* first, const int* second, int n0, int n1, long step0, long step1, int inner,
                                    long inner_step, int width, long width_step) {
    Rows rows = {first, second, n0, n1, step0, step1, inner, inner_step, width, width_step};
    Group at = my_group(rows, groups);
    if (in_eights && at.count == 8) {
        float v[8], before[8];
        load8(from + at.here, v);
        if (add) {
            load8(to + at.there, before);
            for (int k = 0; k < 8; k++) v[k] += before[k];
        }
        store8(to + at.there, v);
        return;
    }
    for (int k = 0; k < at.count; k++) {
        real* place = to + at.there + k * width_step;
        *place = narrow(wide(from[at.here + k]) + (add ? wide(*place) : 0.f));
    }
}

// Which of n numbers comes where, sorted, the first of equal ones first: by counting what comes before it, a warp each.
// 4 n bytes are read n times, from the caches: n is no more than some ten thousands.
extern "C" __global__ void sort_ids(const int* ids, int* sorted, int* order, int n, int rows) {
    int mine = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    int id = mine < n ? wrapped(ids[mine], rows) : 0, before = 0;
    for (int i = lane; i < n; i += 32) {
        int other = wrapped(ids[i], rows);
        before += other < id || (other == id && i < mine);
    }
    int place = (int)warp_sum((float)before);  // exact below 2^24
    if (mine < n && lane == 0) {
        sorted[place] = id;
        order[place] = mine;
    }
}

// The first place of `sorted` from `from` on with more than `id`.
__device__ inline int end_of(const int* sorted, int id, int from, int n) {
    int stop = n;
    while (from < stop) {
        int middle = from + (stop - from) / 2;
        if (sorted[middle] > id) stop = middle;
        else from = middle + 1;
    }
    return stop;
}

// y[id] (rows, width) is, or has added to it, the sum of the rows of g whose number is `id`, for all that occur: a block
// for each run of equal ids and each 256 columns, eight columns a thread and eight rows at a time. Reads g once.
extern "C" __global__ void sum_runs(const real* g, const int* sorted, const int* order, real* y, int add, int n, int width,
                                    int in_eights) {
    __shared__ float of_line[8][256];
    int blocks = (width + 255) / 256, place = blockIdx.x / blocks, first = blockIdx.x % blocks * 256;
    int id = sorted[place];
    if (place > 0 && sorted[place - 1] == id) return;  // the run's first place has the work, for all threads alike
    int line = threadIdx.x / 32, column = first + threadIdx.x % 32 * 8, stop = end_of(sorted, id, place, n);
    int count = min(8, width - column);
    float sums[8] = {};
    for (int i = place + line; i < stop && count > 0; i += 8) {
        const real* from = g + (long)order[i] * width + column;
        float v[8];
        if (in_eights && count == 8) load8(from, v);
        else
            for (int k = 0; k < 8; k++) v[k] = k < count ? wide(from[k]) : 0.f;
#pragma unroll
        for (int k = 0; k < 8; k++) sums[k] += v[k];
    }
    for (int k = 0; k < 8; k++) of_line[line][column - first + k] = sums[k];
    __syncthreads();
    int mine = first + threadIdx.x;
    if (mine >= width) return;
    float sum = 0.f;
    for (int i = 0; i < 8; i++) sum += of_line[i][threadIdx.x];
    real* into = y + (long)id * width + mine;
    *into = narrow(add ? wide(*into) + sum : sum);
}

// ---- of more ids: sums of whole numbers, which are the same in any order ----

// What g is multiplied by, so that no sum passes 2**62: `size` is the sum of all |g|.
__device__ inline double fineness(float size) {
    int exponent;
    frexpf(size, &exponent);  // size < 2**exponent
    return ldexp(1.0, 61 - exponent);
}

// Adds g (n, width) to sums (rows, width) at the rows `ids`; `numbers` is n width.
extern "C" __global__ void add_rows(const real* g, const int* ids, const float* size, long long* sums, long numbers, int rows,
                                    int width) {
    long mine = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (mine >= numbers) return;
    long place = wrapped(ids[mine / width], rows) * width + mine % width;
    long long whole = llrint(wide(g[mine]) * fineness(*size));
    atomicAdd(reinterpret_cast<unsigned long long*>(sums + place), static_cast<unsigned long long>(whole));
}

// y is the sums, or has them added; not a number where some g was none, or infinite.
extern "C" __global__ void put_sums(const long long* sums, const float* size, real* y, int add, long numbers) {
    long mine = (long)blockIdx.x * blockDim.x + threadIdx.x;
    if (mine >= numbers) return;
    float spoiled = *size - *size, sum = sums[mine] / fineness(*size);
    y[mine] = narrow((add ? wide(y[mine]) : 0.f) + sum + spoiled);
}
