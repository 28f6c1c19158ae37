// Stage 2 and its heads in vectors of VISTA_LANES floats; compiled once per width (build.py), and with VISTA_BFLOAT16
// once more, whose products round their factors to bfloat16 and add up in float32 (those of networks stay float32). It
// calls nothing that another width could also define: no standard containers, no inline functions of headers.
//
// Each row of a matrix is computed by the same operations in the same order, whatever the other rows are: products run
// over whole blocks of ROWS rows, and rows that are missing are filled with others. So a candidate's score does not
// depend on the other candidates of a call.
//
// Letters as in scoring.h; N tokens of the context, R rows of a block.
#include <cstring>
#if VISTA_LANES == 16
#include <immintrin.h>
#endif

#include "scoring.h"

namespace {
constexpr int W = VISTA_LANES;
// Whether 32 bits of a factor hold two values in bfloat16, which are neighbors in `depth`.
#ifdef VISTA_BFLOAT16
constexpr bool PAIRED = true;
#else
constexpr bool PAIRED = false;
#endif
constexpr int ROWS = W == 16 ? 12 : 6;  // with two vectors per row, the sums fill three quarters of the registers

typedef float Lanes __attribute__((vector_size(4 * W)));
typedef float Unaligned __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * W)));

inline Lanes splat(float x) { return x - Lanes{}; }
inline Lanes load(const float *at) { return (Lanes) * (const Unaligned *)at; }
inline void store(float *at, Lanes x) { *(Unaligned *)at = (Unaligned)x; }
inline size_t align(size_t count) { return (count + 15) / 16 * 16; }

// The upper half of the first 2 * `half` lanes, moved down; the rest of the result is of no use.
template <int half>
inline Lanes upper(Lanes x) {
    Ints from{};
    for (int i = 0; i < half; ++i) from[i] = half + i;
    return __builtin_shuffle(x, from);
}

inline Lanes larger(Lanes x, Lanes y) { return x < y ? y : x; }

inline float sum(Lanes x) {
    if (W >= 16) x += upper<8>(x);
    if (W >= 8) x += upper<4>(x);
    x += upper<2>(x);
    return x[0] + x[1];
}

inline float largest(Lanes x) {
    if (W >= 16) x = larger(x, upper<8>(x));
    if (W >= 8) x = larger(x, upper<4>(x));
    x = larger(x, upper<2>(x));
    return x[0] < x[1] ? x[1] : x[0];
}

// x, but between -87 and 87. Whether NaN stays NaN depends on the processor.
inline Lanes clamped(Lanes x) {
#if VISTA_LANES == 16  // for which GCC makes two instructions each of a comparison
    return (Lanes)_mm512_max_ps((__m512)splat(-87.0f), _mm512_min_ps((__m512)splat(87.0f), (__m512)x));
#else
    x = x < 87.0f ? x : splat(87.0f);
    return x > -87.0f ? x : splat(-87.0f);
#endif
}

// e^x within 2e-7 of its size, for x between -87 and 87: 2^n times a polynomial of the rest in base 2.
inline Lanes bounded_exp(Lanes x) {
    const Lanes shifted = x * 1.44269504f + 12582912.0f;  // rounds to whole numbers, which are its last bits
    const Lanes n = shifted - 12582912.0f;
    const Lanes r = x * 1.92596299e-8f + (x * 1.44269504f - n);
    Lanes p = splat(1.3264727313e-03f);
    p = p * r + 9.6715129912e-03f;
    p = p * r + 5.5507335812e-02f;
    p = p * r + 2.4022242427e-01f;
    p = p * r + 6.9314700365e-01f;
    p = p * r + 1.0f;
    return (Lanes)((Ints)p + ((Ints)shifted << 23));
}

// e^x; NaN stays NaN.
inline Lanes exp(Lanes x) { return x == x ? bounded_exp(clamped(x)) : x; }
inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp(-x)); }
inline Lanes silu(Lanes x) { return x / (1.0f + bounded_exp(-clamped(x))); }  // NaN stays NaN by x itself

// Inner product of two vectors of any length.
inline float dot(const float *a, const float *b, int count) {
    Lanes total{};
    int i = 0;
    for (; i + W <= count; i += W) total += load(a + i) * load(b + i);
    float rest = sum(total);
    for (; i < count; ++i) rest = __builtin_fmaf(a[i], b[i], rest);
    return rest;
}

