/* The processor's tile registers (Intel AMX, bfloat16), and shuffles that bring values into their order.
 *
 * A tile has 16 rows of 64 bytes. One instruction adds A B to C: A[16, 32] in rows of bfloat16, C[16, 16] in rows of float,
 * B[32, 16] in 16 rows of pairs: columns' values at k and k + 1 next to each other.
 */
#pragma once
#include "vector.h"

#if ELEMENT_BITS == 16 && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAS_TILES 1
#define BLOCK 32        /* rows and columns that are handled at a time: two tiles each way */
#define STEP_BYTES 2048 /* two tiles of B, 32 of K by 32 columns */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

static void configure_tiles(void) {
    tile_config all = {.palette = 1};
    for (int i = 0; i < 8; i++) all.row_bytes[i] = 64, all.rows[i] = 16;
    _tile_loadconfig(&all);
}

/* Transpose 16 rows of 16 pairs: pair j of row i becomes pair i of row j. */
INLINE void transpose_pairs(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i++) {
        int from = i / 8 * 8 + i % 4;
        t[i] = i % 8 < 4 ? _mm512_shuffle_i32x4(r[from], r[from + 4], 0x88) : _mm512_shuffle_i32x4(r[from], r[from + 4], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        int to = i % 4 + i / 4 * 4;
        r[to] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[to + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

static const uint16_t PAIRS[32] __attribute__((aligned(64))) = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                                8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

/* Return both vectors rounded, the second behind the first. */
INLINE __m512i rounded(vf first, vf second) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }

/* Return both rounded and interleaved: first[0], second[0], first[1], second[1], ... */
INLINE __m512i rounded_pairs(vf first, vf second) {
    return _mm512_permutexvar_epi16(_mm512_load_si512(PAIRS), rounded(first, second));
}

INLINE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }

/* ---- panels: B for 32 columns, two consecutive tiles for every 32 of K ---- */

/* Fill the panel of n <= 32 rows of x[., K]; the rest of its columns are zeros. */
static inline void panel_of_rows(const element *x, i64 n, i64 K, char *panel) {
    for (i64 k = 0; k < K; k += 32, panel += STEP_BYTES)
        for (int half = 0; half < 2; half++) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                i64 row = 16 * half + i;
                r[i] = row < n ? _mm512_loadu_si512(x + row * K + k) : _mm512_setzero_si512();
            }
            transpose_pairs(r);
            for (int i = 0; i < 16; i++) _mm512_store_si512(panel + half * 1024 + i * 64, r[i]);
        }
}

/* Fill the panels of `columns` columns of w[K, .], panel_bytes apart; several at a time, so that enough of each memory page
 * is read at once. */
#define COLUMNS 128
static inline void panels_of_columns(const element *w, i64 stride, i64 K, i64 columns, char *panel, i64 panel_bytes) {
    uint16_t from[BLOCK]; /* of columns 0-15; 32 and above: of the other row */
    for (int i = 0; i < BLOCK; i++) from[i] = i / 2 + i % 2 * BLOCK;
    __m512i low = _mm512_loadu_si512(from), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (i64 k = 0; k < K; k += 2, w += 2 * stride)
        for (i64 n = 0; n < columns; n += BLOCK) {
            __m512i even = _mm512_loadu_si512(w + n), odd = _mm512_loadu_si512(w + stride + n);
            char *to = panel + n / BLOCK * panel_bytes + k / 32 * STEP_BYTES + k % 32 * 32;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + 1024, _mm512_permutex2var_epi16(even, high, odd));
            _mm_prefetch((const char *)(w + 8 * stride + n), _MM_HINT_T0);
            _mm_prefetch((const char *)(w + 9 * stride + n), _MM_HINT_T0);
        }
}

/* Copy the last n < 32 rows of A, with zeros behind them. */
INLINE const element *last_rows(const element *rows, i64 n, i64 K, element *copy) {
    memcpy(copy, rows, n * K * sizeof *rows);
    memset(copy + n * K, 0, (BLOCK - n) * K * sizeof *rows);
    return copy;
}
#endif
