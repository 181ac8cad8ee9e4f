#include "common.cuh"

// The words of a stream of refpeft.rng (Philox 4x32-10, Salmon et al., 2011), made in registers. A counter gives four;
// its upper half is the purpose, two sums of text, its key the seed.
struct Key { unsigned int purpose[2], seed[2]; };
struct Words { unsigned int of[4]; };

__device__ inline Words philox(unsigned long long counter, Key key) {
    unsigned int c0 = (unsigned int)counter, c1 = (unsigned int)(counter >> 32);
    unsigned int c2 = key.purpose[0], c3 = key.purpose[1], k0 = key.seed[0], k1 = key.seed[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = (unsigned int)(p1 >> 32) ^ c1 ^ k0;
        c2 = (unsigned int)(p0 >> 32) ^ c3 ^ k1;
        c1 = (unsigned int)p1;
        c3 = (unsigned int)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// Which word is that of number `at`: `first` + at, or in rows that lie otherwise (rng.Order), as `begins` says.
__device__ inline long long word_of(long long at, long long first, const int* begins, int row, int width) {
    if (!begins) return first + at;
    unsigned int line = (unsigned int)at / row;  // there are fewer than 2^32 numbers then
    return (long long)begins[line] * width + ((unsigned int)at - line * row);
}

// y[i] is x[i] * scale where its word is at least `least`, else 0: eight numbers a thread. The purpose is in `slot`
// where that is given, else it is (crc, adler). With `eights`, eight numbers have words that follow one another from a
// multiple of four on, and x and y are at multiples of 16 bytes. Reads x and writes y once; ten rounds for four numbers
// take about as long as that.
extern "C" __global__ void dropout(const real* x, real* y, long long size, long long first, const int* begins, int row,
                                   int width, const unsigned long long* slot, unsigned int crc, unsigned int adler,
                                   unsigned int seed, unsigned int upper_seed, unsigned int least, float scale,
                                   int eights) {
    const long long at = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= size) return;
    Key key = {{crc, adler}, {seed, upper_seed}};
    if (slot) {
        key.purpose[0] = (unsigned int)slot[0];
        key.purpose[1] = (unsigned int)slot[1];
    }
    if (eights && at + 8 <= size) {
        const long long word = word_of(at, first, begins, row, width);
        float part[8];
        load8(x + at, part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Words words = philox(word / 4 + half, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float* number = part + 4 * half + i;
                *number = words.of[i] >= least ? *number * scale : 0.f;
            }
        }
        store8(y + at, part);
        return;
    }
    for (long long i = at; i < at + 8 && i < size; i++) {
        const long long word = word_of(i, first, begins, row, width);
        y[i] = narrow(philox(word / 4, key).of[word % 4] >= least ? wide(x[i]) * scale : 0.f);
    }
}
