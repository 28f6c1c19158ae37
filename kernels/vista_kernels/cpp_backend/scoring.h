// What callers pass to the library (plain C, float32, row-major) and what its parts share. `library.py` mirrors the
// first part with ctypes.
//
// Letters: B users, N pairs of a user and a candidate, C candidates that all users share, S summary tokens, L events of
// the tail, M model dim, H heads, D head dim, F width of the feed-forward network, M' width of retrieval vectors, J
// pooled vectors of r numbers, Z statistics of each item.
#pragma once
#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {
struct VistaLayer {
    const float *norm;         // [M]
    const float *projections;  // [4M, M]: query, gate, key, value
    const float *bias;         // [H, L+1] by distance
    const float *head_norm;    // [M] for pointwise layers, [D] for softmax layers
    const float *out;          // [M, M]
    const float *feed_norm;    // [M]; it and the next two only for softmax layers
    const float *up;           // [2F, M]
    const float *down;         // [M, F]
};

struct VistaNetwork {           // inputs -> hidden -> hidden -> outputs, with SiLU in between
    const float *first;         // [hidden, inputs]
    const float *first_bias;    // [hidden]
    const float *second;        // [hidden, hidden]
    const float *second_bias;   // [hidden]
    const float *last;          // [outputs, hidden]
    int32_t inputs, hidden, outputs;
};

struct VistaPlan {
    int32_t bfloat16;           // 1: round factors of products to bfloat16 where the processor multiplies them
    int32_t softmax;            // 1: softmax layers; 0: pointwise layers
    int32_t dim, heads, seeds, tail, num_layers, num_tasks, feed;  // M, H, S, L, …, F
    int32_t space, pooled, statistics;  // r, J, Z
    int32_t extra;              // M' - M - r: weights of statistics and of sums over followers
    int32_t recent, followers;  // newest items whose followers are summed, and followers per item; 0 without these sums
    float norm_eps, input_scale, temperature;
    float gain;                 // scale of the unit vectors with which user vectors begin
    const VistaLayer *layers;   // [num_layers]
    const float *summary_norm;  // [M]
    const float *summary_kind;  // [S, M]
    const float *final_norm;    // [M]
    const float *task_weight;   // [num_tasks, M]
    const float *task_bias;     // [num_tasks]
    const float *actions;       // [num_actions, M]; null if events have no action
    const float *gaps;          // [num_gaps, M]; null if events have no gap
    int32_t num_actions, num_gaps;
    const float *request;       // [M] the retrieval head's query token
    const float *wide_weight;   // [extra + J, M]: weights of a user are linear functions of the first M entries
    const float *wide_bias;     // [extra + J]
    const float *decay;         // [recent] weights of the newest items, the newest first
    const float *gate_weight;   // [M]; null without counters
    float gate_bias;
    const float *code_vectors;  // [code_columns * 64, 5M]; null unless counters are added to candidates
    int32_t code_columns;       // codes per counted pair, without that of the number of events
    VistaNetwork candidate_head;  // adds to logits; it reads codes, cosines, statistics, and rates; no inputs without
    VistaNetwork counted_head;  // scores counted items; no inputs without counters
};

struct VistaTable {
    const float *values;        // [rows, width]; null if there is none
    int64_t rows, width;
};

struct VistaRequest {
    int64_t users;              // B
    const float *summary;       // [B, S, M]
    VistaTable vectors;         // its first M columns are the vectors of items
    const int64_t *items;       // [B, L] rows of `vectors`; null if `events` has all of the tail
    const int64_t *actions;     // [B, L]
    const int64_t *gaps;        // [B, L]
    const uint8_t *valid;       // [B, L]
    const float *events;        // [B, L, M] to add to the tail's embeddings; null adds nothing
    const float *added;         // [B, 5M] to add to queries and their projections; null adds nothing
    const int64_t *offsets;     // [B + 1]: user b's pairs are offsets[b] to offsets[b + 1]
    const int64_t *rows;        // [N], or [C] if they are shared; null stands for 0, 1, …
    int32_t shared;             // all users have the same C candidates
    VistaTable candidates;      // width 5M: vectors and projections; width M: projections are computed
    VistaTable retrieval;       // width M'
    VistaTable space;           // width r: of items; it and the next two have no rows where nothing reads them
    VistaTable statistics;      // width Z
    VistaTable rates;           // width num_tasks
    const float *pooled;        // [B, J, r]
    const int64_t *recent;      // [B, recent] rows of the newest items, the newest first; 0 pads
    const int32_t *follower_items;  // [follower_weights.rows, followers] rows of items; 0 pads
    VistaTable follower_weights;  // width `followers`
    VistaTable features;        // width 5M; of each pair, the rows below are added up
    int32_t features_per_user;  // all pairs of user b have entries feature_first[b]; otherwise its first pair has
    const int64_t *feature_first;   // [B]
    const int64_t *entries;     // [feature_rows, num_entries] rows of `features`
    const float *dense;         // [feature_rows, num_dense] factors of the last `num_dense` rows of `features`
    int64_t feature_rows;
    int32_t num_entries, num_dense;
    int64_t num_counted;        // pairs that are counted
    const int64_t *counted;     // [num_counted] pairs 0 … N - 1, ascending
    const uint8_t *codes;       // [num_counted, code_columns + 1]
    int64_t num_counted_next;   // the same for the retrieval head: pairs whose item itself is counted
    const int64_t *counted_next;
    const uint8_t *codes_next;  // [num_counted_next, code_columns]
    const float *event_counts;  // [B] log1p(number of events) - 6
    const float *adapter;       // [num_layers, M] to add to queries after each layer, [num_tasks] to add to logits, and
                                // both biases of the candidate head, if there is one; null keeps the plan's
    int32_t probabilities;      // give the sigmoid of logits instead
    float *logits;              // out: [N, num_tasks]; null if not wanted
    float *scores;              // out: [N] of the retrieval head; null if not wanted
    float *user_vectors;        // out: [B, M'] of the retrieval head; null if not wanted
};

