/* Matrix products in float for processors without tile registers (AVX2 with FMA): C[M, N] = A[M, K] B[K, N].
 *
 * B comes in panels of 16 columns: for each k the 16 floats of that row, one after the other. A is brought to strips of 6 rows as
 * it is needed, so that weights are read in place and in their own type, once per product. 6 x 16 of C stay in registers
 * while K goes by in blocks: a block of B's panel stays in the first-level cache, the strips of a block of A in the second.
 * Each sum runs over k in one order, whatever the other rows and columns and the number of threads.
 */
#pragma once
#include "vector.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define HAS_PRODUCTS 1
#define STRIP 6        /* rows of C at a time */
#define PANEL 16       /* columns of C at a time */
#define K_BLOCK 256    /* of k at a time */
#define M_BLOCK 192 /* rows of A at a time, of both parts */
#define STRIP_SIZE (STRIP * K_BLOCK + 8) /* floats, with room for writing 8 where 6 count */
#define BLOCK_SIZE (M_BLOCK * PANEL)     /* floats of a block's C for one panel */

/* Order of a strip: all k of a row together, or all 6 rows of a k. */
enum order { BY_ROW, BY_K };

typedef struct product product;
struct product {
    i64 M, N, K;
    int parts; /* 1, or 2: rows m of A, and the same rows `part_rows` further down, make one block */
    i64 part_rows;
    enum order order;
    void (*pack)(const product *, i64 m, i64 rows, i64 k, i64 depth, float *strips);
    void (*finish)(const product *, i64 m, i64 rows, i64 part_offset, i64 panel, const float *c);
    void (*prepare)(const product *, i64 m, i64 panel); /* null, or prefetches what finish writes for 6 rows from m */
    const void *a; /* the matrix that pack reads: its first row, and the stride of its rows */
    i64 a_stride;
    const float *panels;
    /* The memory that finish writes. */
    element *out;  /* C, or C transposed, with the stride below; or, if not null, the sum to add to: */
    float *sum;
    i64 out_stride;
    float *act, *grad; /* panels of the activation, and of the gradients of gate and up */
    element *hidden;   /* panels of gate and up */
};

