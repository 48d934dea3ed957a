/* The FFN experts on processors with AVX2 and FMA, in float whatever the element type: see products.h.
 *
 * All products are arranged so that weights are A, read in rows or in columns, and rows of tokens are B. C is then
 * transposed, [hidden, rows of tokens], as the next product reads its panels; the last one's is transposed back
 * while it is in the cache.
 *
 * Letters as in moe.c: R rows, D width, F expert width. Panels have 16 columns (rows of tokens).
 */
#include "products.h"

#if HAS_PRODUCTS
/* ---- work on a finished block of C, of one panel ---- */

/* Compute the activation from gate[m, 16] and up[m, 16]; store both if wanted. */
static void finish_swiglu(const product *p, i64 m, i64 rows, i64 up_offset, i64 panel, const float *c) {
    float *act = p->act ? p->act + (panel * p->M + m) * PANEL : 0;
    element *hidden = p->hidden ? p->hidden + (panel * 2 * p->M + m) * PANEL : 0;
    for (i64 i = 0; i < rows * PANEL; i += LANES) {
        vf gate = load_float(c + i, LANES), up = load_float(c + up_offset * PANEL + i, LANES);
        if (act) store_float(act + i, gate * sigmoid(gate) * up, LANES);
        if (!hidden) continue;
        store(hidden + i, gate, LANES);
        store(hidden + p->M * PANEL + i, up, LANES);
    }
}

/* Transpose 16 rows of C. */
INLINE void transpose_block(const float *c, i64 rows, float (*columns)[PANEL]) {
    for (i64 i = 0; i < PANEL; i += 8)
        for (int j = 0; j < PANEL; j += 8) {
            __m256 r[8];
            for (int q = 0; q < 8; q++) r[q] = i + q < rows ? _mm256_loadu_ps(c + (i + q) * PANEL + j) : _mm256_setzero_ps();
            transpose_8(r);
            for (int q = 0; q < 8; q++) _mm256_storeu_ps(&columns[j + q][i], r[q]);
        }
}

/* Write the activation's rows m to m + n of 16 tokens to panels whose columns are these rows. */
INLINE void put_act(const product *p, i64 m, i64 n, i64 panel, const float (*act)[PANEL]) {
    float block[PANEL][PANEL] __attribute__((aligned(64)));
    transpose_block(act[0], n, block);
    i64 tokens = smaller_of(PANEL, p->N - panel * PANEL), column = m % PANEL, here = smaller_of(n, PANEL - column);
    for (i64 j = 0; j < tokens; j++) {
        float *to = p->act + (m / PANEL * p->N + panel * PANEL + j) * PANEL, *next = to + p->N * PANEL;
        if (n == PANEL && column % 8 == 0) { /* the usual case */
            memcpy(to + column, block[j], 8 * sizeof(float));
            memcpy(column ? next : to + 8, block[j] + 8, 8 * sizeof(float));
        } else {
            memcpy(to + column, block[j], here * sizeof(float));
            memcpy(next, block[j] + here, (n - here) * sizeof(float));
        }
    }
}

/* Compute the gradients of gate and up from the activation's gradient[m, 16], and the activation again. */
static void finish_swiglu_backward(const product *p, i64 m, i64 rows, i64 part_offset, i64 panel, const float *c) {
    const element *gate = p->hidden + (panel * 2 * p->M + m) * PANEL, *up = gate + p->M * PANEL;
    float *grad_gate = p->grad + (panel * 2 * p->M + m) * PANEL, *grad_up = grad_gate + p->M * PANEL;
    for (i64 start = 0; start < rows; start += PANEL) {
        float act[PANEL][PANEL] __attribute__((aligned(64)));
        i64 n = smaller_of(PANEL, rows - start);
        for (i64 i = start * PANEL; i < (start + n) * PANEL; i += LANES) {
            vf x = load(gate + i, LANES), u = load(up + i, LANES), g = load_float(c + i, LANES);
            vf s = sigmoid(x), silu = x * s;
            store_float(act[0] + i - start * PANEL, silu * u, LANES);
            store_float(grad_gate + i, g * u * (s + silu * (1.f - s)), LANES);
            store_float(grad_up + i, g * silu, LANES);
        }
        put_act(p, m + start, n, panel, act);
    }
}

/* Write n consecutive values to p->out, or add them to p->sum. */
INLINE void put(const product *p, i64 at, const float *values, i64 n) {
    if (p->sum)
        FOR_COLUMNS(i, k, n, { store_float(p->sum + at + i, load_float(p->sum + at + i, k) + load_float(values + i, k), k); })
    else
        FOR_COLUMNS(i, k, n, { store(p->out + at + i, load_float(values + i, k), k); })
}

/* Write C to rows of the result. */
static void finish_rows(const product *p, i64 m, i64 rows, i64 part_offset, i64 panel, const float *c) {
    i64 n = smaller_of(PANEL, p->N - panel * PANEL);
    for (i64 i = 0; i < rows; i++) put(p, (m + i) * p->out_stride + panel * PANEL, c + i * PANEL, n);
}

static void prepare_rows(const product *p, i64 m, i64 panel) {
    for (i64 i = m; i < m + STRIP && i < p->M; i++) __builtin_prefetch(p->out + i * p->out_stride + panel * PANEL, 1, 2);
}

