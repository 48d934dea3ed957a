/* Projections to few outputs in float: the router's. See vector.h for conventions.
 *
 * Letters: T tokens, D width, P outputs.
 */
#include "tiles.h"
#if HAS_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Tokens (and outputs) of one step: their accumulators must fit the registers. Each sum runs over d in the same order
 * whatever the step, so that a token's logits do not depend on the other tokens. */
#if LANES == 16
#define TOKENS 4
#else
#define TOKENS 2
#endif
#define OUTPUTS 6
#define AT_A_TIME 32 /* tokens at a time in backward: their rows stay in the caches over all columns */

INLINE void project_step(const element *x, const float *weight, float *out, i64 D, i64 P, int tokens, int outputs) {
    vf total[TOKENS][OUTPUTS] = {0};
    FOR_COLUMNS(d, n, D, {
        vf row[TOKENS];
        for (int i = 0; i < tokens; i++) row[i] = load(x + i * D + d, n);
        for (int j = 0; j < outputs; j++) {
            vf w = load_float(weight + j * D + d, n);
            for (int i = 0; i < tokens; i++) total[i][j] = multiply_add(row[i], w, total[i][j]);
        }
    })
    for (int i = 0; i < tokens; i++)
        for (int j = 0; j < outputs; j++) out[i * P + j] = sum(total[i][j]);
}

INLINE void project_tokens(const element *x, const float *weight, float *out, i64 D, i64 P, int tokens) {
    i64 p = 0;
    for (; p + 6 <= P; p += 6) project_step(x, weight + p * D, out + p, D, P, tokens, 6);
    if (P - p >= 4) project_step(x, weight + p * D, out + p, D, P, tokens, 4), p += 4;
    if (P - p >= 2) project_step(x, weight + p * D, out + p, D, P, tokens, 2), p += 2;
    if (P - p == 1) project_step(x, weight + p * D, out + p, D, P, tokens, 1);
}

static void project_by_vectors(const element *x, const float *weight, float *out, i64 T, i64 D, i64 P) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t += TOKENS) {
        if (t + TOKENS <= T)
            project_tokens(x + t * D, weight, out + t * P, D, P, TOKENS);
        else
            for (i64 i = t; i < T; i++) project_tokens(x + i * D, weight, out + i * P, D, P, 1);
    }
}

/* Weights[P, D] and sums of their gradients lie as [D / LANES, P, LANES] in backward, so that those of a few columns stay
 * in the first-level cache. One step: LANES columns of some tokens, or the last n < LANES. */
INLINE void project_backward_step(const element *x, const float *weight, const float *grad, const element *base,
                                  element *grad_x, float *sums, i64 D, i64 P, i64 n, int tokens) {
    vf row[2 * TOKENS];
    vf total[2 * TOKENS] = {0};
    for (int i = 0; i < tokens; i++) {
        row[i] = load(x + i * D, n);
        if (base) total[i] = load(base + i * D, n);
    }
    for (i64 p = 0; p < P; p++) {
        vf w = load_float(weight + p * LANES, LANES), grad_w = load_float(sums + p * LANES, LANES);
        for (int i = 0; i < tokens; i++) {
            total[i] += grad[i * P + p] * w;
            grad_w += grad[i * P + p] * row[i];
        }
        store_float(sums + p * LANES, grad_w, LANES);
    }
    for (int i = 0; i < tokens; i++) store(grad_x + i * D, total[i], n);
}

INLINE void project_backward_columns(const element *x, const float *weight, const float *grad, const element *base,
                                     element *grad_x, float *sums, i64 T, i64 D, i64 P, i64 n) {
    const i64 most = 2 * TOKENS;
    i64 t = 0;
    for (; t + most <= T; t += most)
        project_backward_step(x + t * D, weight, grad + t * P, base ? base + t * D : 0, grad_x + t * D, sums, D, P, n, most);
    for (; t < T; t++)
        project_backward_step(x + t * D, weight, grad + t * P, base ? base + t * D : 0, grad_x + t * D, sums, D, P, n, 1);
}

