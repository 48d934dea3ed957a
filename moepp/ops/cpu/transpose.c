/* Transpose matrices: torch's product is fast only with a dense left factor. See vector.h for conventions. */
#include "vector.h"

#define TILE 32 /* whole cache lines of bfloat16, reading and writing */
#define BAND 64 /* rows handled before the next columns: neighbouring cache lines of the result */

#if ELEMENT_BITS == 16 && LANES == 16
typedef uint16_t tile_row __attribute__((vector_size(2 * TILE)));
#define LOW 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47
#define HIGH 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63

/* Five perfect shuffles of 32 rows exchange the five bits of the row number with those of the column number. */
INLINE void transpose_tile(const element *in, element *out, i64 in_stride, i64 out_stride) {
    tile_row a[TILE], b[TILE];
    for (int i = 0; i < TILE; i++) memcpy(&a[i], in + i * in_stride, sizeof a[i]);
    for (int stage = 0; stage < 5; stage++) {
        for (int i = 0; i < TILE / 2; i++) {
            b[2 * i] = __builtin_shufflevector(a[i], a[i + TILE / 2], LOW);
            b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + TILE / 2], HIGH);
        }
        memcpy(a, b, sizeof a);
    }
    for (int i = 0; i < TILE; i++) memcpy(out + i * out_stride, &a[i], sizeof a[i]);
}
#else
INLINE void transpose_tile(const element *in, element *out, i64 in_stride, i64 out_stride) {
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < TILE; j++) out[j * out_stride + i] = in[i * in_stride + j];
}
#endif

/* Compute out[columns, rows] = in[rows, columns] transposed; strides are those of rows. */
void transpose(const element *in, i64 in_stride, element *out, i64 out_stride, i64 rows, i64 columns) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(rows * columns)))
    for (i64 band = 0; band < rows; band += BAND)
        for (i64 column = 0; column < columns; column += TILE)
            for (i64 row = band; row < rows && row < band + BAND; row += TILE) {
                const element *from = in + row * in_stride + column;
                element *to = out + column * out_stride + row;
                if (row + TILE <= rows && column + TILE <= columns) {
                    transpose_tile(from, to, in_stride, out_stride);
                    continue;
                }
                for (i64 i = 0; i < TILE && row + i < rows; i++)
                    for (i64 j = 0; j < TILE && column + j < columns; j++)
                        to[j * out_stride + i] = from[i * in_stride + j];
            }
}