// total + left * right; if paired, of both values in each 32 bits.
template <bool paired>
inline Lanes added(Lanes total, Lanes left, Lanes right) {
#ifdef VISTA_BFLOAT16
    if (paired) return (Lanes)_mm512_dpbf16_ps((__m512)total, (__m512bh)left, (__m512bh)right);
#endif
    return total + left * right;
}

// [rows, depth] -> [rows, depth / 2] pairs; depth is a multiple of W.
void pair_up(const float *a, int lda, float *pairs, int rows, int depth) {
#ifdef VISTA_BFLOAT16
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < depth; k += W) {
            const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(a + (size_t)r * lda + k));
            memcpy(pairs + ((size_t)r * depth + k) / 2, &rounded, sizeof rounded);
        }
#else
    (void)a, (void)lda, (void)pairs, (void)rows, (void)depth;
#endif
}

// Writes the value at row k and column n of the right factor of a product.
inline void put(float *b, int ldb, int k, int n, float value) {
    if (!PAIRED) {
        b[(size_t)k * ldb + n] = value;
        return;
    }
    const uint16_t rounded = bfloat16(value);
    memcpy((char *)(b + (size_t)(k / 2) * ldb + n) + 2 * (k % 2), &rounded, 2);
}

enum Epilogue { STORE, SILU, ADD, SCORE, SILU_SCORE };

