// What the kernels of attention share (FlashAttention-2: Dao, 2023, arXiv:2307.08691).
//
// A block of WARPS warps holds ROWS rows a warp of one side (queries, or keys) and walks over tiles of COLUMNS rows of
// the other: scores exist as ROWS x COLUMNS tiles in the registers of a warp, and nowhere else. While a tile is in use,
// the next one is copied to the other half of a double buffer. DIM, ROWS, COLUMNS and WARPS are given when compiling.

constexpr int WIDTH = (DIM + 15) / 16 * 16;  // of a row in shared memory, zeros behind DIM: products go in steps of 16
constexpr int STRIDE = WIDTH + 8;  // an odd number of 16 bytes: eight rows that ldmatrix reads lie in different banks
constexpr int THREADS = 32 * WARPS;
constexpr int BLOCK = ROWS * WARPS;
constexpr int DOWN = ROWS / 16, ACROSS = COLUMNS / 8, WIDE = WIDTH / 8;  // mma tiles of a warp's scores, of its sums
constexpr float LOG2E = 1.4426950408889634f;
constexpr int LARGEST = 0x7fffffff;

// ---- who sees whom: refpeft.fused.Mask -----------------------------------------------------------------------------

constexpr int GRANULE = 32;

// The documents' numbers of GRANULE queries or keys, and their range; made by flash_numbers.
struct Numbers {
    int of[GRANULE];
    int least, most;
};

enum Kind { HIDDEN, PART, WHOLE };  // whether no query of a tile sees any key of it, some see some, or all see all

struct Mask {
    int queries, keys;
    int extra;   // so many keys in front are the adapters'
    int causal;
    int window;  // more than there are keys: none
    const Numbers* of_queries;  // of this row of the batch; null: one document
    const Numbers* of_keys;

    // Where query i stands among the keys.
    __device__ int position(int i) const { return i + keys - queries; }

    // Whether query i sees key j, documents aside. Without branches, for it is asked of every score.
    __device__ bool reaches(int i, int j) const {
        int end = causal ? min(keys, position(i) + 1) : keys;
        return (j < end) & ((j < extra) | (j > position(i) - window));
    }

    // Whether key j is of query i's document, or the adapters'.
    __device__ bool same(int i, int j) const {
        return (j < extra) | (of_queries[i / GRANULE].of[i % GRANULE] == of_keys[j / GRANULE].of[j % GRANULE]);
    }

    // Of queries i..i_end-1 and keys j..j_end-1; both may go beyond the last.
    __device__ Kind kind(int i, int i_end, int j, int j_end) const {
        if (i >= queries || j >= keys) return HIDDEN;
        bool whole = j_end <= keys;
        i_end = min(i_end, queries);
        j_end = min(j_end, keys);
        int first = position(i), last = position(i_end - 1);
        if (causal && j > last) return HIDDEN;
        if (causal && j_end - 1 > first) whole = false;
        if (j_end <= extra) return whole ? WHOLE : PART;
        bool tokens = j >= extra;  // no key of the adapters
        if (tokens && j_end - 1 <= first - window) return HIDDEN;
        if (max(j, extra) <= last - window) whole = false;
        if (of_keys) {
            int asked_least, asked_most, least, most;
            range(of_queries, i, i_end, asked_least, asked_most);
            range(of_keys, j, j_end, least, most);
            if (tokens && (asked_most < least || most < asked_least)) return HIDDEN;
            if (asked_least != most || asked_most != least) whole = false;  // all four are equal, or not
        }
        return whole ? WHOLE : PART;
    }

    __device__ static void range(const Numbers* numbers, int start, int end, int& least, int& most) {
        least = numbers[start / GRANULE].least;
        most = numbers[start / GRANULE].most;
#pragma unroll 1
        for (int g = start / GRANULE + 1; g <= (end - 1) / GRANULE; g++) {
            least = min(least, numbers[g].least);
            most = max(most, numbers[g].most);
        }
    }
};

// The numbers of row b of a batch, which are (batch, granules) with as many granules as 128s hold `count`; or null.
__device__ inline const Numbers* numbers_of(const Numbers* all, int b, int count) {
    return all ? all + (long long)b * ((count + 127) / 128 * (128 / GRANULE)) : nullptr;
}

// A warp's scores of query i with key j become -inf where not seen(i, j). Its first row and column are the given query
// and key, or, if KEYS_DOWN, key and query.
template <bool KEYS_DOWN, class Seen>
__device__ inline void keep(float (&scores)[DOWN][ACROSS][4], int row, int column, Seen seen) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int n = 0; n < ACROSS; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int down = row + 16 * m + e / 2 * 8 + lane / 4, across = column + 8 * n + lane % 4 * 2 + e % 2;
                if (!(KEYS_DOWN ? seen(across, down) : seen(down, across))) scores[m][n][e] = -INFINITY;
            }
}

