/* CPU kernels of the MoE layer: what stands between its matrix products, each in one pass over memory.
 *
 * Compiled once per element type of the activations: -DELEMENT_BITS=16 (bfloat16) or 32 (float). All arithmetic is in
 * float and a result is rounded to the element type once. Where the machine has no 64-byte vectors the compiler splits
 * them. Rows are divided statically over OpenMP's threads: results depend on nothing but their number.
 *
 * Matrices are row-major and dense. Letters: T tokens, D width, K slots of a token, R rows of FFN slots, F expert
 * width, C constant experts, P outputs of a projection. A position is the row of a slot, or -1 where it has none.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define MAX_TOP_K 8 /* of top_experts(); functions.py knows it too */
#define INLINE static inline __attribute__((always_inline))
/* A parallel region costs more than it saves below some ten thousand elements. */
#define WORTH_THREADS(elements) ((elements) > 65536)
#define OMP(text) _Pragma(#text)

typedef int64_t i64;
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

/* ---- vectors of LANES elements; n < LANES only at the end of a row, else a constant that the compiler sees ---- */

INLINE vf load_float(const float *p, i64 n) {
    vf v = {0};
    memcpy(&v, p, n * sizeof(float));
    return v;
}

INLINE void store_float(float *p, vf v, i64 n) { memcpy(p, &v, n * sizeof(float)); }

#if ELEMENT_BITS == 16
typedef uint16_t element;

INLINE vf load(const element *p, i64 n) {
    vh h = {0};
    memcpy(&h, p, n * sizeof(element));
#ifdef __AVX512F__
    vu wide = (vu)_mm512_cvtepu16_epi32((__m256i)h); /* which the compiler does in three steps */
#else
    vu wide = __builtin_convertvector(h, vu);
#endif
    return (vf)(wide << 16);
}

INLINE void store(element *p, vf v, i64 n) {
#ifdef __AVX512BF16__
    vh h = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v, is_nan = (vu)(v != v);
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vh h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), vh);
#endif
    memcpy(p, &h, n * sizeof(element));
}
#else
typedef float element;
#define load load_float
#define store store_float
#endif

INLINE float sum(vf v) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE vf choose(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }

/* 1 / (1 + exp(-x)). exp(-x) = 2^n 2^r with integer n and |r| <= 1/2; the polynomials are least-maximum fits of 2^r
 * with relative errors of 7e-5 (bfloat16 rounds by up to 2e-3) and 7e-8. */
INLINE vf sigmoid(vf x) {
    vf t = x * -1.44269504f;
#ifdef __AVX512F__
    vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf bound = (vf){0} + 125.f; /* keeps the exponent in its field; NaN passes */
    t = choose(t > bound, bound, choose(t < -bound, -bound, t));
    vf n = (t + 12582912.f) - 12582912.f; /* 1.5 * 2^23: rounds to an integer */
#endif
    vf r = t - n;
#if ELEMENT_BITS == 16
    vf p = ((0.0551716685f * r + 0.24261114f) * r + 0.693260968f) * r + 0.999928057f;
#else
    vf p = (0.00132764713f * r + 0.00967554189f) * r + 0.0555071309f;
    p = ((p * r + 0.240221202f) * r + 0.693146944f) * r + 1.00000012f;
#endif
#ifdef __AVX512F__
    vf d = 1.f + (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vf d = 1.f + (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
#if defined(__AVX512F__) && ELEMENT_BITS == 16
    return (vf)_mm512_rcp14_ps((__m512)d); /* relative error 6e-5, an eighth of a division's time */
#elif defined(__AVX512F__)
    return 1.f / d;
#else
    return choose(t >= bound, (vf){0}, 1.f / d);
#endif
}

/* Runs a block for every LANES columns of a row, with n the number of columns in it. */
#define FOR_COLUMNS(column, n, width, ...)                   \
    {                                                        \
        i64 column = 0;                                      \
        for (; column + LANES <= (width); column += LANES) { \
            const i64 n = LANES;                             \
            __VA_ARGS__                                      \
        }                                                    \
        if (column < (width)) {                              \
            const i64 n = (width) - column;                  \
            __VA_ARGS__                                      \
        }                                                    \
    }

/* ---- SwiGLU ---- */

/* act[R, F] = silu(gate) * up, rows lying so far apart. act may take the place of gate: that spares fetching the memory
 * it is written to. */
void swiglu(const element *gate, i64 gate_stride, const element *up, i64 up_stride, element *act, i64 act_stride, i64 R,
            i64 F) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(R * F)))
    for (i64 row = 0; row < R; row++) {
        const element *g = gate + row * gate_stride, *u = up + row * up_stride;
        FOR_COLUMNS(f, n, F, {
            __builtin_prefetch(g + gate_stride + f);
            __builtin_prefetch(u + up_stride + f);
            vf x = load(g + f, n);
            store(act + row * act_stride + f, x * sigmoid(x) * load(u + f, n), n);
        })
    }
}

