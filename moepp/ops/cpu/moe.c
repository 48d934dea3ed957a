/* The operations between the MoE layer's matrix products, each in one pass over memory. See vector.h for conventions.
 *
 * Letters: T tokens, D width, K experts of a token, R rows (routed tokens), F expert width, C constant experts. A position
 * is the row of an assignment, or -1 where it has none.
 */
#include "vector.h"

/* ---- SwiGLU ---- */

/* Compute act[R, F] = silu(gate) * up; strides are those of rows. act may be gate's memory: then no other memory has to be
 * fetched to be written. */
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

/* Compute grad_gate_up[R, 2F] from gate_up[R, 2F] and grad_act[R, F], and act[R, F] again. */
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

/* Compute out[t] = start[t] + sum_k weights[t, k] rows[positions[t, k]]. Null weights are ones, a null start is zeros.
 * start and out may be the same memory. */
void combine(const element *rows, const i64 *positions, const float *weights, const element *start, element *out, i64 T,
             i64 D, i64 K) {
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        const element **term = malloc((K + 1) * sizeof *term);
        float *factor = malloc((K + 1) * sizeof *factor);
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t++) {
            int terms = 0;
            if (start) {
                factor[terms] = 1.f;
                term[terms++] = start + t * D;
            }
            for (i64 k = 0; k < K; k++)
                if (positions[t * K + k] >= 0) {
                    factor[terms] = weights ? weights[t * K + k] : 1.f;
                    term[terms++] = rows + positions[t * K + k] * D;
                }
            if (terms == 1 && start == out) continue;
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

/* Compute out = factor * grad and return the dot product of grad and row. */
INLINE float scaled_and_dot(const element *grad, const element *row, float factor, element *out, i64 D) {
    vf dot = {0};
    FOR_COLUMNS(d, n, D, {
        vf g = load(grad + d, n);
        store(out + d, factor * g, n);
        dot += g * load(row + d, n);
    })
    return sum(dot);
}

/* Compute the gradients of combine() with weights; start's is grad itself. */
void combine_backward(const element *grad, const element *rows, const i64 *positions, const float *weights,
                      element *grad_rows, float *grad_weights, i64 T, i64 D, i64 K) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * D)))
    for (i64 t = 0; t < T; t++)
        for (i64 k = 0; k < K; k++) {
            i64 a = t * K + k, at = positions[a] * D;
            grad_weights[a] = at < 0 ? 0.f : scaled_and_dot(grad + t * D, rows + at, weights[a], grad_rows + at, D);
        }
}

/* ---- constant and copy experts ---- */

INLINE float dot_product(const element *a, const element *b, i64 D) {
    vf total = {0};
    FOR_COLUMNS(d, n, D, { total += load(a + d, n) * load(b + d, n); })
    return sum(total);
}

/* Compute out[t] = (sum_copy w + sum_c w alpha) x[t] + sum_c w (1 - alpha) values[c] over the chosen experts of [first, stop), of
 * which the first C are constant: alpha = 1 / (1 + exp(-difference[c] x[t])). Zeros where none is chosen. alphas[T, K] are
 * stored for backward if not null; a weight of 0 adds nothing. */
void affine_experts(const element *x, const i64 *ids, const float *weights, const float *difference, const element *values,
                    element *out, float *alphas, i64 T, i64 D, i64 K, i64 C, i64 first, i64 stop) {
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        const element **term = malloc((K + 1) * sizeof *term);
        float *factor = malloc((K + 1) * sizeof *factor);
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t++) {
            const element *mine = x + t * D;
            int terms = 0;
            float scale = 0;
            for (i64 s = t * K; s < t * K + K; s++) {
                i64 c = ids[s] - first;
                alphas[s] = 0;
                if (c < 0 || ids[s] >= stop || weights[s] == 0) continue;
                float alpha = 1;
                if (c < C) {
                    vf logit = {0};
                    FOR_COLUMNS(d, n, D, { logit += load(mine + d, n) * load_float(difference + c * D + d, n); })
                    alpha = alphas[s] = 1.f / (1.f + expf(-sum(logit)));
                    factor[terms] = weights[s] * (1.f - alpha);
                    term[terms++] = values + c * D;
                }
                scale += weights[s] * alpha;
            }
            if (scale == 0 && terms == 0) {
                memset(out + t * D, 0, D * sizeof *out);
                continue;
            }
            FOR_COLUMNS(d, n, D, {
                vf total = scale * load(mine + d, n);
                for (int i = 0; i < terms; i++) total += factor[i] * load(term[i] + d, n);
                store(out + t * D + d, total, n);
            })
        }
        free(term);
        free(factor);
    }
}