// C [R, V * W] from A [R, depth] and B [depth, V * W]; depth counts pairs if `paired`. C is stored, with SiLU, added to
// what is there, or as scores: scaled, with a bias per column, and with SiLU.
template <int V, Epilogue end, bool paired>
inline void block(const float *a, int lda, const float *b, int ldb, float *c, int ldc, int depth, const float *bias,
                  float scale) {
    Lanes sums[ROWS][V];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sums[r][v] = Lanes{};
    for (int k = 0; k < depth; ++k) {
        Lanes right[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) right[v] = load(b + (size_t)k * ldb + W * v);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const Lanes left = splat(a[(size_t)r * lda + k]);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) sums[r][v] = added<paired>(sums[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            float *at = c + (size_t)r * ldc + W * v;
            Lanes x = sums[r][v];
            if (end == SCORE || end == SILU_SCORE) x = x * scale + load(bias + W * v);
            if (end == ADD) x += load(at);
            store(at, end == SILU || end == SILU_SCORE ? silu(x) : x);
        }
}

struct Left {  // factor [rows, depth]; depth counts pairs if it is paired
    const float *values;
    int ld, depth;
};

// A left factor as the kernels multiply it. `pairs` is scratch memory.
inline Left rounded(float *pairs, const float *a, int lda, int rows, int depth) {
    if (!PAIRED) return {a, lda, depth};
    pair_up(a, lda, pairs, rows, depth);
    return {pairs, depth / 2, depth / 2};
}

// C [rows, columns] from A [rows, depth] and B [depth, columns]; rows is a multiple of ROWS, columns of W. B is packed
// in panels of two vectors (`pack` in library.cpp), or has rows of `ldb` values.
template <Epilogue end, bool paired = PAIRED>
__attribute__((noinline)) void multiply(Left a, const float *b, int ldb, float *c, int ldc, int rows, int columns,
                                        const float *bias = nullptr, float scale = 1.0f) {
    for (int n = 0; n < columns;) {
        const bool pair = n + 2 * W <= columns;
        const float *panel = ldb ? b + n : b + (size_t)n * a.depth;
        const int step = ldb ? ldb : pair ? 2 * W : W;
        const float *of_columns = bias ? bias + n : nullptr;
        for (int r = 0; r < rows; r += ROWS) {
            const float *left = a.values + (size_t)r * a.ld;
            float *out = c + (size_t)r * ldc + n;
            if (pair) block<2, end, paired>(left, a.ld, panel, step, out, ldc, a.depth, of_columns, scale);
            else block<1, end, paired>(left, a.ld, panel, step, out, ldc, a.depth, of_columns, scale);
        }
        n += pair ? 2 * W : W;
    }
}

// Layer norm of one row of `count` values; times `gate`, if there is one.
inline void normalize(const float *x, const float *weight, const float *gate, float *out, int count, float eps) {
    Lanes total{}, squares{};
    for (int i = 0; i < count; i += W) total += load(x + i);
    const float mean = sum(total) / count;
    for (int i = 0; i < count; i += W) {
        const Lanes centered = load(x + i) - mean;
        squares += centered * centered;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / count + eps);
    for (int i = 0; i < count; i += W) {
        Lanes y = (load(x + i) - mean) * inverse * load(weight + i);
        if (gate) y *= load(gate + i);
        store(out + i, y);
    }
}

void normalize_rows(const float *x, int ldx, const float *weight, const float *gate, int ldg, float *out, int ldo,
                    int rows, int count, float eps) {
    for (int r = 0; r < rows; ++r)
        normalize(x + (size_t)r * ldx, weight, gate ? gate + (size_t)r * ldg : nullptr, out + (size_t)r * ldo, count,
                  eps);
}

// Scratch memory of one thread for up to `rows` rows.
struct Work {
    float *x, *parts, *normed, *heads, *scores, *hidden, *pairs, *own;
    Work(const Sizes &s, int rows, float *at) {
        auto take = [&](size_t columns) {
            float *first = at;
            at += align((size_t)rows * columns);
            return first;
        };
        x = take(s.dim);
        parts = take(s.parts);
        normed = take(s.dim);
        heads = take(s.dim);
        scores = take(s.scores);
        hidden = take(s.hidden);
        pairs = take(s.pairs);
        own = take(1);
    }
};

// Softmax of scores [rows, count] and, if given, of one more score of each row, in place.
void softmax(float *scores, int ld, int rows, int count, float *own) {
    for (int r = 0; r < rows; ++r) {
        float *row = scores + (size_t)r * ld;
        Lanes most = splat(own ? own[r] : row[0]);
        for (int j = 0; j < count; j += W) {
            const Lanes x = load(row + j);
            most = most > x ? most : x;
        }
        const Lanes top = splat(largest(most));
        const float of_own = own ? exp(splat(own[r]) - top)[0] : 0.0f;
        Lanes total{};
        for (int j = 0; j < count; j += W) {
            const Lanes x = exp(load(row + j) - top);
            store(row + j, x);
            total += x;
        }
        const float inverse = 1.0f / (sum(total) + of_own);
        for (int j = 0; j < count; j += W) store(row + j, load(row + j) * inverse);
        if (own) own[r] = of_own * inverse;
    }
}

// What follows attention in a layer.
void mix(const Sizes &s, const Layer &layer, Work &w, int rows) {
    if (!s.softmax) {
        normalize_rows(w.heads, s.dim, layer.head_norm, w.parts + s.dim, 4 * s.dim, w.normed, s.dim, rows, s.dim,
                       s.norm_eps);
        multiply<ADD>(rounded(w.pairs, w.normed, s.dim, rows, s.dim), layer.out, 0, w.x, s.dim, rows, s.dim);
        return;
    }
    for (int r = 0; r < rows; ++r) {
        float *gate = w.parts + (size_t)r * 4 * s.dim + s.dim;
        for (int i = 0; i < s.dim; i += W) store(gate + i, sigmoid(load(gate + i)));
    }
    for (int h = 0; h < s.heads; ++h) {
        const int at = h * s.head_dim;
        normalize_rows(w.heads + at, s.dim, layer.head_norm, w.parts + s.dim + at, 4 * s.dim, w.normed + at, s.dim, rows,
                       s.head_dim, s.norm_eps);
    }
    multiply<ADD>(rounded(w.pairs, w.normed, s.dim, rows, s.dim), layer.out, 0, w.x, s.dim, rows, s.dim);
    normalize_rows(w.x, s.dim, layer.feed_norm, nullptr, 0, w.normed, s.dim, rows, s.dim, s.norm_eps);
    const int width = 2 * s.feed;
    multiply<STORE>(rounded(w.pairs, w.normed, s.dim, rows, s.dim), layer.up, 0, w.hidden, width, rows, width);
    for (int r = 0; r < rows; ++r) {
        float *row = w.hidden + (size_t)r * width;
        for (int i = 0; i < s.feed; i += W) store(row + i, silu(load(row + i)) * load(row + s.feed + i));
    }
    multiply<ADD>(rounded(w.pairs, w.hidden, width, rows, s.feed), layer.down, 0, w.x, s.dim, rows, s.dim);
}

// Parts (query, gate, key, value) of the normalized rows of w.x, from number `first` on.
template <Epilogue end>
void project(const Sizes &s, const float *norm, const float *projections, Work &w, int rows, int first = 0) {
    const int dim = s.dim, size = dim * dim / (PAIRED ? 2 : 1);
    normalize_rows(w.x, dim, norm, nullptr, 0, w.normed, dim, rows, dim, s.norm_eps);
    const Left normed = rounded(w.pairs, w.normed, dim, rows, dim);
    for (int part = first; part < 4; ++part)
        multiply<end>(normed, projections + (size_t)part * size, 0, w.parts + part * dim, 4 * dim, rows, dim);
}

// The same, as attention reads them.
void project_activated(const Sizes &s, const Layer &layer, Work &w, int rows, int first = 0) {
    if (s.softmax) project<STORE>(s, layer.norm, layer.projections, w, rows, first);
    else project<SILU>(s, layer.norm, layer.projections, w, rows, first);
}

// x += weight * y, for `count` values.
inline void add(float *x, const float *y, int64_t count, float weight = 1.0f) {
    for (int64_t i = 0; i < count; i += W) store(x + i, load(x + i) + weight * load(y + i));
}

// Queries w.x with their parts in layer 1 (before SiLU) pass all layers; the result, normalized, is in w.normed.
void pass(const VistaModel &model, const float *adapter, const Context &context, Work &w, int rows) {
    const Sizes &s = model.sizes;
    const int dim = s.dim, wide = 4 * dim, size = s.head_dim;
    for (int l = 0; l < s.layers; ++l) {
        const Layer &layer = model.layers[l];
        if (l > 0) {
            project_activated(s, layer, w, rows);
        } else if (!s.softmax) {
            for (size_t i = 0; i < (size_t)rows * wide; i += W) store(w.parts + i, silu(load(w.parts + i)));
        }
        for (int h = 0; h < s.heads; ++h) {
            const size_t head = ((size_t)l * s.heads + h) * s.padded;
            const float *keys = context.keys + head * size, *values = context.values + head * size;
            const float *bias = context.bias + head;
            const float *query = w.parts + h * size;
            for (int r = 0; r < rows; ++r) {
                const float *q = query + (size_t)r * wide;
                w.own[r] = dot(q, q + 2 * dim, size) * s.score_scale + layer.own_bias[h];
            }
            const Left queries = rounded(w.pairs, query, wide, rows, size);
            if (s.softmax) {
                multiply<SCORE>(queries, keys, s.padded, w.scores, s.padded, rows, s.padded, bias, s.score_scale);
                softmax(w.scores, s.padded, rows, s.padded, w.own);
            } else {
                multiply<SILU_SCORE>(queries, keys, s.padded, w.scores, s.padded, rows, s.padded, bias);
                for (int r = 0; r < rows; r += W) store(w.own + r, silu(load(w.own + r)));
            }
            for (int r = 0; r < rows; ++r) {
                const float *value = query + (size_t)r * wide + 3 * dim;
                float *out = w.heads + (size_t)r * dim + h * size;
                for (int i = 0; i < size; i += W) store(out + i, w.own[r] * load(value + i));
            }
            multiply<ADD>(rounded(w.pairs, w.scores, s.padded, rows, s.padded), values, size, w.heads + h * size, dim,
                          rows, size);
        }
        mix(s, layer, w, rows);
        for (int r = 0; adapter && r < rows; ++r) add(w.x + (size_t)r * dim, adapter + (size_t)l * dim, dim);
    }
    normalize_rows(w.x, dim, model.final_norm, nullptr, 0, w.normed, dim, rows, dim, s.norm_eps);
}

// Outputs of a network for `count` rows of inputs, one after another in `out`; its hidden layers are in w.hidden.
void run_network(const Network &net, const float *inputs, int count, float *out, Work &w) {
    const int rows = (count + ROWS - 1) / ROWS * ROWS, hidden = net.hidden;
    float *a = w.hidden, *b = w.hidden + (size_t)rows * hidden;
    multiply<SILU_SCORE, false>({inputs, net.inputs, net.inputs}, net.first, 0, a, hidden, rows, hidden,
                                net.first_bias);
    multiply<SILU_SCORE, false>({a, hidden, hidden}, net.second, 0, b, hidden, rows, hidden, net.second_bias);
    for (int r = 0; r < count; ++r)
        for (int i = 0; i < net.outputs; ++i)
            out[r * net.outputs + i] = dot(b + (size_t)r * hidden, net.last + (size_t)i * hidden, hidden);
}

// Embeddings of a user's tail; 0 in the padding.
void embed_tail(const VistaModel &model, const VistaRequest &request, int64_t user, float *tail) {
    const Sizes &s = model.sizes;
    const int64_t first = user * s.tail;
    memset(tail, 0, 4 * (size_t)s.tail * s.dim);
    for (int64_t t = 0; t < s.tail; ++t) {
        float *x = tail + t * s.dim;
        if (!request.valid[first + t]) continue;
        if (request.items) {
            add(x, request.vectors.values + request.items[first + t] * request.vectors.width, s.dim);
            if (model.actions) add(x, model.actions + request.actions[first + t] * s.dim, s.dim);
            if (model.gaps) add(x, model.gaps + request.gaps[first + t] * s.dim, s.dim);
        }
        if (request.events) add(x, request.events + (first + t) * s.dim, s.dim);
    }
}

// Keys and values of a user's summary and tail in all layers.
void context(const VistaModel &model, const VistaRequest &request, int64_t user, Context &out, float *work) {
    const Sizes &s = model.sizes;
    const int dim = s.dim, wide = 4 * dim, size = s.head_dim, rows = (s.tokens + ROWS - 1) / ROWS * ROWS;
    Work w(s, rows, work);
    const float *summary = request.summary + user * s.seeds * dim;
    const uint8_t *valid = request.valid + user * s.tail;
    embed_tail(model, request, user, out.tail);
    normalize_rows(summary, dim, model.summary_norm, nullptr, 0, w.x, dim, s.seeds, dim, s.norm_eps);
    add(w.x, model.summary_kind, s.seeds * dim);
    float *tail = w.x + (size_t)s.seeds * dim;
    for (int i = 0; i < s.tail * dim; i += W) store(tail + i, load(out.tail + i) * s.input_scale);
    memset(w.x + (size_t)s.tokens * dim, 0, 4 * (size_t)(rows - s.tokens) * dim);
    for (int l = 0; l < s.layers; ++l) {
        const Layer &layer = model.layers[l];
        const bool last = l == s.layers - 1;
        project_activated(s, layer, w, rows, last ? 2 : 0);
        for (int h = 0; h < s.heads; ++h) {
            const size_t head = ((size_t)l * s.heads + h) * s.padded;
            float *keys = out.keys + head * size, *values = out.values + head * size, *bias = out.bias + head;
            auto part = [&](int t, int number, int d) {
                return t < s.tokens ? w.parts[(size_t)t * wide + number * dim + h * size + d] : 0.0f;
            };
            for (int d = 0; d < size; ++d)
                for (int t = 0; t < s.padded; ++t) put(keys, s.padded, d, t, part(t, 2, d));
            for (int t = 0; t < s.padded; ++t)
                for (int d = 0; d < size; ++d) put(values, size, t, d, part(t, 3, d));
            for (int t = 0; t < s.padded; ++t) {
                const bool hidden = t >= s.seeds && (t >= s.tokens || !valid[t - s.seeds]);
                bias[t] = hidden ? MASKED : layer.query_bias[(size_t)h * s.padded + t];
            }
            if (last) continue;
            multiply<STORE>(rounded(w.pairs, w.parts + h * size, wide, rows, size), keys, s.padded, w.scores, s.padded,
                            rows, s.padded);
            for (int t = 0; t < rows; ++t) {
                // Rows that fill the last block see what the first token sees. They are never read.
                const float *mask = layer.mask + ((size_t)h * s.tokens + (t < s.tokens ? t : 0)) * s.padded;
                float *score = w.scores + (size_t)t * s.padded;
                for (int j = 0; j < s.padded; ++j) score[j] = score[j] * s.score_scale + mask[j];
                for (int j = 0; j < s.tail; ++j)
                    if (!valid[j]) score[s.seeds + j] = MASKED;
                if (s.softmax) softmax(score, s.padded, 1, s.padded, nullptr);
                else
                    for (int j = 0; j < s.padded; j += W) store(score + j, silu(load(score + j)));
            }
            multiply<STORE>(rounded(w.pairs, w.scores, s.padded, rows, s.padded), values, size, w.heads + h * size,
                            dim, rows, size);
        }
        if (!last) mix(s, layer, w, rows);
    }
}

// The slot of a row in a user's followers, or an empty one where it would be.
inline int slot_of(const Sizes &s, const int32_t *followers, int64_t row) {
    uint32_t slot = (uint32_t)row * 2654435769u >> 7;  // Knuth's multiplicative hash
    for (;; ++slot) {
        slot &= (uint32_t)s.slots - 1;
        if (!followers[slot] || followers[slot] == row) return (int)slot;
    }
}

// The sums over followers of a user's newest items.
void sum_followers(const VistaModel &model, const VistaRequest &request, int64_t user, Context &context) {
    const Sizes &s = model.sizes;
    memset(context.followers, 0, 4 * (size_t)s.slots);
    for (int j = 0; j < s.recent; ++j) {
        const int64_t first = request.recent[user * s.recent + j] * s.followers;
        for (int64_t at = first; at < first + s.followers; ++at) {
            const int32_t row = request.follower_items[at];
            if (!row) continue;
            const int slot = slot_of(s, context.followers, row);
            float *sums = context.sums + (size_t)slot * NUM_SUMS;
            if (!context.followers[slot]) sums[0] = sums[1] = 0.0f;
            context.followers[slot] = row;
            sums[j > 0] += request.follower_weights.values[at] * model.decay[j];
        }
    }
}

// The retrieval head's vector of a user, and the sums that its scores read.
void user_vector(const VistaModel &model, const VistaRequest &request, int64_t user, Context &context, float *work) {
    const Sizes &s = model.sizes;
    const int dim = s.dim;
    Work w(s, ROWS, work);
    memcpy(w.x, model.request, 4 * (size_t)dim);
    if (request.valid[user * s.tail + s.tail - 1]) add(w.x, context.tail + (size_t)(s.tail - 1) * dim, dim);
    for (int r = 1; r < ROWS; ++r) memcpy(w.x + (size_t)r * dim, w.x, 4 * (size_t)dim);
    project<STORE>(s, model.layers[0].norm, model.layers[0].projections, w, ROWS);
    const float *added = request.added ? request.added + user * 5 * dim : nullptr;
    for (int r = 0; r < ROWS; ++r) {
        float *x = w.x + (size_t)r * dim;
        if (added) {
            add(x, added, dim);
            add(w.parts + (size_t)r * 4 * dim, added + dim, 4 * dim);
        }
        for (int i = 0; i < dim; i += W) store(x + i, load(x + i) * s.input_scale);
    }
    pass(model, request.adapter, context, w, ROWS);
    float length = __builtin_sqrtf(dot(w.normed, w.normed, dim));
    length = length < 1e-12f ? 1e-12f : length;  // as torch's normalize
    for (int i = 0; i < dim; i += W) store(context.user + i, s.gain * (load(w.normed + i) / length));
    float *of_space = context.user + dim, *others = of_space + s.space;
    auto weight = [&](int i) { return dot(context.user, model.wide_weight + (size_t)i * dim, dim) + model.wide_bias[i]; };
    for (int i = 0; i < s.extra; ++i) others[i] = weight(i);
    for (int i = 0; i < s.space; ++i) of_space[i] = 0.0f;
    for (int j = 0; j < s.pooled; ++j) {
        const float *pooled = request.pooled + (user * s.pooled + j) * s.space, of_pooled = weight(s.extra + j);
        for (int i = 0; i < s.space; ++i) of_space[i] += of_pooled * pooled[i];
    }
    if (model.gate_weight) context.gate = dot(context.user, model.gate_weight, dim) + model.gate_bias;
    if (request.scores && s.recent) sum_followers(model, request, user, context);
}

// The sums of an item, which are 0 where it follows nothing.
inline const float *sums_of(const Sizes &s, const Context &context, int64_t row) {
    static const float none[NUM_SUMS] = {};
    const int slot = slot_of(s, context.followers, row);
    return row && context.followers[slot] ? context.sums + (size_t)slot * NUM_SUMS : none;
}

// What networks read, in the order of their inputs; these return the end.
float *copy_cosines(const Sizes &s, const VistaRequest &request, int64_t user, int64_t row, float *out) {
    const float *item = request.space.values + row * s.space;
    for (int j = 0; j < s.pooled; ++j)
        *out++ = dot(request.pooled + (user * s.pooled + j) * s.space, item, s.space);
    return out;
}

float *copy_row(const VistaTable &table, int64_t row, float *out) {
    for (int64_t i = 0; i < table.width; ++i) *out++ = table.values[row * table.width + i];
    return out;
}

float *copy_codes(const uint8_t *codes, int count, float *out) {
    for (int f = 0; f < count; ++f) *out++ = codes[f] / 8.0f - 2.0f;
    return out;
}

// The first of `count` ascending pairs that is not below `pair`.
int64_t place_of(const int64_t *pairs, int64_t count, int64_t pair) {
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (pairs[middle] < pair) low = middle + 1;
        else high = middle;
    }
    return low;
}