/* From gate_up[R, 2F] and grad_act[R, F]: grad_gate_up[R, 2F], and act[R, F] again. */
void swiglu_backward(const element *gate_up, const element *grad_act, element *grad_gate_up, element *act, i64 R,
                     i64 F) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(R * F)))
    for (i64 row = 0; row < R; row++) {
        const element *gate = gate_up + row * 2 * F, *up = gate + F;
        element *grad_gate = grad_gate_up + row * 2 * F, *grad_up = grad_gate + F;
        FOR_COLUMNS(f, n, F, {
            vf x = load(gate + f, n), u = load(up + f, n), g = load(grad_act + row * F + f, n);
            vf s = sigmoid(x), silu = x * s;
            store(act + row * F + f, silu * u, n);
            store(grad_gate + f, g * u * (s + silu * (1.f - s)), n);
            store(grad_up + f, g * silu, n);
        })
    }
}

/* ---- transposing: the matrix product wants its left factor dense ---- */

#define TILE 32 /* whole cache lines of bfloat16, reading and writing */
#define BAND 64 /* rows handled before the next columns: neighbouring cache lines of the result */

#if ELEMENT_BITS == 16
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

/* out[columns, rows] = in[rows, columns] transposed, rows lying so far apart. */
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

/* ---- sums of rows by token ---- */

/* out[t] = scale[t] base[t] + sum_c coefficients[t, c] values[c] + sum_k weights[t, k] rows[positions[t, k]].
 * A null scale or null weights stand for ones, a null base for zeros; a scale or coefficient of 0 adds nothing. */
void combine(const element *rows, const i64 *positions, const float *weights, const element *base, const float *scale,
             const float *coefficients, const element *values, element *out, i64 T, i64 D, i64 K, i64 C) {
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        const element **term = malloc((K + C + 1) * sizeof *term);
        float *factor = malloc((K + C + 1) * sizeof *factor);
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t++) {
            int terms = 0;
            if (base && (!scale || scale[t] != 0)) {
                factor[terms] = scale ? scale[t] : 1.f;
                term[terms++] = base + t * D;
            }
            for (i64 c = 0; c < C; c++)
                if (coefficients[t * C + c] != 0) {
                    factor[terms] = coefficients[t * C + c];
                    term[terms++] = values + c * D;
                }
            for (i64 k = 0; k < K; k++)
                if (positions[t * K + k] >= 0) {
                    factor[terms] = weights ? weights[t * K + k] : 1.f;
                    term[terms++] = rows + positions[t * K + k] * D;
                }
            FOR_COLUMNS(d, n, D, {
                vf total = {0};
                for (i64 k = 0; k < (t + 1 < T ? K : 0); k++) __builtin_prefetch(rows + positions[t * K + K + k] * D + d);
                for (int i = 0; i < terms; i++) total += factor[i] * load(term[i] + d, n);
                store(out + t * D + d, total, n);
            })
        }
        free(term);
        free(factor);
    }
}