/* Write C to columns of the result. */
static void finish_columns(const product *p, i64 m, i64 rows, i64 part_offset, i64 panel, const float *c) {
    i64 columns = smaller_of(PANEL, p->N - panel * PANEL);
    for (i64 i = 0; i < rows; i += PANEL) {
        float block[PANEL][PANEL] __attribute__((aligned(64)));
        i64 n = smaller_of(PANEL, rows - i);
        transpose_block(c + i * PANEL, n, block);
        for (i64 j = 0; j < columns; j++) put(p, (panel * PANEL + j) * p->out_stride + m + i, block[j], n);
    }
}

/* Prefetch columns of the result; one cache line of it holds several strips. */
static void prepare_columns(const product *p, i64 m, i64 panel) {
    if (m % (64 / (i64)sizeof(element)) >= STRIP) return;
    for (i64 j = panel * PANEL; j < (panel + 1) * PANEL && j < p->N; j++)
        __builtin_prefetch(p->out + j * p->out_stride + m, 1, 2);
}

/* ---- forward ---- */

/* Compute out[R, D] = x[R, D] through one expert's gate_up[2F, D] and down[D, F]. Store gate and up in `hidden` for
 * avx2_expert_backward(): 2F elements for each of R rows, rounded up to 16. Either may be null: not wanted. `scratch`: (D + F) floats for each of
 * `most` rows, a multiple of 16, that are computed at a time. */
void avx2_expert_forward(const element *x, const element *gate_up, const element *down, element *hidden, element *out,
                           float *scratch, i64 R, i64 D, i64 F, i64 most) {
    float *x_panels = scratch, *act = scratch + most * D;
    OMP(omp parallel if(WORTH_THREADS(R * F)))
    {
        workspace w = new_workspace(most < R ? most : R);
        for (i64 start = 0; start < R; start += most) {
            i64 rows = smaller_of(most, R - start);
            panels_of_rows(x + start * D, rows, D, x_panels);
            product hide = {.M = F, .N = rows, .K = D, .parts = 2, .part_rows = F, .order = BY_ROW, .pack = pack_rows,
                            .finish = finish_swiglu, .a = gate_up, .a_stride = D, .panels = x_panels,
                            .act = out ? act : 0, .hidden = hidden ? hidden + start * 2 * F : 0};
            multiply(&hide, w);
            if (!out) continue;
            product show = {.M = D, .N = rows, .K = F, .parts = 1, .order = BY_ROW, .pack = pack_rows,
                            .finish = finish_columns, .prepare = prepare_columns, .a = down, .a_stride = F, .panels = act, .out = out + start * D,
                            .out_stride = D};
            multiply(&show, w);
        }
        free_workspace(w);
    }
}

/* ---- backward ---- */

/* Compute, from grad_out[R, D], x[R, D] and what avx2_expert_forward() stored in `hidden`: grad_x[R, D] and the weights'
 * gradients, which are added to sum_gate_up and sum_down where these are not null. `scratch`: (D + 2F + F) floats for each of R rows,
 * with R, D and the second F rounded up to 16. */
void avx2_expert_backward(const element *grad_out, const element *x, element *hidden, const element *gate_up,
                            const element *down, element *grad_x, element *grad_gate_up, element *grad_down,
                            float *sum_gate_up, float *sum_down, float *scratch, i64 R, i64 D, i64 F) {
    i64 padded = panels_of(R) * PANEL;
    float *panels = scratch, *grad = panels + padded * panels_of(D) * PANEL, *act = grad + padded * 2 * F;
    OMP(omp parallel if(WORTH_THREADS(R * F)))
    {
        workspace w = new_workspace(larger_of(R, larger_of(D, F)));
        panels_of_rows(grad_out, R, D, panels);
        product to_hidden = {.M = F, .N = R, .K = D, .parts = 1, .order = BY_K, .pack = pack_columns,
                             .finish = finish_swiglu_backward, .a = down, .a_stride = F, .panels = panels, .act = act,
                             .grad = grad, .hidden = hidden};
        multiply(&to_hidden, w);
        product to_x = {.M = D, .N = R, .K = 2 * F, .parts = 1, .order = BY_K, .pack = pack_columns,
                        .finish = finish_columns, .prepare = prepare_columns, .a = gate_up, .a_stride = D, .panels = grad, .out = grad_x,
                        .out_stride = D};
        multiply(&to_x, w);
        panels_of_columns(x, R, D, panels);
        product to_gate_up = {.M = 2 * F, .N = D, .K = R, .parts = 1, .order = BY_ROW, .pack = pack_panels,
                              .finish = finish_rows, .prepare = prepare_rows, .a = grad, .a_stride = 2 * F, .panels = panels, .out = grad_gate_up,
                              .sum = sum_gate_up, .out_stride = D};
        multiply(&to_gate_up, w);
        product to_down = {.M = D, .N = F, .K = R, .parts = 1, .order = BY_K, .pack = pack_columns,
                           .finish = finish_rows, .prepare = prepare_rows, .a = grad_out, .a_stride = D, .panels = act,
                           .out = grad_down, .sum = sum_down, .out_stride = F};
        multiply(&to_down, w);
        free_workspace(w);
    }
}

i64 has_avx2_experts(void) { return 1; }
#else
void avx2_expert_forward(const element *x, const element *gate_up, const element *down, element *hidden, element *out,
                           float *scratch, i64 R, i64 D, i64 F, i64 most) {}
void avx2_expert_backward(const element *grad_out, const element *x, element *hidden, const element *gate_up,
                            const element *down, element *grad_x, element *grad_gate_up, element *grad_down,
                            float *sum_gate_up, float *sum_down, float *scratch, i64 R, i64 D, i64 F) {}
i64 has_avx2_experts(void) { return 0; }
#endif