inline int64_t row_of(const VistaRequest &request, int64_t user, int64_t pair) {
    const int64_t own = pair - request.offsets[user];
    return request.rows ? request.rows[request.shared ? own : pair] : own;
}

// The row of a pair's features.
inline int64_t feature_row(const VistaRequest &request, int64_t user, int64_t pair) {
    return request.feature_first[user] + (request.features_per_user ? 0 : pair - request.offsets[user]);
}

// both += features in a row.
void add_features(const VistaRequest &request, int64_t row, float *both) {
    const VistaTable &features = request.features;
    for (int e = 0; e < request.num_entries; ++e)
        add(both, features.values + request.entries[row * request.num_entries + e] * features.width, features.width);
    const float *last = features.values + (features.rows - request.num_dense) * features.width;
    for (int e = 0; e < request.num_dense; ++e)
        add(both, last + e * features.width, features.width, request.dense[row * request.num_dense + e]);
}

// Logits of a user's pairs `first` to `stop`, at most TILE.
void logits(const VistaModel &model, const VistaRequest &request, int64_t user, int64_t first, int64_t stop,
            const Context &context, float *work) {
    const Sizes &s = model.sizes;
    const int dim = s.dim, wide = 4 * dim, count = (int)(stop - first), rows = (count + ROWS - 1) / ROWS * ROWS;
    const bool has_parts = request.candidates.width == 5 * dim;
    Work w(s, TILE, work);
    for (int r = 0; r < count; ++r) {
        const float *item = request.candidates.values + row_of(request, user, first + r) * request.candidates.width;
        memcpy(w.x + (size_t)r * dim, item, 4 * (size_t)dim);
        if (has_parts) memcpy(w.parts + (size_t)r * wide, item + dim, 4 * (size_t)wide);
    }
    for (int r = count; r < rows; ++r) {
        memcpy(w.x + (size_t)r * dim, w.x, 4 * (size_t)dim);
        if (has_parts) memcpy(w.parts + (size_t)r * wide, w.parts, 4 * (size_t)wide);
    }
    if (!has_parts) project<STORE>(s, model.layers[0].norm, model.layers[0].projections, w, rows);
    auto add_both = [&](int r, const float *both) {
        add(w.x + (size_t)r * dim, both, dim);
        add(w.parts + (size_t)r * wide, both + dim, wide);
    };
    float *both = w.normed;  // [5M] what the user and the request add, which may differ between candidates
    const VistaTable &features = request.features;
    for (int r = 0; (request.added || features.values) && r < count; ++r) {
        if (r == 0 || (features.values && !request.features_per_user)) {
            memset(both, 0, 4 * (size_t)5 * dim);
            if (request.added) memcpy(both, request.added + user * 5 * dim, 4 * (size_t)5 * dim);
            if (features.values) add_features(request, feature_row(request, user, first + r), both);
        }
        add_both(r, both);
    }
    const int64_t from = place_of(request.counted, request.num_counted, first);
    const int64_t to = place_of(request.counted, request.num_counted, stop);
    const int columns = model.code_columns;
    for (int64_t n = from; n < to; ++n)
        for (int f = 0; f < columns; ++f) {
            const int64_t code = (int64_t)f * NUM_CODES + request.codes[n * (columns + 1) + f];
            add_both((int)(request.counted[n] - first), model.code_vectors + code * 5 * dim);
        }
    for (size_t i = 0; i < (size_t)rows * dim; i += W) store(w.x + i, load(w.x + i) * s.input_scale);
    pass(model, request.adapter, context, w, rows);
    float *out = request.logits + first * s.tasks;
    const float *bias = request.adapter ? request.adapter + (size_t)s.layers * dim : nullptr;
    for (int r = 0; r < count; ++r)
        for (int t = 0; t < s.tasks; ++t)
            out[r * s.tasks + t] = dot(w.normed + (size_t)r * dim, model.task_weight + (size_t)t * dim, dim) +
                                   (model.task_bias[t] + (bias ? bias[t] : 0.0f));
    Network head = model.candidate_head;
    if (bias && head.inputs) head.first_bias = bias + s.tasks, head.second_bias = head.first_bias + head.hidden;
    if (s.pooled ? head.inputs : from < to) {  // without pooled vectors, it adds to counted pairs alone
        const int inputs = head.inputs, codes = columns ? columns + 1 : 0, some = s.pooled ? count : (int)(to - from);
        float *in = w.parts, *added = w.scores;
        memset(in, 0, 4 * (size_t)rows * inputs);
        for (int r = 0; s.pooled && r < count; ++r) {
            float *at = in + (size_t)r * inputs;
            for (int f = 0; f < codes; ++f) *at++ = -2.0f;
            const int64_t row = row_of(request, user, first + r);
            copy_row(request.rates, row, copy_row(request.statistics, row, copy_cosines(s, request, user, row, at)));
        }
        auto place = [&](int64_t n) { return s.pooled ? request.counted[n] - first : n - from; };
        for (int64_t n = from; n < to; ++n) copy_codes(request.codes + n * codes, codes, in + place(n) * inputs);
        run_network(head, in, some, added, w);
        for (int n = 0; n < some; ++n) {
            const int64_t r = s.pooled ? n : request.counted[from + n] - first;
            for (int t = 0; t < s.tasks; ++t) out[r * s.tasks + t] += added[n * s.tasks + t];
        }
    }
    if (request.probabilities)  // in float64, as torch's path has them
        for (int i = 0; i < count * s.tasks; ++i) out[i] = (float)(1.0 / (1.0 + __builtin_exp(-(double)out[i])));
}

