// What all kernels share: the type `real` that arrays are stored in (everything is computed in float), loads and stores
// of 16 bytes, and sums over a warp and a block whose order is always the same.

#include <cuda_bf16.h>

#ifndef INFINITY  // NVRTC has no <math.h>
#define INFINITY __int_as_float(0x7f800000)
#endif

#ifdef REAL_IS_BFLOAT16
typedef __nv_bfloat16 real;
__device__ inline float wide(real x) { return __bfloat162float(x); }
__device__ inline real narrow(float x) { return __float2bfloat16_rn(x); }
#else
typedef float real;
__device__ inline float wide(real x) { return x; }
__device__ inline real narrow(float x) { return x; }
#endif

struct alignas(16) Sixteen { unsigned int word[4]; };  // bytes

// Eight numbers from an address that is a multiple of 16.
__device__ inline void load8(const __nv_bfloat16* from, float* to) {
    Sixteen raw = *reinterpret_cast<const Sixteen*>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {  // a bfloat16 is the upper half of a float
        to[2 * i] = __uint_as_float(raw.word[i] << 16);
        to[2 * i + 1] = __uint_as_float(raw.word[i] & 0xffff0000u);
    }
}

__device__ inline void load8(const float* from, float* to) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float4 raw = reinterpret_cast<const float4*>(from)[i];
        to[4 * i] = raw.x; to[4 * i + 1] = raw.y; to[4 * i + 2] = raw.z; to[4 * i + 3] = raw.w;
    }
}

__device__ inline void store8(__nv_bfloat16* to, const float* from) {
    Sixteen raw;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned int low = __bfloat16_as_ushort(__float2bfloat16_rn(from[2 * i]));
        unsigned int high = __bfloat16_as_ushort(__float2bfloat16_rn(from[2 * i + 1]));
        raw.word[i] = low | high << 16;
    }
    *reinterpret_cast<Sixteen*>(to) = raw;
}

__device__ inline void store8(float* to, const float* from) {
#pragma unroll
    for (int i = 0; i < 2; i++)
        reinterpret_cast<float4*>(to)[i] = make_float4(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
}

// Over the 32 threads of a warp; every thread gets the result.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Over all threads of a block, whose number is a multiple of 32; every thread gets the result, and must call it.
__device__ inline float block_sum(float x) {
    __shared__ float of_warp[32];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    x = warp_sum(x);
    __syncthreads();  // a call before this one may still read `of_warp`
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < (blockDim.x >> 5) ? of_warp[lane] : 0.f);
}

__device__ inline float block_max(float x) {
    __shared__ float of_warp[32];
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_max(lane < (blockDim.x >> 5) ? of_warp[lane] : -INFINITY);
}
