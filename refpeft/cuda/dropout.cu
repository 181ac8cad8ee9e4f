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

// Where in x number `at` is: its rows of `x_row` numbers lie `x_step` apart; 0 says that all lie side by side.
__device__ inline long long place_of(long long at, int x_row, long long x_step) {
    if (!x_row) return at;
    unsigned int line = (unsigned int)at / x_row;  // there are fewer than 2^32 numbers then
    return line * x_step + ((unsigned int)at - line * x_row);
}

// y[i] is x[i] * scale where its word is at least `least`, else 0, plus onto[i] where that is given, which may be y:
// eight numbers a thread. The purpose is in `slot` where that is given, else it is (crc, adler). With `eights`, eight
// numbers have words that follow one another from a multiple of four on, and are in one row of x, and at multiples of 16
// bytes. Reads x and onto and writes y once; ten rounds for four numbers take about as long as that.
extern "C" __global__ void dropout(const real* x, real* y, long long size, long long first, const int* begins, int row,
                                   int width, const unsigned long long* slot, unsigned int crc, unsigned int adler,
                                   unsigned int seed, unsigned int upper_seed, unsigned int least, float scale,
                                   int eights, int x_row, long long x_step, const real* onto) {
    const long long at = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= size) return;
    Key key = {{crc, adler}, {seed, upper_seed}};
    if (slot) {
        key.purpose[0] = (unsigned int)slot[0];
        key.purpose[1] = (unsigned int)slot[1];
    }
    if (eights && at + 8 <= size) {
        const long long word = word_of(at, first, begins, row, width);
        float part[8], before[8];
        load8(x + place_of(at, x_row, x_step), part);
        if (onto) load8(onto + at, before);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Words words = philox(word / 4 + half, key);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int number = 4 * half + i;
                part[number] = words.of[i] >= least ? part[number] * scale : 0.f;
                if (onto) part[number] += before[number];
            }
        }
        store8(y + at, part);
        return;
    }
    for (long long i = at; i < at + 8 && i < size; i++) {
        const long long word = word_of(i, first, begins, row, width);
        const bool kept = philox(word / 4, key).of[word % 4] >= least;
        y[i] = narrow((kept ? wide(x[place_of(i, x_row, x_step)]) * scale : 0.f) + (onto ? wide(onto[i]) : 0.f));
    }
}