// Scores of the retrieval head of a user's pairs `first` to `stop`.
void scores(const VistaModel &model, const VistaRequest &request, int64_t user, int64_t first, int64_t stop,
            const Context &context, float *work) {
    const Sizes &s = model.sizes;
    const int columns = model.code_columns, inputs = model.counted_head.inputs;
    for (int64_t n = first; n < stop; ++n) {
        const int64_t row = row_of(request, user, n);
        float score = dot(request.retrieval.values + row * s.width, context.user, s.width) / s.temperature;
        if (s.recent) {
            const float *sums = sums_of(s, context, row), *weights = context.user + s.width - NUM_SUMS;
            score += weights[0] * sums[0] + weights[1] * sums[1];
        }
        request.scores[n] = score;
    }
    int64_t from = place_of(request.counted_next, request.num_counted_next, first);
    const int64_t to = place_of(request.counted_next, request.num_counted_next, stop);
    Work w(s, TILE, work);
    for (; from < to; from += TILE) {
        const int some = (int)(to - from < TILE ? to - from : TILE);
        float *in = w.parts, *out = w.own;
        memset(in, 0, 4 * (size_t)TILE * inputs);
        for (int n = 0; n < some; ++n) {
            const int64_t pair = request.counted_next[from + n], row = row_of(request, user, pair);
            float *at = copy_codes(request.codes_next + (from + n) * columns, columns, in + (size_t)n * inputs);
            *at++ = request.scores[pair] / 5.0f;
            at = copy_row(request.statistics, row, at);
            if (s.recent)
                for (int k = 0; k < NUM_SUMS; ++k) *at++ = sums_of(s, context, row)[k];
            at = copy_cosines(s, request, user, row, at);
            *at = request.event_counts[user];
        }
        run_network(model.counted_head, in, some, out, w);
        for (int n = 0; n < some; ++n) request.scores[request.counted_next[from + n]] = out[n] + context.gate;
    }
}