/* Compute the gradients of affine_experts(); x's is added to sum_x (null: zeros), which may be grad_x itself.
 * Add to grad_difference[C, D] and grad_values[C, D]. */
void affine_experts_backward(const element *grad, const element *x, const i64 *ids, const float *weights,
                             const float *difference, const element *values, const float *alphas, const element *sum_x,
                             element *grad_x,
                             float *grad_weights, float *grad_difference, float *grad_values, i64 T, i64 D, i64 K, i64 C,
                             i64 first, i64 stop) {
    int threads = omp_get_max_threads();
    float *partial = calloc((size_t)threads * 2 * C * D + 1, sizeof *partial);
    OMP(omp parallel if(WORTH_THREADS(T * D)))
    {
        float *my_difference = partial + (i64)omp_get_thread_num() * 2 * C * D, *my_values = my_difference + C * D;
        float *slope = malloc(K * sizeof *slope); /* of the chosen constant experts, and the starts of their rows */
        i64 *at = malloc(K * sizeof *at);
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t++) {
            const element *g = grad + t * D, *mine = x + t * D;
            float scale = 0, along_x = 0;
            int chosen = 0, terms = 0;
            for (i64 s = t * K; s < t * K + K; s++) {
                i64 c = ids[s] - first;
                grad_weights[s] = 0;
                if (c < 0 || ids[s] >= stop || weights[s] == 0) continue;
                if (!chosen++) along_x = dot_product(g, mine, D);
                float alpha = c < C ? alphas[s] : 1.f, along_value = 0;
                if (c < C) {
                    vf dot = {0};
                    float coefficient = weights[s] * (1.f - alpha);
                    FOR_COLUMNS(d, n, D, {
                        vf v = load(g + d, n);
                        dot += v * load(values + c * D + d, n);
                        store_float(my_values + c * D + d, load_float(my_values + c * D + d, n) + coefficient * v, n);
                    })
                    along_value = sum(dot);
                    slope[terms] = weights[s] * (along_x - along_value) * alpha * (1.f - alpha);
                    at[terms++] = c * D;
                }
                grad_weights[s] = alpha * along_x + (1.f - alpha) * along_value;
                scale += weights[s] * alpha;
            }
            if (!chosen) {
                if (!sum_x) memset(grad_x + t * D, 0, D * sizeof *grad_x);
                if (sum_x && sum_x != grad_x) memcpy(grad_x + t * D, sum_x + t * D, D * sizeof *grad_x);
                continue;
            }
            FOR_COLUMNS(d, n, D, {
                vf total = scale * load(g + d, n);
                if (sum_x) total += load(sum_x + t * D + d, n);
                vf own = load(mine + d, n);
                for (int i = 0; i < terms; i++) {
                    float *target = my_difference + at[i] + d;
                    total += slope[i] * load_float(difference + at[i] + d, n);
                    store_float(target, load_float(target, n) + slope[i] * own, n);
                }
                store(grad_x + t * D + d, total, n);
            })
        }
        free(slope);
        free(at);
    }
    for (int thread = 0; thread < threads; thread++)
        for (i64 i = 0; i < C * D; i++) {
            grad_difference[i] += partial[2 * thread * C * D + i];
            grad_values[i] += partial[(2 * thread + 1) * C * D + i];
        }
    free(partial);
}
