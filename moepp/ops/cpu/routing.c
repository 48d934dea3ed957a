/* Routing: gates, the choice of experts, the order of their assignments. All in float. See vector.h for conventions.
 *
 * Letters: T tokens, E experts (FFN, constant, copy, zero, in this order), K experts of a token, C constant experts, A assignments.
 */
#include <math.h>

#include "vector.h"

#define MAX_TOP_K 8 /* the same number as in moepp/ops/gates.py */

/* Gate normalisations, with the numbers of moepp/ops/gates.py. */
enum normalization { NONE, ZERO_MASKED, TOPK_SOFTMAX };

/* Fill taken[K] with the K experts of highest scores[E][LANES] for each of LANES tokens, best first; among
 * equals the lower number. A
 * score of -inf or NaN is chosen after all others. */
INLINE void choose_experts(const vf *scores, vi *taken, i64 E, i64 K) {
    for (i64 k = 0; k < K; k++) {
        vf best = (vf){0} - __builtin_inff();
        vi which = (vi){0} - 1;
        for (i64 e = 0; e < E; e++) {
            vi better = (scores[e] > best) | (which < 0);
            for (i64 j = 0; j < k; j++) better &= taken[j] != (int32_t)e;
            best = choose(better, scores[e], best);
            which = (vi)choose(better, (vf)((vi){0} + (int32_t)e), (vf)which);
        }
        taken[k] = which;
    }
}

INLINE vf exponential(vf x) { return exp2_of(x * 1.44269504f, EXACT); }

/* Compute exps[E] = exp(logits - highest) and return their sum. */
INLINE vf exponentials(const vf *logits, vf *exps, i64 E) {
    vf highest = logits[0], total = {0};
    for (i64 e = 1; e < E; e++) highest = choose(logits[e] > highest, logits[e], highest);
    for (i64 e = 0; e < E; e++) total += exps[e] = exponential(logits[e] - highest);
    return total;
}

/* Compute the weights[K] of one token from all its exponentials or probabilities; assignments to experts from first_zero on get 0 where they
 * are masked. */
INLINE void gate_weights(const float *scores, const i64 *ids, float *weights, i64 K, i64 first_zero, i64 normalization) {
    float total = 0;
    for (i64 k = 0; k < K; k++) {
        weights[k] = normalization == ZERO_MASKED && ids[k] >= first_zero ? 0 : scores[ids[k]];
        total += weights[k];
    }
    if (normalization == NONE) return;
    for (i64 k = 0; k < K; k++) weights[k] /= total > 0 || total != total ? total : 1.f;
}

/* Compute probs[T, E], the chosen ids[T, K] and their weights[T, K] from logits[T, E]. */
void gates(const float *logits, float *probs, i64 *ids, float *weights, i64 T, i64 E, i64 K, i64 first_zero,
           i64 normalization) {
    OMP(omp parallel if(WORTH_THREADS(T * E)))
    {
        vf *z = aligned_alloc(64, 2 * E * sizeof *z), *p = z + E;
        OMP(omp for schedule(static))
        for (i64 t = 0; t < T; t += LANES) {
            i64 n = T - t < LANES ? T - t : LANES;
            for (i64 e = 0; e < E; e++)
                for (i64 i = 0; i < LANES; i++) z[e][i] = i < n ? logits[(t + i) * E + e] : 0;
            vf total = exponentials(z, p, E);
            for (i64 e = 0; e < E; e++) p[e] /= total;
            vi taken[MAX_TOP_K];
            choose_experts(normalization == TOPK_SOFTMAX ? z : p, taken, E, K);
            for (i64 i = 0; i < n; i++) {
                float *mine = probs + (t + i) * E;
                for (i64 e = 0; e < E; e++) mine[e] = p[e][i];
                for (i64 k = 0; k < K; k++) ids[(t + i) * K + k] = taken[k][i];
                if (normalization != TOPK_SOFTMAX)
                    gate_weights(mine, ids + (t + i) * K, weights + (t + i) * K, K, first_zero, normalization);
            }
            if (normalization != TOPK_SOFTMAX) continue;
            vf chosen[MAX_TOP_K] = {0}, exps[MAX_TOP_K];
            for (i64 k = 0; k < K; k++)
                for (i64 i = 0; i < n; i++) chosen[k][i] = logits[(t + i) * E + taken[k][i]];
            total = exponentials(chosen, exps, K);
            for (i64 k = 0; k < K; k++)
                for (i64 i = 0; i < n; i++) weights[(t + i) * K + k] = exps[k][i] / total[i];
        }
        free(z);
    }
}

/* Compute grad_logits[T, E] of gates() from grad_probs[T, E] (or null) and grad_weights[T, K]. */
void gates_backward(const float *probs, const i64 *ids, const float *weights, const float *grad_probs,
                    const float *grad_weights, float *grad_logits, i64 T, i64 E, i64 K, i64 first_zero, i64 normalization) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(T * E)))
    for (i64 t = 0; t < T; t++) {
        const float *p = probs + t * E, *w = weights + t * K, *grad_w = grad_weights + t * K;
        const i64 *chosen = ids + t * K;
        float *grad = grad_logits + t * E, inner = 0, total = 0, dot = 0;
        for (i64 e = 0; e < E; e++) grad[e] = grad_probs ? grad_probs[t * E + e] : 0;
        for (i64 k = 0; k < K; k++) {
            int masked = normalization == ZERO_MASKED && chosen[k] >= first_zero;
            inner += grad_w[k] * w[k];
            total += masked ? 0 : p[chosen[k]];
        }
        for (i64 k = 0; k < K && normalization != TOPK_SOFTMAX; k++) {
            if (normalization == NONE)
                grad[chosen[k]] += grad_w[k];
            else if (chosen[k] < first_zero)
                grad[chosen[k]] += total > 0 ? (grad_w[k] - inner) / total : grad_w[k];
        }
        for (i64 e = 0; e < E; e++) dot += p[e] * grad[e];
        for (i64 e = 0; e < E; e++) grad[e] = p[e] * (grad[e] - dot);
        for (i64 k = 0; k < K && normalization == TOPK_SOFTMAX; k++) grad[chosen[k]] += w[k] * (grad_w[k] - inner);
    }
}

static int is_below(i64 id, i64 E) { return (uint64_t)id < (uint64_t)E; } /* and not negative */

/* Count how often each of E experts occurs among S ids. */
void count_experts(const i64 *ids, i64 *counts, i64 S, i64 E) {
    memset(counts, 0, E * sizeof *counts);
    for (i64 s = 0; s < S; s++)
        if (is_below(ids[s], E)) counts[ids[s]]++;
}

/* Sort A assignments by expert, stably: order[0 .. N) are the assignments of experts 0 .. E-1, counts[E] how many each
 * has, positions[S] where an assignment went, or -1 if its expert is none of them and it is left out. */
void sort_assignments(const i64 *experts, i64 *order, i64 *counts, i64 *positions, i64 S, i64 E) {
    count_experts(experts, counts, S, E);
    i64 *next = malloc((E + 1) * sizeof *next), start = 0;
    for (i64 e = 0; e < E; e++) {
        next[e] = start;
        start += counts[e];
    }
    for (i64 s = 0; s < S; s++) {
        positions[s] = is_below(experts[s], E) ? next[experts[s]]++ : -1;
        if (positions[s] >= 0) order[positions[s]] = s;
    }
    free(next);
}