struct VistaModel;
// The sizes of the two structures above, by which a caller finds out that it was written for other ones.
int64_t vista_layout(void);
// Copies the plan. Null if the library has no code for `lanes` (0: the most that fit), or no memory.
VistaModel *vista_new(const VistaPlan *, int32_t lanes);
void vista_delete(VistaModel *);
int32_t vista_lanes(const VistaModel *);
int32_t vista_bfloat16(const VistaModel *);  // whether it rounds to bfloat16
// The result is 0, or one of the errors below. Nothing is written outside the outputs, whatever the indices are.
int32_t vista_score(const VistaModel *, const VistaRequest *, int32_t threads);
}
#pragma GCC visibility pop

enum VistaError {
    FINE = 0,
    NO_MEMORY = 1,
    BAD_CANDIDATE = 2,
    BAD_EVENT = 3,
    BAD_FEATURE = 4,
    BAD_COUNTED = 5,
    NOT_ACCEPTED = 6  // a record (answering.h)
};

// What follows is shared by `library.cpp` and by `lanes.cpp`, which is compiled once per width of vectors. So it holds
// no function that could be compiled twice: the linker keeps one copy, which another processor might not run.

constexpr int TILE = 48;  // candidates at once: their tokens stay in the cache; a multiple of all `rows` below
constexpr float MASKED = -1e9f;
constexpr int NUM_CODES = 64;
constexpr int NUM_SUMS = 2;  // of followers: of the newest item, and of the others
// Rounded to the nearest, and half to even; NaN stays NaN.
static inline uint16_t bfloat16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (value != value) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
enum Codec { FLOAT32 = 0, INT8 = 1, FLOAT16 = 2, INT4 = 3 };  // of rows in records

struct Network {
    const float *first, *first_bias, *second, *second_bias, *last;  // first and second are packed
    int inputs, hidden, outputs;
};

struct Layer {
    const float *norm, *projections, *own_bias, *head_norm, *out, *feed_norm, *up, *down;  // matrices are packed
    const float *query_bias;  // [H, padded]
    const float *mask;        // [H, S+L, padded]: what a token of the context may see; null in the last layer
};

struct Sizes {
    int dim, heads, head_dim, seeds, tail, tokens, padded, feed, layers, tasks;  // padded >= tokens
    int space, pooled, statistics, extra, width;  // width is M'
    int recent, followers, slots;  // slots of a hash table of followers: a power of 2, half of which stay empty
    int parts, scores, hidden, pairs;  // columns of scratch memory: at least 4M, `padded`, and 2F; and pairs of values
    bool softmax;
    float norm_eps, input_scale, score_scale, temperature, gain;
};

struct Context {              // of one user
    float *keys;              // [layers, H, D, padded]
    float *values;            // [layers, H, padded, D]
    float *bias;              // [layers, H, padded] of queries
    float *tail;              // [L, M]
    float *user;              // [M'] retrieval vector
    int32_t *followers;       // [slots] rows of items; 0 is empty
    float *sums;              // [slots, NUM_SUMS]; unset where empty
    float gate;               // what it adds to scores of counted items
};

struct Kernels {
    int lanes, rows;
    bool in_bfloat16;
    void (*context)(const VistaModel &, const VistaRequest &, int64_t user, Context &, float *work);
    void (*user_vector)(const VistaModel &, const VistaRequest &, int64_t user, Context &, float *work);
    void (*logits)(const VistaModel &, const VistaRequest &, int64_t user, int64_t first, int64_t stop, const Context &,
                   float *work);
    void (*scores)(const VistaModel &, const VistaRequest &, int64_t user, int64_t first, int64_t stop, const Context &,
                   float *work);
    // Rows of a record -> [count, dim].
    void (*dequantize)(int codec, const uint8_t *rows, int64_t count, int dim, float *out);
};

const Kernels &widest_kernels();
extern const Kernels kernels_of_4_lanes, kernels_of_8_lanes, kernels_of_16_lanes, kernels_of_16_lanes_in_bfloat16;

struct VistaModel {
    Sizes sizes;
    const Kernels *kernels;
    Layer *layers;
    const float *summary_norm, *summary_kind, *final_norm, *task_weight, *task_bias, *actions, *gaps, *request,
        *wide_weight, *wide_bias, *decay, *gate_weight, *code_vectors;
    int num_actions, num_gaps, code_columns;
    float gate_bias;
    Network candidate_head, counted_head;
    void *owned;
};
