// The instructions of sm_80 and later that C++ has no words for: products of bfloat16 tiles on the tensor cores, loads
// of their operands from shared memory, and copies to shared memory that run while a block computes (PTX ISA, "Matrix
// multiply-accumulate operation using mma instruction", "cp.async").
//
// mma_bf16 multiplies a (16 x 16) by b (16 x 8) and adds to d (16 x 8), a warp together. With g = lane / 4 and
// t = lane % 4 a thread holds, two neighbouring bfloat16 in a word (the lower half is the first):
//     a[0] = A[g][2t..], a[1] = A[g + 8][2t..], a[2] = A[g][2t + 8..], a[3] = A[g + 8][2t + 8..]
//     b[0] = B[2t..][g], b[1] = B[2t + 8..][g]
//     d[0] = D[g][2t], d[1] = D[g][2t + 1], d[2] = D[g + 8][2t], d[3] = D[g + 8][2t + 1]
// So the d of two neighbouring tiles, rounded, is the a of a next product.

#ifndef EMULATED

// Four 8 x 8 matrices of bfloat16 from shared memory; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes
// at a multiple of 16). r[i] gets matrix i: row g, columns 2t and 2t + 1.
__device__ inline void ldmatrix_x4(unsigned int r[4], const void* row) {
    unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// The same, each matrix transposed: r[i] gets rows 2t and 2t + 1, column g.
__device__ inline void ldmatrix_x4_trans(unsigned int r[4], const void* row) {
    unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

__device__ inline void mma_bf16(float d[4], const unsigned int a[4], const unsigned int b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Starts to copy 16 bytes to shared memory, or zeros where not `valid`: nothing is read then.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
    unsigned int at = static_cast<unsigned int>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Closes a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are still on their way.
template <int N> __device__ inline void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Two floats rounded to bfloat16 (to nearest, ties to even) in one word, the first in the lower half.
__device__ inline unsigned int pack2(float first, float second) {
    unsigned int word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// 2^x within two units in the last place; 0 for -inf.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif
