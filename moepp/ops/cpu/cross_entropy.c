/* Softmax and cross-entropy of a chunk of logits. See vector.h for conventions.
 *
 * Letters: C tokens of the chunk, V vocabulary.
 */
#include <math.h>

#include "vector.h"

INLINE float largest(const element *row, i64 V) {
    vf best = (vf){0} - __builtin_inff();
    FOR_COLUMNS(v, n, V, {
        vf x = load(row + v, n);
        if (n < LANES) /* the lanes beyond the end hold zeros */
            for (i64 i = n; i < LANES; i++) x[i] = -__builtin_inff();
        best = choose(x > best, x, best);
    })
    float result = best[0];
    for (int i = 1; i < LANES; i++) result = best[i] > result ? best[i] : result;
    return result;
}

/* Return sum(exp(row - top)), compensated (Kahan 1965): in a plain float sum the many small terms after a large one are lost. */
INLINE double sum_of_exponentials(const element *row, float top, i64 V) {
    vf total = {0}, lost = {0};
    FOR_COLUMNS(v, n, V, {
        vf e = exp2_of((load(row + v, n) - top) * 1.44269504f, EXACT);
        if (n < LANES)
            for (i64 i = n; i < LANES; i++) e[i] = 0;
        vf term = e - lost, next = total + term;
        lost = (next - total) - term;
        total = next;
    })
    double result = 0;
    for (int i = 0; i < LANES; i++) result += (double)total[i] - lost[i];
    return result;
}

/* Compute losses[C] = -log softmax(logits)[label]; if with_gradient, replace logits[C, V] by the loss's gradient, softmax -
 * one_hot(label). A token with the label `ignore` has a loss and a gradient of zero. */
void cross_entropy(element *logits, const i64 *labels, float *losses, i64 ignore, i64 with_gradient, i64 C, i64 V) {
    OMP(omp parallel for schedule(static) if(WORTH_THREADS(C * V)))
    for (i64 c = 0; c < C; c++) {
        element *row = logits + c * V;
        i64 label = labels[c];
        losses[c] = 0;
        if (label == ignore) {
            if (with_gradient) memset(row, 0, V * sizeof *row);
            continue;
        }
        float top = largest(row, V);
        double denominator = sum_of_exponentials(row, top, V);
        float chosen = load(row + label, 1)[0];
        losses[c] = (float)(log(denominator) + ((double)top - chosen));
        if (!with_gradient) continue;
        float inverse = (float)(1. / denominator), probability = expf(chosen - top) * inverse;
        FOR_COLUMNS(v, n, V, { store(row + v, exp2_of((load(row + v, n) - top) * 1.44269504f, EXACT) * inverse, n); })
        store(row + label, (vf){probability - 1.f}, 1);
    }
}