static void project_backward_by_vectors(const element *x, const float *weight, const float *grad,
                                        const element *base, element *grad_x, float *grad_weight, i64 T, i64 D, i64 P) {
    int threads = omp_get_max_threads();
    i64 size = ((D + LANES - 1) / LANES * P + 1) / 2 * 2 * LANES;
    float *weights = aligned_alloc(64, (threads + 1) * size * sizeof *weights), *sums = weights + size;
    memset(weights, 0, (threads + 1) * size * sizeof *weights);
    for (i64 p = 0; p < P; p++)
        FOR_COLUMNS(d, n, D, { memcpy(weights + d * P + p * LANES, weight + p * D + d, n * sizeof(float)); })
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t += AT_A_TIME) {
        float *mine = sums + omp_get_thread_num() * size;
        i64 count = T - t < AT_A_TIME ? T - t : AT_A_TIME;
        FOR_COLUMNS(d, n, D, {
            i64 at = t * D + d;
            project_backward_columns(x + at, weights + d * P, grad + t * P, base ? base + at : 0, grad_x + at, mine + d * P, count,
                                     D, P, n);
        })
    }
    for (int thread = 0; thread < threads; thread++)
        for (i64 p = 0; p < P; p++)
            for (i64 d = 0; d < D; d++)
                grad_weight[p * D + d] += sums[thread * size + d / LANES * LANES * P + p * LANES + d % LANES];
    free(weights);
}

/* ---- on tile registers ---- */

#if HAS_TILES
/* Return whether the operating system lets this process use the tile registers. */
static int tiles_granted(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

#define PARTS 3 /* parts of a float: three bfloat16 hold all of its digits */

/* Return the next part of a float and leave the rest in it. */
INLINE uint16_t take_part(float *rest) {
    uint32_t bits;
    memcpy(&bits, rest, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float part;
    memcpy(&part, &bits, 4);
    *rest -= part;
    return bits >> 16;
}

/* Return one part of 16 values and leave the rest. */
INLINE vf part_of(vf v, vf *rest) {
    vf part = (vf)((vu)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v)) << 16);
    *rest = v - part;
    return part;
}

/* Return how many parts the weights need; below, tiles of all parts. By rows of k in forward (k = d, column p), so that tile
 * (step, p / 16, part) is B; by columns in backward (k = p twice over, column d): (d / 32, p / 16, part, d / 16 % 2). */
static int weight_parts(const float *weight, i64 count) {
    int parts = 1;
    for (i64 i = 0; i < count; i++) {
        float rest = weight[i];
        for (int part = 1; part <= PARTS; part++) {
            take_part(&rest);
            if (rest == 0 || rest != rest) break;
            if (part < PARTS && parts <= part) parts = part + 1;
        }
    }
    return parts;
}

static uint16_t *forward_tiles(const float *weight, i64 D, i64 P, int parts) {
    i64 groups = (P + 15) / 16, size = D / 32 * groups * parts * 512;
    uint16_t *tiles = aligned_alloc(64, size * sizeof *tiles);
    memset(tiles, 0, size * sizeof *tiles);
    for (i64 p = 0; p < P; p++)
        for (i64 d = 0; d < D; d++) {
            float rest = weight[p * D + d];
            for (int part = 0; part < parts; part++)
                tiles[((d / 32 * groups + p / 16) * parts + part) * 512 + d % 32 / 2 * 32 + p % 16 * 2 + d % 2] = take_part(&rest);
        }
    return tiles;
}

static uint16_t *backward_tiles(const float *weight, i64 D, i64 P, int parts) {
    i64 groups = (P + 15) / 16, size = D / 32 * groups * parts * 1024;
    uint16_t *tiles = aligned_alloc(64, size * sizeof *tiles);
    memset(tiles, 0, size * sizeof *tiles);
    for (i64 p = 0; p < P; p++)
        for (i64 d = 0; d < D; d++) {
            float rest = weight[p * D + d];
            for (int part = 0; part < parts; part++) {
                uint16_t *tile = tiles + (((d / 32 * groups + p / 16) * parts + part) * 2 + d / 16 % 2) * 512;
                i64 at = p % 16 / 2 * 32 + d % 16 * 2 + p % 2;
                tile[at] = tile[at + 256] = take_part(&rest);
            }
        }
    return tiles;
}

