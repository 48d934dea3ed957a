/* Vectors of LANES floats, and loading and storing them as the element type of the activations.
 *
 * Compiled once per element type: -DELEMENT_BITS=16 (bfloat16) or 32 (float). All arithmetic is in float and a result is
 * rounded to the element type once. Rows are divided statically over OpenMP's threads: results depend on nothing but their number.
 *
 * Matrices are row-major and dense where no stride is named.
 */
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_num_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
#endif
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif

/* Floats of one hardware vector: longer ones the compiler splits, and then compares and converts one value at a time. */
#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))
/* Below some ten thousand elements a parallel region costs more than it saves. */
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
#if defined(__AVX512F__) /* the compiler needs three steps for this */
    vu wide = (vu)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
    vu wide = (vu)_mm256_cvtepu16_epi32((__m128i)h);
#else
    vu wide = __builtin_convertvector(h, vu);
#endif
    return (vf)(wide << 16);
}

INLINE void store(element *p, vf v, i64 n) {
#ifdef __AVX512BF16__
    vh h = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu bits = (vu)v, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX2__) && LANES == 8 /* the compiler needs more steps for this */
    __m256i is_nan = (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
    __m256i wide = _mm256_blendv_epi8((__m256i)rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    vh h = (vh)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
#else
    vu is_nan = (vu)(v != v);
    vh h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0 & is_nan), vh);
#endif
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
#if LANES == 16
    v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    v8 a = v;
#endif
    v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[2]) + (b[1] + b[3]);
}

/* Return a b + c, rounded once if the processor can; left to itself a compiler does so in some places only. */
INLINE vf multiply_add(vf a, vf b, vf c) {
#ifdef __AVX512F__
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE vf choose(vi where, vf yes, vf no) { return (vf)(((vi)yes & where) | ((vi)no & ~where)); }

/* The polynomial for 2^r, |r| <= 1/2: least-maximum fits with relative errors of 7e-5 (bfloat16 rounds by up to 2e-3)
 * and 7e-8. */
enum precision { ROUGH, EXACT };
#define ELEMENT_PRECISION (ELEMENT_BITS == 16 ? ROUGH : EXACT)
#define LARGEST_EXPONENT 125.f /* of vectors without scaling instruction: keeps the exponent in its field */

INLINE vf exp2_of(vf t, enum precision precision) {
#ifdef __AVX512F__
    vf n = (vf)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf bound = (vf){0} + LARGEST_EXPONENT; /* NaN passes */
    t = choose(t > bound, bound, choose(t < -bound, -bound, t));
    vf n = (t + 12582912.f) - 12582912.f; /* 1.5 * 2^23: rounds to an integer */
#endif
    vf r = t - n, p;
    if (precision == ROUGH) {
        p = ((0.0551716685f * r + 0.24261114f) * r + 0.693260968f) * r + 0.999928057f;
    } else {
        p = (0.00132764713f * r + 0.00967554189f) * r + 0.0555071309f;
        p = ((p * r + 0.240221202f) * r + 0.693146944f) * r + 1.00000012f;
    }
#ifdef __AVX512F__
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
#endif
}

/* 1 / (1 + exp(-x)) */
INLINE vf sigmoid(vf x) {
    vf t = x * -1.44269504f, d = 1.f + exp2_of(t, ELEMENT_PRECISION);
#if defined(__AVX512F__) && ELEMENT_BITS == 16
    return (vf)_mm512_rcp14_ps((__m512)d); /* relative error 6e-5, an eighth of a division's time */
#elif defined(__AVX512F__)
    return 1.f / d;
#else
    return choose(t >= LARGEST_EXPONENT, (vf){0}, 1.f / d);
#endif
}

/* Run a block for every LANES columns of a row; n is the number of columns in it. */
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