// A warp's scores of what is not seen become -inf.
template <bool KEYS_DOWN>
__device__ inline void hide(float (&scores)[DOWN][ACROSS][4], const Mask& mask, int row, int column) {
    keep<KEYS_DOWN>(scores, row, column, [&](int i, int j) { return mask.reaches(i, j); });
    if (mask.of_keys) keep<KEYS_DOWN>(scores, row, column, [&](int i, int j) { return mask.same(i, j); });
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

// Starts to copy COUNT rows of DIM, from row `first` on, to a tile in shared memory; zeros from row `end` on. A thread
// copies 16 bytes of every AT_ONCE-th row: its addresses differ by one step.
template <int COUNT>
__device__ inline void load_tile(real* tile, const real* from, long long stride, int first, int end) {
    constexpr int AT_ONCE = THREADS / WIDE;
    int row = threadIdx.x / WIDE, column = threadIdx.x % WIDE * 8;
    if (THREADS % WIDE && row >= AT_ONCE) return;
    from += (first + row) * stride + column;
    tile += row * STRIDE + column;
#pragma unroll
    for (int i = 0; i < COUNT; i += AT_ONCE) {
        if (COUNT % AT_ONCE == 0 || i + row < COUNT)
            cp_async_16(tile + i * STRIDE, from, first + i + row < end && column < DIM);
        from += AT_ONCE * stride;
    }
}

// scores += a b^T for a warp: its ROWS rows of a tile, and a tile of COLUMNS rows, over DIM.
__device__ inline void multiply_rows(float (&scores)[DOWN][ACROSS][4], const real* a, const real* b) {
    int lane = threadIdx.x % 32;
    const real* of_a = a + lane % 16 * STRIDE + lane / 16 * 8;
    const real* of_b = b + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < WIDTH; k += 16) {
        unsigned int left[DOWN][4], right[4];
#pragma unroll
        for (int m = 0; m < DOWN; m++) ldmatrix_x4(left[m], of_a + 16 * m * STRIDE + k);
#pragma unroll
        for (int n = 0; n < ACROSS; n += 2) {
            ldmatrix_x4(right, of_b + 8 * n * STRIDE + k);
#pragma unroll
            for (int m = 0; m < DOWN; m++) {
                mma_bf16(scores[m][n], left[m], right);
                mma_bf16(scores[m][n + 1], left[m], right + 2);
            }
        }
    }
}

// sums += weights b for a warp: ROWS x COLUMNS numbers in registers, rounded to bfloat16, and a tile of COLUMNS rows.
__device__ inline void add_weighted(float (&sums)[DOWN][WIDE][4], const float (&weights)[DOWN][ACROSS][4],
                                    const real* b) {
    int lane = threadIdx.x % 32;
    const real* of_b = b + lane % 16 * STRIDE + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < ACROSS; k += 2) {
        unsigned int left[DOWN][4], right[4];
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                left[m][i] = pack2(weights[m][k + i / 2][i % 2 * 2], weights[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int n = 0; n < WIDE; n += 2) {
            ldmatrix_x4_trans(right, of_b + 8 * k * STRIDE + 8 * n);
#pragma unroll
            for (int m = 0; m < DOWN; m++) {
                mma_bf16(sums[m][n], left[m], right);
                mma_bf16(sums[m][n + 1], left[m], right + 2);
            }
        }
    }
}

// Writes a warp's sums as rows of DIM at `to`, `rows` of them at most; through the warp's own rows of a tile in shared
// memory, so that each thread writes 16 bytes at once.
__device__ inline void store_rows(float (&sums)[DOWN][WIDE][4], real* tile, real* to, long long stride, int rows) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int n = 0; n < WIDE; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                real* pair = tile + (16 * m + 8 * half + lane / 4) * STRIDE + 8 * n + lane % 4 * 2;
                *reinterpret_cast<unsigned int*>(pair) = pack2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
            }
    __syncwarp();
    for (int at = lane; at < ROWS * (DIM / 8); at += 32) {
        int row = at / (DIM / 8), column = at % (DIM / 8) * 8;
        if (row < rows)
            *reinterpret_cast<Sixteen*>(to + row * stride + column) =
                *reinterpret_cast<const Sixteen*>(tile + row * STRIDE + column);
    }
}
