// refpeft.blockwise on a GPU, to the bit: no product and sum may become one operation (hence __fadd_rn), and nothing is
// compiled for approximate division or without numbers below the normal ones.
//
// Decoding is bound by memory: of a 4-bit weight in blocks of 64 with double quantization it reads 0.5 + 1/64 bytes a
// number and writes 2 (bfloat16) or 4 (float32). Codes are read 4 or 8 bytes a thread, side by side in a warp, four
// reads under way at a time; levels lie in shared memory, where 16 of them are in 16 banks.

#include "common.cuh"

#define UNITS 4  // of eight numbers that a thread decodes
#define SMALLEST_NORMAL 1.17549435e-38f

// ---- decoding --------------------------------------------------------------------------------------------------------

// The eight codes of a unit as they lie in memory: one word of eight times four bits, or two of four times eight.
template <int BITS>
__device__ inline void load_codes(const unsigned char* codes, long long unit, long long count, unsigned int* raw) {
    long long first = unit * BITS, end = (count * BITS + 7) / 8;  // in bytes
    if (first + BITS <= end) {
#pragma unroll
        for (int i = 0; i < BITS / 4; i++) raw[i] = reinterpret_cast<const unsigned int*>(codes + first)[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < BITS; i++) {
        if (i % 4 == 0) raw[i / 4] = 0;
        if (first + i < end) raw[i / 4] |= (unsigned int)codes[first + i] << 8 * (i % 4);
    }
}

template <int BITS>
__device__ inline unsigned int code_of(const unsigned int* raw, int i) {
    if constexpr (BITS == 4) return raw[0] >> 4 * (i ^ 1) & 15;  // the first of two is the high half of a byte
    else return raw[i / 4] >> 8 * (i % 4) & 255;
}

template <int BITS>
__device__ inline void decode(
    const unsigned char* codes, const float* levels, int level_count, const float* offset, int log_block,
    const float* absmax, const unsigned char* inner_codes, const float* inner_levels, const float* inner_offset,
    int inner_log_block, real* values, long long count, float* level
) {
    long long first = (long long)blockIdx.x * blockDim.x * UNITS + threadIdx.x;
    unsigned int raw[UNITS][BITS / 4], inner_code[UNITS];
    float constant[UNITS];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {  // all reads of codes begin before one of them is waited for
        long long unit = first + u * blockDim.x, block = 8 * unit >> log_block;
        if (8 * unit >= count) continue;
        load_codes<BITS>(codes, unit, count, raw[u]);
        if (inner_codes) inner_code[u] = inner_codes[block];
        constant[u] = absmax[inner_codes ? block >> inner_log_block : block];
    }
    for (int i = threadIdx.x; i < level_count; i += blockDim.x) level[i] = levels[i];
    __syncthreads();
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
        long long at = 8 * (first + u * blockDim.x);
        if (at >= count) continue;
        if (inner_codes) constant[u] *= inner_levels[inner_code[u]];
        if (inner_offset) constant[u] = __fadd_rn(constant[u], *inner_offset);
        float number[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            number[i] = level[code_of<BITS>(raw[u], i)] * constant[u];
            if (offset) number[i] = __fadd_rn(number[i], *offset);
        }
        if (at + 8 <= count) {
            store8(values + at, number);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (at + i < count) values[at + i] = narrow(number[i]);
        }
    }
}

// A block of threads decodes 8 * UNITS numbers a thread. Where `inner_codes` are given, `absmax` are the constants of
// these codes' blocks; offsets are null pointers where there are none. Blocks are of 8 numbers at least.
extern "C" __global__ void decode_4_bits(
    const unsigned char* codes, const float* levels, int level_count, const float* offset, int log_block,
    const float* absmax, const unsigned char* inner_codes, const float* inner_levels, const float* inner_offset,
    int inner_log_block, real* values, long long count
) {
    __shared__ float level[16];
    decode<4>(
        codes, levels, level_count, offset, log_block, absmax, inner_codes, inner_levels, inner_offset, inner_log_block,
        values, count, level
    );
}

extern "C" __global__ void decode_8_bits(
    const unsigned char* codes, const float* levels, int level_count, const float* offset, int log_block,
    const float* absmax, const unsigned char* inner_codes, const float* inner_levels, const float* inner_offset,
    int inner_log_block, real* values, long long count
) {
    __shared__ float level[256];
    decode<8>(
        codes, levels, level_count, offset, log_block, absmax, inner_codes, inner_levels, inner_offset, inner_log_block,
        values, count, level
    );
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
