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

// y[i] is x[i] * scale where word `first` + i is at least `least`, else 0: eight numbers a thread. The purpose is in
// `slot` where that is given, else it is (crc, adler). With `eights`, first is a multiple of four and x and y of 16
// bytes. Reads x and writes y once; ten rounds for four numbers take about as long as that.
extern "C" __global__ void dropout(const real* x, real* y, long long size, long long first,
                                   const unsigned long long* slot, unsigned int crc, unsigned int adler,
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
        float part[8];
        load8(x + at, part);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Words words = philox((first + at) / 4 + half, key);
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
        Words words = philox((first + i) / 4, key);
        y[i] = narrow(words.of[(first + i) % 4] >= least ? wide(x[i]) * scale : 0.f);
    }
}
