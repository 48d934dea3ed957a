/* The FFN experts of bfloat16 on Intel AMX: matrix products that read the weights where
 * they lie, with SwiGLU and its gradient computed while AMX works on the next block.
 *
 * A product here is C[32, 32] = A[32, K] B[K, 32] with A in rows, B in panels: for every 32 of K two tiles of 1 KB (columns
 * 0-15, 16-31), a tile having 16 rows of pairs (k, k + 1). Weights are A in forward, where a panel comes from rows of x
 * through a transposition of 32-bit pairs, and B in backward, where a panel comes from interleaving rows of weights. Both
 * ways weights stream from memory while a chunk of rows stays in the cache. Forward sums run over K in one order, whatever
 * the other rows; those of grad_x in as many parts as the number of rows suggests.
 *
 * Letters as in moe.c: R rows, D width, F expert width. D and F must be multiples of 32.
 */
#include "tiles.h"

#if HAS_TILES
/* Bytes of the second-level cache that the rows of one chunk may take. */
#define FORWARD_BYTES 1500000
#define BACKWARD_BYTES 800000
#define PIECES 16 /* steps that the work on a finished block is cut into */

/* Memory that later blocks read: each step prefetches `each` cache lines at `at`, and the same number `twin` bytes behind. */
typedef struct {
    const char *at;
    i64 stride, twin, each;
} stream;

/* A finished block of C and the places its values are written to.
 * C's tiles: (rows 0-15, columns 0-15), (0-15, 16-31), (16-31, 0-15), ... */
typedef struct {
    const float *c;
    element *out; /* its first row, and the stride of its rows */
    i64 rows, stride;
    char *panel;  /* of the activation: half a step of it */
    char *hidden; /* gate and up: pairs of f for 16 f by 32 r, 2 KB without a gap */
    element *grad, *grad_t; /* gradients of gate and up, in rows and transposed; the offset of up's: */
    i64 grad_stride, grad_up, grad_t_stride, grad_t_up;
    __m512i (*scratch)[16];
} block;
typedef void finish(const block *, int piece);