inline float half_at(const uint8_t *at) {  // IEEE 754 binary16, little-endian
    const uint32_t half = at[0] | (uint32_t)at[1] << 8, size = half & 0x7fff;
    uint32_t bits = size << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;  // moves the exponent, also of values below the smallest normal one
    memcpy(&bits, &value, 4);
    if (size >= 0x7c00) bits = 0x7f800000 | size << 13;
    bits |= (half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

inline float float_at(const uint8_t *at) {
    float value;
    memcpy(&value, at, 4);
    return value;
}

void dequantize(int codec, const uint8_t *rows, int64_t count, int dim, float *out) {
    if (codec == FLOAT32) {
        if (count) memcpy(out, rows, 4 * (size_t)count * dim);
        return;
    }
    if (codec == FLOAT16) {
        for (int64_t i = 0; i < count * dim; ++i) out[i] = half_at(rows + 2 * i);
        return;
    }
    const bool bytes = codec == INT8;
    const int width = bytes ? dim : (dim + 1) / 2;
    for (int64_t row = 0; row < count; ++row, rows += width + (bytes ? 8 : 4), out += dim) {
        const uint8_t *ends = rows + width;
        const float scale = bytes ? float_at(ends) : half_at(ends);
        const float bias = bytes ? float_at(ends + 4) : half_at(ends + 2);
        // Rounded once, as FBGEMM does where there is a fused multiply-add.
        if (bytes)
            for (int i = 0; i < dim; ++i) out[i] = __builtin_fmaf((float)rows[i], scale, bias);
        else
            for (int i = 0; i < dim; ++i) out[i] = __builtin_fmaf((float)(rows[i / 2] >> 4 * (i % 2) & 15), scale, bias);
    }
}
}  // namespace

#ifdef VISTA_BFLOAT16
#define NAME_OF(lanes) kernels_of_##lanes##_lanes_in_bfloat16
#else
#define NAME_OF(lanes) kernels_of_##lanes##_lanes
#endif
#define NAME(lanes) NAME_OF(lanes)
extern const Kernels NAME(VISTA_LANES) = {W, ROWS, PAIRED, context, user_vector, logits, scores, dequantize};