static void project_by_tiles(const element *x, const float *weight, float *out, i64 T, i64 D, i64 P) {
    int parts = weight_parts(weight, P * D);
    i64 groups = (P + 15) / 16, bytes = D * sizeof *x;
    uint16_t *tiles = forward_tiles(weight, D, P, parts);
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        element *copy = aligned_alloc(64, BLOCK * D * sizeof *copy);
        float c[2][256] __attribute__((aligned(64)));
        configure_tiles();
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t += BLOCK) {
            const element *rows = T - t >= BLOCK ? x + t * D : last_rows(x + t * D, T - t, D, copy);
            for (i64 group = 0; group < groups; group++) {
                _tile_zero(0);
                _tile_zero(1);
                for (i64 step = 0; step < D / 32; step++) {
                    _tile_loadd(4, rows + step * 32, bytes);
                    _tile_loadd(5, rows + step * 32 + 16 * D, bytes);
                    for (int part = 0; part < parts; part++) {
                        _tile_loadd(6, tiles + ((step * groups + group) * parts + part) * 512, 64);
                        _tile_dpbf16ps(0, 4, 6);
                        _tile_dpbf16ps(1, 5, 6);
                    }
                }
                _tile_stored(0, c[0], 64);
                _tile_stored(1, c[1], 64);
                i64 n = smaller(16, P - group * 16);
                for (i64 i = 0; i < BLOCK && t + i < T; i++)
                    memcpy(out + (t + i) * P + group * 16, c[i / 16] + i % 16 * 16, n * sizeof(float));
            }
        }
        _tile_release();
        free(copy);
    }
    free(tiles);
}

/* Fill the tiles of 32 tokens in backward: the gradient's first two parts side by side in rows of t, and each in rows of p. */
INLINE void gradient_tiles(const float *grad, i64 left, i64 P, i64 group, char *by_token, char *by_output) {
    i64 n = smaller(16, P - group * 16);
    __m512i high[16], low[16];
    for (int i = 0; i < 16; i++) {
        vf part[2] = {0}, rest[2] = {0}, none;
        for (int j = 0; j < 2; j++) {
            i64 t = 2 * i + j;
            if (t < left) part[j] = part_of(load_float(grad + t * P + group * 16, n), &rest[j]), rest[j] = part_of(rest[j], &none);
            _mm512_store_si512(by_token + t * 64, rounded(part[j], rest[j]));
        }
        high[i] = rounded_pairs(part[0], part[1]);
        low[i] = rounded_pairs(rest[0], rest[1]);
    }
    transpose_pairs(high);
    transpose_pairs(low);
    for (int i = 0; i < 16; i++) {
        _mm512_store_si512(by_output + i * 64, high[i]);
        _mm512_store_si512(by_output + 1024 + i * 64, low[i]);
    }
}

/* Fill two tiles of B with 32 columns of 32 rows of x: k = t. */
INLINE void tiles_of_tokens(const element *x, i64 D, char *tiles) {
    for (int i = 0; i < 16; i++) {
        __m512i even = _mm512_loadu_si512(x + 2 * i * D), odd = _mm512_loadu_si512(x + (2 * i + 1) * D);
        __m512i pairs = _mm512_load_si512(PAIRS);
        __m512i low = _mm512_inserti64x4(even, _mm512_castsi512_si256(odd), 1);
        __m512i high = _mm512_inserti64x4(odd, _mm512_extracti64x4_epi64(even, 1), 0);
        _mm512_store_si512(tiles + i * 64, _mm512_permutexvar_epi16(pairs, low));
        _mm512_store_si512(tiles + 1024 + i * 64, _mm512_permutexvar_epi16(pairs, high));
    }
}

/* Add grad^T x to the sums of one group and 32 columns. */
INLINE void add_weight_gradient(const char *by_output, const char *x_tiles, float *sums) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(6, x_tiles, 64);
    _tile_loadd(7, x_tiles + 1024, 64);
    _tile_loadd(4, by_output, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, by_output + 1024, 64);
    _tile_dpbf16ps(0, 5, 6);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
}