/* Compute c = A B, plus `sum` if it is not null, and meanwhile all pieces of the block before. */
INLINE void product(const element *a, const element *a_low, i64 a_stride, const char *b, i64 K, const float *sum, float *c,
                    stream *next, finish *piece_of, const block *before) {
    if (sum) {
        _tile_loadd(0, sum, 64);
        _tile_loadd(1, sum + 256, 64);
        _tile_loadd(2, sum + 512, 64);
        _tile_loadd(3, sum + 768, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    i64 steps = K / 32, bytes = a_stride * sizeof *a;
    for (i64 s = 0; s < steps; s++, a += 32, a_low += 32, b += STEP_BYTES) {
        _tile_loadd(4, a, bytes);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (before && s < PIECES) piece_of(before, s);
        for (i64 i = 0; i < next->each; i++, next->at += next->stride) {
            _mm_prefetch(next->at, _MM_HINT_T1);
            if (next->twin) _mm_prefetch(next->at + next->twin, _MM_HINT_T1);
        }
        _tile_loadd(5, a_low, bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    for (i64 s = steps; before && s < PIECES; s++) piece_of(before, s);
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

/* ---- work on a finished block of C ---- */

/* Compute the activation from gate[16 f, 32 r] and up[16 f, 32 r], as half a step of a panel. */
INLINE void finish_activation(const block *b, int piece) {
    int half = piece / 8, f = piece % 8 * 2;
    const float *gate = b->c + half * 256 + f * 16, *up = gate + 512;
    vf g0 = load_float(gate, 16), g1 = load_float(gate + 16, 16), u0 = load_float(up, 16), u1 = load_float(up + 16, 16);
    vf act0 = g0 * sigmoid(g0) * u0, act1 = g1 * sigmoid(g1) * u1;
    _mm512_store_si512(b->panel + half * 1024 + f * 32, rounded_pairs(act0, act1));
}

/* Also store gate and up in the order that backward reads, past the caches: nothing reads them before. */
INLINE void finish_activation_and_hidden(const block *b, int piece) {
    int half = piece / 8, f = piece % 8 * 2;
    const float *gate = b->c + half * 256 + f * 16, *up = gate + 512;
    char *hidden = b->hidden + half * 1024 + f * 32;
    _mm512_stream_si512((__m512i *)hidden, rounded_pairs(load_float(gate, 16), load_float(gate + 16, 16)));
    _mm512_stream_si512((__m512i *)(hidden + 512), rounded_pairs(load_float(up, 16), load_float(up + 16, 16)));
    finish_activation(b, piece);
}

/* Write C[32 d, 32 r] to rows of `out`. */
INLINE void finish_transposed(const block *b, int piece) {
    if (piece % 8) return;
    int half = piece / 8;
    __m512i low[16], high[16];
    for (int i = 0; i < 16; i++) {
        low[i] = _mm512_loadu_si512(b->c + half * 256 + i * 16);
        high[i] = _mm512_loadu_si512(b->c + 512 + half * 256 + i * 16);
    }
    transpose_pairs(low), transpose_pairs(high);
    for (int i = 0; i < 16 && half * 16 + i < b->rows; i++)
        _mm512_storeu_si512(b->out + (half * 16 + i) * b->stride, rounded((vf)low[i], (vf)high[i]));
}

/* Write C[32 r, 32 d] to rows of `out`. */
INLINE void finish_rows(const block *b, int piece) {
    for (int row = 2 * piece; row < 2 * piece + 2 && row < b->rows; row++) {
        const float *c = b->c + row / 16 * 512 + row % 16 * 16;
        _mm512_storeu_si512(b->out + row * b->stride, rounded(load_float(c, 16), load_float(c + 256, 16)));
    }
}

/* Compute the gradients of gate and up from C[32 r, 32 f], the activation's gradient; write the activation to `out`. */
INLINE void swiglu_backward_row(const block *b, int row) {
    const float *c = b->c + row / 16 * 512 + row % 16 * 16;
    vf act[2], grad_gate[2], grad_up[2];
    for (int i = 0; i < 2; i++) {
        const element *hidden = (const element *)&b->scratch[i][row % 16];
        vf x = load(hidden, 16), u = load(hidden + 16, 16), g = load_float(c + 256 * i, 16);
        vf s = sigmoid(x), silu = x * s;
        act[i] = silu * u;
        grad_gate[i] = g * u * (s + silu * (1.f - s));
        grad_up[i] = g * silu;
    }
    element *grad = b->grad + row * b->grad_stride;
    _mm512_stream_si512((__m512i *)(b->out + row * b->stride), rounded(act[0], act[1]));
    _mm512_storeu_si512(grad, rounded(grad_gate[0], grad_gate[1]));
    _mm512_storeu_si512(grad + b->grad_up, rounded(grad_up[0], grad_up[1]));
}

/* Transpose 16 columns of 32 rows to 16 rows of 32. */
INLINE void transpose_columns(const element *in, i64 stride, element *out, i64 out_stride) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) {
        __m256i even = _mm256_loadu_si256((const __m256i *)(in + 2 * i * stride));
        __m256i odd = _mm256_loadu_si256((const __m256i *)(in + (2 * i + 1) * stride));
        __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
        r[i] = _mm512_permutexvar_epi16(_mm512_load_si512(PAIRS), both);
    }
    transpose_pairs(r);
    for (int i = 0; i < 16; i++) _mm512_stream_si512((__m512i *)(out + i * out_stride), r[i]);
}

INLINE void finish_swiglu_backward(const block *b, int piece) {
    int half = piece / 6, step = piece % 6, i = piece % 2;
    if (piece >= 12) {
        int up = (piece - 12) / 2;
        transpose_columns(b->grad + up * b->grad_up + 16 * i, b->grad_stride,
                          b->grad_t + up * b->grad_t_up + 16 * i * b->grad_t_stride, b->grad_t_stride);
    } else if (step < 2) {
        const char *hidden = b->hidden + step * 2048 + half * 1024;
        for (int j = 0; j < 16; j++) b->scratch[step][j] = _mm512_load_si512(hidden + j * 64);
        transpose_pairs(b->scratch[step]);
    } else {
        for (int row = 0; row < 4; row++) swiglu_backward_row(b, half * 16 + (step - 2) * 4 + row);
    }
}

INLINE void finish_all(finish *piece_of, const block *b) {
    for (int piece = 0; piece < PIECES; piece++) piece_of(b, piece);
}

/* ---- forward ---- */

/* Return the cache lines of the next weights to prefetch at each step, so that all are there after the last block. */
INLINE i64 lines_a_step(i64 elements, i64 steps) { return (elements / 32 + steps - 1) / steps; }

INLINE void activations(const element *gate_up, const char *x, char *act, char *hidden, i64 rows, i64 D, i64 F,
                        finish *piece_of) {
    float c[2][1024] __attribute__((aligned(64)));
    int turn = 0;
    block done;
    const block *before = 0;
    i64 blocks = (rows + BLOCK - 1) / BLOCK;
    for (i64 f = 0; f < F; f += 16) {
        const element *gate = gate_up + f * D, *up = gate + F * D;
        stream next = {(const char *)(gate + 16 * D), 64, F * D * sizeof *gate, lines_a_step(16 * D, blocks * (D / 32))};
        for (i64 i = 0; i < blocks; i++, turn ^= 1) {
            product(gate, up, D, x + i * D * 64, D, 0, c[turn], &next, piece_of, before);
            done = (block){.c = c[turn]};
            done.panel = act + i * F * 64 + f / 32 * STEP_BYTES + f % 32 * 32;
            done.hidden = hidden ? hidden + (i * F + f) * BLOCK * 4 : 0;
            before = &done;
        }
    }
    finish_all(piece_of, &done);
}

static void outputs(const element *down, const char *act, element *out, i64 rows, i64 D, i64 F) {
    float c[2][1024] __attribute__((aligned(64)));
    int turn = 0;
    block done;
    const block *before = 0;
    i64 blocks = (rows + BLOCK - 1) / BLOCK;
    for (i64 d = 0; d < D; d += BLOCK) {
        const element *w = down + d * F;
        stream next = {(const char *)(w + BLOCK * F), 64, 0, lines_a_step(BLOCK * F, blocks * (F / 32))};
        for (i64 i = 0; i < blocks; i++, turn ^= 1) {
            product(w, w + 16 * F, F, act + i * F * 64, F, 0, c[turn], &next, finish_transposed, before);
            done = (block){.c = c[turn], .rows = rows - i * BLOCK, .stride = D, .out = out + i * BLOCK * D + d};
            before = &done;
        }
    }
    finish_all(finish_transposed, &done);
}

/* Return the number of chunks: nearly equal, about `rows` long, the same number for each thread. One chunk may be half as
 * long again, which saves a pass over the weights. */
static i64 number_of_chunks(i64 R, i64 rows) {
    rows = rows < BLOCK ? BLOCK : rows / BLOCK * BLOCK;
    i64 chunks = R <= rows + rows / 2 ? 1 : (R + rows - 1) / rows, threads = omp_get_max_threads();
    return smaller((chunks + threads - 1) / threads * threads, (R + BLOCK - 1) / BLOCK);
}

INLINE i64 longest_chunk(i64 R, i64 chunks) { return (R / chunks + 2 * BLOCK) / BLOCK * BLOCK; }

INLINE i64 chunk_start(i64 R, i64 chunks, i64 chunk) {
    i64 start = (R * chunk / chunks + BLOCK - 1) / BLOCK * BLOCK;
    return start < R ? start : R;
}

/* Compute out[R, D] = x[R, D] through one expert's gate_up[2F, D] and down[D, F]. Store gate_up's products in `hidden` for
 * amx_expert_backward(): 2F elements for each of R rows, rounded up to 32. `hidden` or `out` may be null: not wanted. */
void amx_expert_forward(const element *x, const element *gate_up, const element *down, char *hidden, element *out, i64 R, i64 D,
                    i64 F) {
    i64 chunks = number_of_chunks(R, FORWARD_BYTES / ((D + F) * sizeof *x)), most = longest_chunk(R, chunks);
    OMP(omp parallel if(chunks > 1))
    {
        char *x_panels = aligned_alloc(64, most * (D + F) * sizeof *x), *act_panels = x_panels + most * D * sizeof *x;
        configure_tiles();
        OMP(omp for schedule(static))
        for (i64 chunk = 0; chunk < chunks; chunk++) {
            i64 first = chunk_start(R, chunks, chunk), rows = chunk_start(R, chunks, chunk + 1) - first;
            if (rows <= 0) continue;
            for (i64 r = 0; r < rows; r += BLOCK) panel_of_rows(x + (first + r) * D, rows - r, D, x_panels + r * D * 2);
            if (hidden)
                activations(gate_up, x_panels, act_panels, hidden + first * F * 4, rows, D, F, finish_activation_and_hidden);
            else
                activations(gate_up, x_panels, act_panels, 0, rows, D, F, finish_activation);
            if (out) outputs(down, act_panels, out + first * D, rows, D, F);
        }
        _mm_sfence();
        _tile_release();
        free(x_panels);
    }
}

/* ---- backward ---- */

/* A thread's memory: panels of weights, 32 rows, gradients of some columns of gate and up, sums of grad_x. */
typedef struct {
    char *panel;
    element *copy, *grad;
    float *sums, *c[2];
    __m512i (*hidden)[16];
    void *memory;
} workspace;

static workspace new_workspace(i64 rows, i64 D, i64 columns) {
    i64 longest = D > 2 * columns ? D : 2 * columns;
    i64 sizes[] = {COLUMNS * longest * 2, BLOCK * D * 2, rows * 2 * columns * 2, rows * D * 4, 4096, 4096, 2048}, total = 0;
    for (int i = 0; i < 7; i++) total += sizes[i];
    char *at = aligned_alloc(4096, (total + 4095) / 4096 * 4096), *parts[7];
    workspace w = {.memory = at};
    for (int i = 0; i < 7; at += sizes[i++]) parts[i] = at;
    w.panel = parts[0], w.copy = (element *)parts[1], w.grad = (element *)parts[2], w.sums = (float *)parts[3];
    w.c[0] = (float *)parts[4], w.c[1] = (float *)parts[5], w.hidden = (__m512i(*)[16])parts[6];
    return w;
}

/* Compute the gradients of `columns` columns of gate and up, from column f, for some rows. `first` describes the block of
 * row 0, f = 0. */
static void hidden_gradients(const element *grad_out, i64 rows, const element *down, i64 D, i64 F, i64 f, i64 columns,
                             workspace w, block first) {
    i64 blocks = (rows + BLOCK - 1) / BLOCK;
    const block *before = 0;
    block done;
    int turn = 0;
    for (i64 n = 0; n < columns; n += BLOCK) {
        char *panel = w.panel + n % COLUMNS * D * 2;
        if (n % COLUMNS == 0) panels_of_columns(down + f + n, F, D, smaller(COLUMNS, columns - n), panel, BLOCK * D * 2);
        for (i64 i = 0; i < blocks; i++, turn ^= 1) {
            const element *a = (i + 1) * BLOCK <= rows ? grad_out + i * BLOCK * D : w.copy;
            char *kept = first.hidden + (i * F + f + n) * BLOCK * 4;
            stream next = {kept, 64, 0, lines_a_step(2 * BLOCK * BLOCK, D / 32)};
            product(a, a + 16 * D, D, panel, D, 0, w.c[turn], &next, finish_swiglu_backward, before);
            done = first;
            done.c = w.c[turn];
            done.out += i * BLOCK * first.stride + f + n;
            done.hidden = kept;
            done.grad += i * BLOCK * first.grad_stride + n;
            done.grad_t += (f + n) * first.grad_t_stride + i * BLOCK;
            before = &done;
        }
    }
    finish_all(finish_swiglu_backward, &done);
}

/* Add the share of these columns to grad_x; after the `last` ones the sums are complete. */
static void input_gradients(const element *gate_up, element *grad_x, i64 rows, i64 D, i64 F, i64 f, i64 columns, int last,
                            workspace w) {
    i64 blocks = (rows + BLOCK - 1) / BLOCK, K = 2 * columns;
    const block *before = 0;
    block done;
    int turn = 0;
    stream none = {0};
    for (i64 d = 0; d < D; d += BLOCK) {
        char *panel = w.panel + d % COLUMNS * K * 2;
        for (int up = 0; d % COLUMNS == 0 && up < 2; up++)
            panels_of_columns(gate_up + (up * F + f) * D + d, D, columns, smaller(COLUMNS, D - d), panel + up * columns * 64,
                              BLOCK * K * 2);
        for (i64 i = 0; i < blocks; i++, turn ^= 1) {
            float *sum = w.sums + (d / BLOCK * blocks + i) * BLOCK * BLOCK, *c = last ? w.c[turn] : sum;
            const element *a = w.grad + i * BLOCK * K;
            product(a, a + 16 * K, K, panel, K, f ? sum : 0, c, &none, finish_rows, before);
            if (!last) continue;
            done = (block){.c = c, .rows = rows - i * BLOCK, .out = grad_x + i * BLOCK * D + d, .stride = D};
            before = &done;
        }
    }
    if (last) finish_all(finish_rows, &done);
}

/* Compute, from grad_out[R, D] and what amx_expert_forward() stored in `hidden`: grad_x[R, D]; the gradient of gate_up's
 * products, transposed, grad_hidden_t[2F, t_stride]; and again the activation act[., act_stride]. The latter two have room
 * for R rounded up to 32. */
void amx_expert_backward(const element *grad_out, char *hidden, const element *gate_up, const element *down,
                     element *grad_hidden_t, element *act, element *grad_x, i64 R, i64 D, i64 F, i64 t_stride,
                     i64 act_stride) {
    i64 chunks = number_of_chunks(R, BACKWARD_BYTES / (D * sizeof *act)), most = longest_chunk(R, chunks);
    i64 width = smaller(F, BACKWARD_BYTES / (4 * most) / COLUMNS * COLUMNS + COLUMNS);
    OMP(omp parallel if(chunks > 1))
    {
        workspace w = new_workspace(most, D, width);
        configure_tiles();
        OMP(omp for schedule(static))
        for (i64 chunk = 0; chunk < chunks; chunk++) {
            i64 start = chunk_start(R, chunks, chunk), rows = chunk_start(R, chunks, chunk + 1) - start;
            i64 whole = rows / BLOCK * BLOCK;
            if (rows <= 0) continue;
            last_rows(grad_out + (start + whole) * D, rows - whole, D, w.copy);
            for (i64 f = 0; f < F; f += width) {
                i64 columns = smaller(width, F - f);
                block first = {.out = act + start * act_stride, .stride = act_stride, .hidden = hidden + start * F * 4,
                               .grad = w.grad, .grad_stride = 2 * columns, .grad_up = columns, .scratch = w.hidden,
                               .grad_t = grad_hidden_t + start, .grad_t_stride = t_stride, .grad_t_up = F * t_stride};
                hidden_gradients(grad_out + start * D, rows, down, D, F, f, columns, w, first);
                input_gradients(gate_up, grad_x + start * D, rows, D, F, f, columns, f + columns == F, w);
            }
        }
        _mm_sfence();
        _tile_release();
        free(w.memory);
    }
}
#else
void amx_expert_forward(const element *x, const element *gate_up, const element *down, char *hidden, element *out, i64 R, i64 D,
                    i64 F) {}
void amx_expert_backward(const element *grad_out, char *hidden, const element *gate_up, const element *down,
                     element *grad_hidden_t, element *act, element *grad_x, i64 R, i64 D, i64 F, i64 t_stride,
                     i64 act_stride) {}
#endif