/* out = factor * grad and the product sum of grad with row. */
INLINE float scaled_and_dot(const element *grad, const element *row, float factor, element *out, i64 D) {
    vf dot = {0};
    FOR_COLUMNS(d, n, D, {
        vf g = load(grad + d, n);
        store(out + d, factor * g, n);
        dot += g * load(row + d, n);
    })
    return sum(dot);
}

/* The gradients of combine() with weights and, where base is not null, with scale. grad_values[C, D] is added to. */
void combine_backward(const element *grad, const element *rows, const i64 *positions, const float *weights,
                      const element *base, const float *scale, const float *coefficients, const element *values,
                      element *grad_rows, float *grad_weights, element *grad_base, float *grad_scale,
                      float *grad_coefficients, float *grad_values, i64 T, i64 D, i64 K, i64 C) {
    int threads = omp_get_max_threads();
    float *partial = calloc((size_t)threads * C * D + 1, sizeof *partial);
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t++) {
        const element *g = grad + t * D;
        for (i64 k = 0; k < K; k++) {
            i64 slot = t * K + k, at = positions[slot] * D;
            grad_weights[slot] = at < 0 ? 0.f : scaled_and_dot(g, rows + at, weights[slot], grad_rows + at, D);
        }
        if (base && scale[t] != 0) {
            grad_scale[t] = scaled_and_dot(g, base + t * D, scale[t], grad_base + t * D, D);
        } else if (base) {
            grad_scale[t] = 0;
            memset(grad_base + t * D, 0, D * sizeof(element));
        }
        for (i64 c = 0; c < C; c++) {
            float coefficient = coefficients[t * C + c];
            vf dot = {0};
            float *mine = partial + ((i64)omp_get_thread_num() * C + c) * D;
            if (coefficient != 0) FOR_COLUMNS(d, n, D, {
                vf v = load(g + d, n);
                dot += v * load(values + c * D + d, n);
                store_float(mine + d, load_float(mine + d, n) + coefficient * v, n);
            })
            grad_coefficients[t * C + c] = sum(dot);
        }
    }
    for (int thread = 0; thread < threads; thread++)
        for (i64 i = 0; i < C * D; i++) grad_values[i] += partial[thread * C * D + i];
    free(partial);
}

/* ---- narrow projections in float: the router's ---- */

/* Tokens (and outputs) of one step: their accumulators must fit the registers. Each sum runs over d in the same order
 * whatever the step, so that a token's logits do not depend on the other tokens. */
#define TOKENS 4
#define OUTPUTS 6

