// AdaLoRA's step: what is kept of all sites' numbers, how important their triplets are, and those that go. A launch each.

#include "common.cuh"

struct Numbers {  // P, E or Q of a site
    const float *value, *gradient;
    float *sensitivity, *uncertainty;
    long long size;
};

// Moves the averages of sensitivities, and of distances from these: x = beta x + (1 - beta) new, rounded as array code
// does. Grid: (blocks of the largest, how many there are).
extern "C" __global__ void note(const Numbers* all, float beta1, float rest1, float beta2, float rest2) {
    Numbers of = all[blockIdx.y];
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= of.size) return;
    float now = fabsf(__fmul_rn(of.value[at], of.gradient[at]));
    float sensitivity = __fadd_rn(__fmul_rn(of.sensitivity[at], beta1), __fmul_rn(rest1, now));
    float distance = fabsf(__fadd_rn(now, -sensitivity));
    of.sensitivity[at] = sensitivity;
    of.uncertainty[at] = __fadd_rn(__fmul_rn(of.uncertainty[at], beta2), __fmul_rn(rest2, distance));
}

struct Triplets {  // of a site: P (out, r), E (r), Q (r, in); `first` is the number of its first among all sites'
    const float *P_sensitivity, *P_uncertainty, *E_sensitivity, *E_uncertainty, *Q_sensitivity, *Q_uncertainty;
    float* E;
    long long out, r, in, first;
};

// The importance of each triplet, by a block: its E, and the means of its column of P and its row of Q.
extern "C" __global__ void importances(const Triplets* sites, const int* site_of, float* scores) {
    Triplets of = sites[site_of[blockIdx.x]];
    long long mine = blockIdx.x - of.first;
    float P = 0.f, Q = 0.f;
    for (long long i = threadIdx.x; i < of.out; i += blockDim.x)
        P += of.P_sensitivity[i * of.r + mine] * of.P_uncertainty[i * of.r + mine];
    for (long long i = threadIdx.x; i < of.in; i += blockDim.x)
        Q += of.Q_sensitivity[mine * of.in + i] * of.Q_uncertainty[mine * of.in + i];
    P = block_sum(P);
    Q = block_sum(Q);
    if (threadIdx.x == 0)
        scores[blockIdx.x] = of.E_sensitivity[mine] * of.E_uncertainty[mine] + P / of.out + Q / of.in;
}

// E times 1 or 0.
extern "C" __global__ void prune(const Triplets* sites, const int* site_of, const bool* chosen, int count) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= count) return;
    Triplets of = sites[site_of[at]];
    of.E[at - of.first] *= chosen[at] ? 1.f : 0.f;
}
