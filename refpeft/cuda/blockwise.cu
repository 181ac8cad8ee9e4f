// refpeft.blockwise on a GPU, to the bit: no product and sum may become one operation (hence __fadd_rn), and nothing is
// compiled for approximate division or without numbers below the normal ones.
//
// Decoding is bound by memory: of a 4-bit weight in blocks of 64 with double quantization it reads 0.5 + 1/64 bytes a
// number and writes 2 (bfloat16) or 4 (float32). A unit is eight numbers, which a thread writes at once; neighbours in a
// warp have neighbouring units. All that a thread reads for its units is under way before the first is waited for.

#include "common.cuh"

#define UNITS 4  // that a thread decodes
#define SMALLEST_NORMAL 1.17549435e-38f

// ---- decoding --------------------------------------------------------------------------------------------------------

// The constants of blocks: absmax; or, where there are codes, levels[code] * absmax[block >> log_block] + offset. Where
// there is no offset it is -0, which changes no number.
struct Constants {
    const float* absmax;
    const unsigned char* codes;
    const float* levels;
    float offset;
    int log_block;

    __device__ inline float operator()(unsigned int block) const {
        if (!codes) return absmax[block];
        return __fadd_rn(levels[codes[block]] * absmax[block >> log_block], offset);
    }
};

// A block of threads decodes UNITS units a thread, and the first one what is behind the last whole unit. There are fewer
// than 2^32 units, and they cross no ends of blocks. Those of four bits have 2^log_block numbers.
#define FIRST_UNIT (blockIdx.x * blockDim.x * UNITS + threadIdx.x)

extern "C" __global__ void decode_4_bits(
    const unsigned char* codes, const float* levels, int log_block, const float* absmax,
    const unsigned char* inner_codes, const float* inner_levels, const float* inner_offset, int inner_log_block,
    real* values, long long count
) {
    unsigned int first = FIRST_UNIT, units = (unsigned int)(count / 8), raw[UNITS];
    Constants constants = {absmax, inner_codes, inner_levels, inner_offset ? *inner_offset : -0.0f, inner_log_block};
    float level = levels[threadIdx.x & 15], constant[UNITS];  // a warp has all 16 levels twice
    if (units) {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            unsigned int unit = min(first + u * blockDim.x, units - 1);  // behind the end: read, and not written
            raw[u] = reinterpret_cast<const unsigned int*>(codes)[unit];
            constant[u] = constants(unit >> (log_block - 3));
        }
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            float number[8];
#pragma unroll
            for (int i = 0; i < 8; i++)  // from the lane of that code (modulo 32); the first of two is the high half
                number[i] = __shfl_sync(0xffffffffu, level, raw[u] >> 4 * (i ^ 1)) * constant[u];
            unsigned int unit = first + u * blockDim.x;
            if (unit < units) store8(values + 8ll * unit, number);
        }
    }
    long long at = 8ll * units + threadIdx.x;
    if (blockIdx.x == 0 && at < count)
        values[at] = narrow(levels[codes[at / 2] >> (at % 2 ? 0 : 4) & 15] * constants((unsigned int)(at >> log_block)));
}

extern "C" __global__ void decode_8_bits(
    const unsigned char* codes, const float* levels, int level_count, int block, const float* absmax, float factor,
    const float* offset, real* values, long long count
) {
    __shared__ float level[256];
    unsigned int first = FIRST_UNIT, units = (unsigned int)(count / 8);
    float shift = offset ? *offset : -0.0f;
    uint2 raw[UNITS];
    float constant[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        unsigned int unit = first + u * blockDim.x;
        if (unit >= units) break;
        raw[u] = reinterpret_cast<const uint2*>(codes)[unit];
        constant[u] = absmax[unit / (unsigned int)(block / 8)];
    }
    for (int i = threadIdx.x; i < level_count; i += blockDim.x) level[i] = levels[i];
    __syncthreads();
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        unsigned int unit = first + u * blockDim.x;
        if (unit >= units) break;
        float number[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            unsigned int code = (i < 4 ? raw[u].x : raw[u].y) >> 8 * (i % 4) & 255;
            number[i] = __fadd_rn(level[code] * constant[u] * factor, shift);
        }
        store8(values + 8ll * unit, number);
    }
    long long at = 8ll * units + threadIdx.x;
    if (blockIdx.x == 0 && at < count)
        values[at] = narrow(__fadd_rn(level[codes[at]] * absmax[at / block] * factor, shift));
}

// ---- encoding --------------------------------------------------------------------------------------------------------

// How many of the rising bounds are below `value`.
__device__ inline int rank_of(float value, const float* bounds, int count) {
    int low = 0, high = count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (bounds[middle] < value) low = middle + 1;
        else high = middle;
    }
    return low;
}

// A warp encodes a block of numbers, which it reads twice, the second time from the cache: 4 bytes a number from memory,
// and a half or one is written. What lies behind the end of the array counts as 0.
template <int BITS>
__device__ inline void encode(
    const float* array, long long count, int block, const float* bounds, const unsigned char* codes_of_ranks,
    int bound_count, unsigned char* codes, float* absmax, float* bound, unsigned char* code
) {
    for (int i = threadIdx.x; i < bound_count; i += blockDim.x) bound[i] = bounds[i];
    for (int i = threadIdx.x; i <= bound_count; i += blockDim.x) code[i] = codes_of_ranks[i];
    __syncthreads();
    int lane = threadIdx.x & 31;
    long long which = (long long)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), start = which * block;
    if (start >= count) return;
    int size = count - start < block ? (int)(count - start) : block;
    float largest = 0;
    for (int i = lane; i < size; i += 32) largest = fmaxf(largest, fabsf(array[start + i]));
    largest = warp_max(largest);
    float factor = largest >= SMALLEST_NORMAL ? 1.0f / largest : 0.0f;
    if (lane == 0) absmax[which] = factor > 0 ? largest : 0.0f;
    if constexpr (BITS == 8) {
        for (int i = lane; i < size; i += 32)
            codes[start + i] = code[rank_of(array[start + i] * factor, bound, bound_count)];
    } else {
        for (int i = 2 * lane; i < size; i += 64) {  // two codes in a byte, the first in the high half
            float second = i + 1 < size ? array[start + i + 1] : 0.0f;
            int high = code[rank_of(array[start + i] * factor, bound, bound_count)];
            int low = code[rank_of(second * factor, bound, bound_count)];
            codes[(start + i) / 2] = (unsigned char)(high << 4 | low);
        }
    }
}

extern "C" __global__ void encode_4_bits(
    const float* array, long long count, int block, const float* bounds, const unsigned char* codes_of_ranks,
    int bound_count, unsigned char* codes, float* absmax
) {
    __shared__ float bound[256];
    __shared__ unsigned char code[256];
    encode<4>(array, count, block, bounds, codes_of_ranks, bound_count, codes, absmax, bound, code);
}

extern "C" __global__ void encode_8_bits(
    const float* array, long long count, int block, const float* bounds, const unsigned char* codes_of_ranks,
    int bound_count, unsigned char* codes, float* absmax
) {
    __shared__ float bound[256];
    __shared__ unsigned char code[256];
    encode<8>(array, count, block, bounds, codes_of_ranks, bound_count, codes, absmax, bound, code);
}
