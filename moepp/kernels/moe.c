/* What stands between the MoE layer's matrix products, each in one pass over memory. See vector.h for conventions.
 *
 * Letters: T tokens, D width, K slots of a token, R rows of FFN slots, F expert width, C constant experts, E experts,
 * S slots. A position is the row of a slot, or -1 where it has none.
 */
#include "vector.h"

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