INLINE void project_step(const element *x, const float *weight, float *out, i64 D, i64 P, int tokens, int outputs) {
    vf total[TOKENS][OUTPUTS] = {0};
    FOR_COLUMNS(d, n, D, {
        vf row[TOKENS];
        for (int i = 0; i < tokens; i++) row[i] = load(x + i * D + d, n);
        for (int j = 0; j < outputs; j++) {
            vf w = load_float(weight + j * D + d, n);
            for (int i = 0; i < tokens; i++) total[i][j] += row[i] * w;
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

/* out[T, P] = x[T, D] weight[P, D]^T. */
void project(const element *x, const float *weight, float *out, i64 T, i64 D, i64 P) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t += TOKENS) {
        if (t + TOKENS <= T)
            project_tokens(x + t * D, weight, out + t * P, D, P, TOKENS);
        else
            for (i64 i = t; i < T; i++) project_tokens(x + i * D, weight, out + i * P, D, P, 1);
    }
}

INLINE void project_backward_step(const element *x, const float *weight, const float *grad, const element *base,
                                  element *grad_x, float *grad_weight, i64 D, i64 P, int tokens) {
    FOR_COLUMNS(d, n, D, {
        vf row[2 * TOKENS];
        vf total[2 * TOKENS] = {0};
        for (int i = 0; i < tokens; i++) {
            row[i] = load(x + i * D + d, n);
            if (base) total[i] = load(base + i * D + d, n);
        }
        for (i64 p = 0; p < P; p++) {
            vf w = load_float(weight + p * D + d, n), grad_w = load_float(grad_weight + p * D + d, n);
            for (int i = 0; i < tokens; i++) {
                total[i] += grad[i * P + p] * w;
                grad_w += grad[i * P + p] * row[i];
            }
            store_float(grad_weight + p * D + d, grad_w, n);
        }
        for (int i = 0; i < tokens; i++) store(grad_x + i * D + d, total[i], n);
    })
}

/* From grad[T, P] and base[T, D] (or null): grad_x[T, D] = base + grad weight, and grad_weight[P, D] that is added to. */
void project_backward(const element *x, const float *weight, const float *grad, const element *base, element *grad_x,
                      float *grad_weight, i64 T, i64 D, i64 P) {
    int threads = omp_get_max_threads();
    float *partial = calloc((size_t)threads * P * D, sizeof *partial);
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t += 2 * TOKENS) {
        float *mine = partial + (i64)omp_get_thread_num() * P * D;
        for (i64 i = t; i < T && i < t + 2 * TOKENS; i++) {
            const element *from = base ? base + i * D : 0;
            if (i == t && t + 2 * TOKENS <= T) {
                project_backward_step(x + i * D, weight, grad + i * P, from, grad_x + i * D, mine, D, P, 2 * TOKENS);
                break;
            }
            project_backward_step(x + i * D, weight, grad + i * P, from, grad_x + i * D, mine, D, P, 1);
        }
    }
    for (int thread = 0; thread < threads; thread++)
        for (i64 i = 0; i < P * D; i++) grad_weight[i] += partial[thread * P * D + i];
    free(partial);
}

/* ---- routing ---- */

/* ids[K, T]: for each token the K highest of scores[E, T], best first; among equals the lower number. A score of -inf or
 * NaN is chosen after all others. */
void top_experts(const float *scores, i64 *ids, i64 E, i64 T, i64 K) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * E)))
    for (i64 t = 0; t < T; t += LANES) {
        i64 n = T - t < LANES ? T - t : LANES;
        vi taken[MAX_TOP_K];
        for (i64 k = 0; k < K; k++) {
            vf best = (vf){0} - __builtin_inff();
            vi which = (vi){0} - 1;
            for (i64 e = 0; e < E; e++) {
                vf score = load_float(scores + e * T + t, n);
                vi better = (score > best) | (which < 0);
                for (i64 j = 0; j < k; j++) better &= taken[j] != (int32_t)e;
                best = choose(better, score, best);
                which = (vi)choose(better, (vf)((vi){0} + (int32_t)e), (vf)which);
            }
            taken[k] = which;
            for (i64 i = 0; i < n; i++) ids[k * T + t + i] = which[i];
        }
    }
}

/* Stable counting sort of S slots by expert: order[0 .. N) are the slots of experts 0 .. E-1, counts[E] how many each
 * has, positions[S] where a slot went, or -1 for a slot of an expert beyond, which is left out. */
void sort_slots(const i64 *experts, i64 *order, i64 *counts, i64 *positions, i64 S, i64 E) {
    memset(counts, 0, E * sizeof *counts);
    for (i64 s = 0; s < S; s++)
        if (experts[s] < E) counts[experts[s]]++;
    i64 *next = malloc((E + 1) * sizeof *next), start = 0;
    for (i64 e = 0; e < E; e++) {
        next[e] = start;
        start += counts[e];
    }
    for (i64 s = 0; s < S; s++) {
        positions[s] = experts[s] < E ? next[experts[s]]++ : -1;
        if (positions[s] >= 0) order[positions[s]] = s;
    }
    free(next);
}