INLINE i64 smaller_of(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 larger_of(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 strips_of(i64 rows) { return (rows + STRIP - 1) / STRIP; }
INLINE i64 panels_of(i64 columns) { return (columns + PANEL - 1) / PANEL; }

INLINE __m256 load_8(const element *p) {
#if ELEMENT_BITS == 16
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
#else
    return _mm256_loadu_ps(p);
#endif
}

/* ---- strips of A ---- */

/* Rows to prefetch: the hardware does not fetch short pieces that lie far apart. */
#define ROWS_AHEAD 8
#define COLUMNS_AHEAD 4 /* more would push one another out of the first-level cache where rows are 4 KB apart */

INLINE void fetch(const element *from, i64 count) {
    for (i64 i = 0; i < count; i += 64 / (i64)sizeof *from) __builtin_prefetch(from + i);
}

/* Pack rows of elements: all k of a row together. */
static void pack_rows(const product *p, i64 m, i64 rows, i64 k, i64 depth, float *strips) {
    for (i64 i = 0; i < rows; i++) {
        const element *from = (const element *)p->a + (m + i) * p->a_stride + k;
        float *to = strips + i / STRIP * STRIP_SIZE + i % STRIP * K_BLOCK;
        fetch(from + ROWS_AHEAD * p->a_stride, depth);
        FOR_COLUMNS(j, n, depth, { store_float(to + j, load(from + j, n), n); })
    }
}

/* Pack columns of elements: all columns of a k together. */
static void pack_columns(const product *p, i64 m, i64 rows, i64 k, i64 depth, float *strips) {
    i64 beyond = p->a_stride - m, eights = smaller_of(rows, beyond - 7); /* columns that may be read; as many at a time */
    for (i64 j = 0; j < depth; j++) {
        const element *from = (const element *)p->a + (k + j) * p->a_stride + m;
        float *to = strips + j * STRIP;
        fetch(from + COLUMNS_AHEAD * p->a_stride, rows);
        i64 i = 0;
        for (; i < eights; i += STRIP, to += STRIP_SIZE) _mm256_storeu_ps(to, load_8(from + i));
        for (; i < rows; i += STRIP, to += STRIP_SIZE)
            store_float(to, load(from + i, smaller_of(STRIP, beyond - i)), STRIP);
    }
}

/* Pack columns of panels (k = the panels' columns), each of a_stride rows; k must be a multiple of 16. */
static void pack_panels(const product *p, i64 m, i64 rows, i64 k, i64 depth, float *strips) {
    for (i64 j = 0; j < depth; j += PANEL) {
        const float *from = (const float *)p->a + ((k + j) / PANEL * p->a_stride + m) * PANEL;
        for (i64 i = 0; i < rows; i++)
            memcpy(strips + i / STRIP * STRIP_SIZE + i % STRIP * K_BLOCK + j, from + i * PANEL, PANEL * sizeof(float));
    }
}

/* ---- panels of B ---- */

INLINE void transpose_8(__m256 *r) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
}

/* Fill the panels whose columns are the R rows of x[R, K]; columns beyond R are zeros. */
static void panels_of_rows(const element *x, i64 R, i64 K, float *panels) {
    OMP(omp for schedule(static))
    for (i64 panel = 0; panel < panels_of(R); panel++)
        for (i64 half = 0; half < PANEL; half += 8) {
            const element *rows = x + (panel * PANEL + half) * K;
            float *to = panels + panel * K * PANEL + half;
            i64 count = R - panel * PANEL - half, k = 0;
            for (; k + 8 <= K; k += 8, to += 8 * PANEL) {
                __m256 r[8];
                for (i64 i = 0; i < 8; i++) r[i] = i < count ? load_8(rows + i * K + k) : _mm256_setzero_ps();
                transpose_8(r);
                for (int i = 0; i < 8; i++) _mm256_storeu_ps(to + i * PANEL, r[i]);
            }
            for (; k < K; k++, to += PANEL)
                for (i64 i = 0; i < 8; i++) to[i] = i < count ? load(rows + i * K + k, 1)[0] : 0;
        }
}

/* Fill the panels whose columns are those of x[R, N] (k = its rows); columns beyond N are zeros. */
static void panels_of_columns(const element *x, i64 R, i64 N, float *panels) {
    OMP(omp for schedule(static))
    for (i64 r = 0; r < R; r++) {
        FOR_COLUMNS(j, n, N, { store_float(panels + (j / PANEL * R + r) * PANEL + j % PANEL, load(x + r * N + j, n), LANES); })
        if ((N + LANES - 1) / LANES % 2) store_float(panels + (N / PANEL * R + r) * PANEL + LANES, (vf){0}, LANES);
    }
}

/* ---- 6 x 16 of C ---- */

/* Compute c = A B, or c += A B after the first block of k, for some strips and some eights of columns. */
INLINE void tile(const float *a, const i64 row_step, const i64 k_step, const float *b, i64 depth, float *c, int first,
                 const int strips, const int eights) {
    __m256 sum[2 * STRIP][2];
    for (int i = 0; i < strips * STRIP; i++) {
        __builtin_prefetch(c + i * PANEL);
        for (int j = 0; j < eights; j++) sum[i][j] = _mm256_setzero_ps();
    }
    for (i64 k = 0; k < depth; k++, a += k_step, b += PANEL) {
        __m256 right[2];
        for (int j = 0; j < eights; j++) right[j] = _mm256_load_ps(b + 8 * j);
        for (int i = 0; i < strips * STRIP; i++) {
            __m256 left = _mm256_broadcast_ss(a + i / STRIP * STRIP_SIZE + i % STRIP * row_step);
            for (int j = 0; j < eights; j++) sum[i][j] = _mm256_fmadd_ps(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < strips * STRIP; i++)
        for (int j = 0; j < eights; j++) {
            if (!first) sum[i][j] = _mm256_add_ps(_mm256_load_ps(c + i * PANEL + 8 * j), sum[i][j]);
            _mm256_store_ps(c + i * PANEL + 8 * j, sum[i][j]);
        }
}

/* Multiply all strips of the block at row m by one panel, whose last columns may be padding; a narrow panel takes two strips
 * at a time. */
INLINE void tiles(const product *p, const float *strips, i64 count, const i64 row_step, const i64 k_step, i64 m, i64 k,
                  i64 depth, i64 panel, float *c) {
    const float *b = p->panels + (panel * p->K + k) * PANEL;
    i64 columns = p->N - panel * PANEL, next_panel = p->K * PANEL;
    int first = k == 0, prepares = p->prepare && k + depth == p->K;
    i64 s = 0, lines = (depth + count - 1) / count; /* of the next panel, a line for each k */
    const float *next = b + next_panel;
    if (columns <= 8)
        for (; s + 2 <= count; s += 2)
            tile(strips + s * STRIP_SIZE, row_step, k_step, b, depth, c + s * STRIP * PANEL, first, 2, 1);
    for (; s < count; s++) {
        for (i64 i = 0; i < lines; i++, next += PANEL) _mm_prefetch((const char *)next, _MM_HINT_T1);
        if (prepares) p->prepare(p, m + s * STRIP, panel);
        tile(strips + s * STRIP_SIZE, row_step, k_step, b, depth, c + s * STRIP * PANEL, first, 1, 2);
    }
}

static void tiles_by_row(const product *p, const float *strips, i64 count, i64 m, i64 k, i64 depth, i64 panel, float *c) {
    tiles(p, strips, count, K_BLOCK, 1, m, k, depth, panel, c);
}

static void tiles_by_k(const product *p, const float *strips, i64 count, i64 m, i64 k, i64 depth, i64 panel, float *c) {
    tiles(p, strips, count, 1, STRIP, m, k, depth, panel, c);
}

/* ---- a product ---- */

/* A thread's memory for products of at most N columns. */
typedef struct {
    float *strips, *c;
} workspace;

static workspace new_workspace(i64 N) {
    i64 strips = (M_BLOCK / STRIP + 1) * STRIP_SIZE, c = panels_of(N) * BLOCK_SIZE;
    float *memory = aligned_alloc(64, ((strips + c) * sizeof(float) + 63) / 64 * 64);
    memset(memory, 0, strips * sizeof(float)); /* rows beyond the last one are computed too */
    return (workspace){memory, memory + strips};
}

static void free_workspace(workspace w) { free(w.strips); }

#define UNIT (4 * STRIP) /* rows: whole strips and half panels */

/* Multiply; all threads of a parallel region call this, each takes a part of the rows, and all leave together. */
static void multiply(const product *p, workspace w) {
    i64 units = (p->M + UNIT - 1) / UNIT, threads = omp_get_num_threads(), thread = omp_get_thread_num();
    i64 start = units * thread / threads * UNIT, stop = smaller_of(units * (thread + 1) / threads * UNIT, p->M);
    i64 block = M_BLOCK / p->parts, panels = panels_of(p->N);
    for (i64 m = start; m < stop; m += block) {
        i64 rows = smaller_of(block, stop - m), strips = strips_of(rows);
        for (i64 k = 0; k < p->K; k += K_BLOCK) {
            i64 depth = smaller_of(K_BLOCK, p->K - k);
            for (int part = 0; part < p->parts; part++)
                p->pack(p, m + part * p->part_rows, rows, k, depth, w.strips + part * strips * STRIP_SIZE);
            for (i64 panel = 0; panel < panels; panel++) {
                float *c = w.c + (p->K > K_BLOCK ? panel * BLOCK_SIZE : 0); /* kept until the last block of k */
                (p->order == BY_ROW ? tiles_by_row : tiles_by_k)(p, w.strips, strips * p->parts, m, k, depth, panel, c);
                if (k + depth == p->K) p->finish(p, m, rows, strips * STRIP, panel, c);
            }
        }
    }
    OMP(omp barrier)
}
#endif