/* Compute grad_x of 32 tokens and 32 columns. */
INLINE void input_gradient(const char *by_token, const uint16_t *tiles, i64 groups, int parts, float *c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (i64 group = 0; group < groups; group++) {
        _tile_loadd(4, by_token + group * 2048, 64);
        _tile_loadd(5, by_token + group * 2048 + 1024, 64);
        for (int part = 0; part < parts; part++, tiles += 1024) {
            _tile_loadd(6, tiles, 64);
            _tile_loadd(7, tiles + 512, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

static void project_backward_by_tiles(const element *x, const float *weight, const float *grad, const element *base,
                                      element *grad_x, float *grad_weight, i64 T, i64 D, i64 P) {
    int parts = weight_parts(weight, P * D), threads = omp_get_max_threads();
    i64 groups = (P + 15) / 16, sums_size = groups * 16 * D;
    uint16_t *tiles = backward_tiles(weight, D, P, parts);
    float *sums = aligned_alloc(64, threads * sums_size * sizeof *sums);
    memset(sums, 0, threads * sums_size * sizeof *sums);
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        element *copy = aligned_alloc(64, BLOCK * D * sizeof *copy);
        char *by_token = aligned_alloc(64, groups * 4096), *by_output = by_token + groups * 2048;
        float c[1024] __attribute__((aligned(64))), *mine = sums + omp_get_thread_num() * sums_size;
        char x_tiles[STEP_BYTES] __attribute__((aligned(64)));
        configure_tiles();
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t += BLOCK) {
            i64 left = smaller(BLOCK, T - t);
            const element *rows = left == BLOCK ? x + t * D : last_rows(x + t * D, left, D, copy);
            for (i64 group = 0; group < groups; group++)
                gradient_tiles(grad + t * P, left, P, group, by_token + group * 2048, by_output + group * 2048);
            for (i64 d = 0; d < D; d += BLOCK) {
                input_gradient(by_token, tiles + d / 32 * groups * parts * 1024, groups, parts, c);
                tiles_of_tokens(rows + d, D, x_tiles);
                for (i64 group = 0; group < groups; group++)
                    add_weight_gradient(by_output + group * 2048, x_tiles, mine + (d / 32 * groups + group) * 512);
                for (i64 i = 0; i < left; i++) {
                    const float *from = c + i / 16 * 512 + i % 16 * 16;
                    vf low = load_float(from, 16), high = load_float(from + 256, 16);
                    const element *later = base + (t + i) * D + d;
                    if (base) low += load(later, 16), high += load(later + 16, 16);
                    _mm512_storeu_si512(grad_x + (t + i) * D + d, rounded(low, high));
                }
            }
        }
        _tile_release();
        free(by_token);
        free(copy);
    }
    for (int thread = 0; thread < threads; thread++)
        for (i64 p = 0; p < P; p++)
            for (i64 d = 0; d < D; d++)
                grad_weight[p * D + d] +=
                    sums[thread * sums_size + ((d / 32 * groups + p / 16) * 2 + d / 16 % 2) * 256 + p % 16 * 16 + d % 16];
    free(sums);
    free(tiles);
}
#else
#define project_by_tiles project_by_vectors
#define project_backward_by_tiles project_backward_by_vectors
static int tiles_granted(void) { return 0; }
#endif

/* Compute out[T, P] = x[T, D] weight[P, D]^T. */
void project(const element *x, const float *weight, float *out, i64 T, i64 D, i64 P) {
    (D % 32 == 0 && tiles_granted() ? project_by_tiles : project_by_vectors)(x, weight, out, T, D, P);
}

/* Compute grad_x[T, D] = base + grad weight from grad[T, P] and base[T, D] (or null); add to grad_weight[P, D]. */
void project_backward(const element *x, const float *weight, const float *grad, const element *base, element *grad_x,
                      float *grad_weight, i64 T, i64 D, i64 P) {
    (D % 32 == 0 && tiles_granted() ? project_backward_by_tiles : project_backward_by_vectors)(x, weight, grad, base, grad_x,
                                                                                              grad_weight, T, D, P);
}

/* Return whether this process can use tile registers. */
i64 has_amx(void) { return tiles_granted(); }
