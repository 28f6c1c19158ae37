// The library's functions: they copy weights, check indices, and share users and candidates out to threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "scoring.h"

namespace {
constexpr int TOKENS_AT_ONCE = 1024;      // of users whose keys and values fit a cache
constexpr double FLOPS_PER_THREAD = 2e7;  // half a millisecond, against 30 µs for starting a thread
constexpr int64_t SCORES_AT_ONCE = 4096;

struct Free {
    void operator()(float *memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], Free>;

size_t aligned(size_t count) { return (count + 15) / 16 * 16; }

Floats floats(size_t count) {
    void *memory = std::aligned_alloc(64, 4 * aligned(std::max<size_t>(count, 1)));
    if (!memory) throw std::bad_alloc();
#ifdef VISTA_POISON  // for tests: what is read before it is written makes every result NaN
    std::fill_n(static_cast<float *>(memory), aligned(std::max<size_t>(count, 1)),
                std::numeric_limits<float>::quiet_NaN());
#endif
    return Floats(static_cast<float *>(memory));
}

// [outputs, inputs] -> panels of two vectors of outputs, [inputs, 2 * lanes] each; the last may be of one vector.
void pack_into(float *own, const float *values, int outputs, int inputs, int lanes) {
    for (int n = 0; n < outputs;) {
        const int width = n + 2 * lanes <= outputs ? 2 * lanes : lanes;
        for (int k = 0; k < inputs; ++k)
            for (int j = 0; j < width; ++j)
                own[size_t(n) * inputs + size_t(k) * width + j] = values[size_t(n + j) * inputs + k];
        n += width;
    }
}

// The same; in bfloat16, 32 bits hold two neighboring inputs, the first in the lower half.
void pack_into(float *own, const float *values, int outputs, int inputs, const Kernels &kernels) {
    if (!kernels.in_bfloat16) return pack_into(own, values, outputs, inputs, kernels.lanes);
    std::vector<float> pairs(size_t(outputs) * (inputs / 2));
    for (size_t i = 0; i < pairs.size(); ++i) {
        const uint16_t both[] = {bfloat16(values[2 * i]), bfloat16(values[2 * i + 1])};
        std::memcpy(&pairs[i], both, 4);
    }
    pack_into(own, pairs.data(), outputs, inputs / 2, kernels.lanes);
}

struct Owned {
    std::vector<Floats> memory;
    std::vector<Layer> layers;

    float *take(size_t count) {
        memory.push_back(floats(count));
        return memory.back().get();
    }
    const float *copy(const float *values, size_t count) {
        if (!values) return nullptr;
        float *own = take(count);
        std::copy_n(values, count, own);
        return own;
    }
    template <typename Form>  // number of lanes for float32, or the kernels that choose
    const float *pack(const float *values, int outputs, int inputs, const Form &form) {
        float *own = take(size_t(outputs) * inputs);
        pack_into(own, values, outputs, inputs, form);
        return own;
    }
    // [4M, M]: query, gate, key and value, each packed by itself.
    const float *pack_parts(const float *values, int dim, const Kernels &kernels) {
        const size_t size = size_t(dim) * dim, of_part = kernels.in_bfloat16 ? size / 2 : size;
        float *own = take(4 * of_part);
        for (int part = 0; part < 4; ++part) pack_into(own + part * of_part, values + part * size, dim, dim, kernels);
        return own;
    }
    Network pack(const VistaNetwork &net, int lanes) {
        if (!net.inputs) return {};
        return {pack(net.first, net.hidden, net.inputs, lanes), copy(net.first_bias, net.hidden),
                pack(net.second, net.hidden, net.hidden, lanes), copy(net.second_bias, net.hidden),
                copy(net.last, size_t(net.outputs) * net.hidden), net.inputs, net.hidden, net.outputs};
    }
};

const Kernels *kernels_of(int head_dim, int lanes, bool in_bfloat16) {
    const Kernels *found = nullptr;
    auto offer = [&](const Kernels &kernels) {
        if (head_dim % kernels.lanes == 0 && (lanes == 0 || lanes == kernels.lanes)) found = &kernels;
    };
    offer(kernels_of_4_lanes);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) offer(kernels_of_8_lanes);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw")) {
        offer(kernels_of_16_lanes);
        if (in_bfloat16 && __builtin_cpu_supports("avx512bf16")) offer(kernels_of_16_lanes_in_bfloat16);
    }
#endif
    return found;
}

}  // namespace

const Kernels &widest_kernels() {
    static const Kernels &found = *kernels_of(16, 0, false);
    return found;
}

namespace {
// Biases of queries that see the whole tail, and what tokens of the context may see; bias [H, L+1] is by distance.
void lay_out_bias(const Sizes &s, const float *bias, bool last, Owned &owned, Layer &layer) {
    const int tail = s.tail, heads = s.heads;
    auto at = [&](int h, int distance) { return bias[h * (tail + 1) + distance]; };
    float *own = owned.take(heads), *query = owned.take(size_t(heads) * s.padded);
    float *mask = last ? nullptr : owned.take(size_t(heads) * s.tokens * s.padded);
    std::fill_n(query, size_t(heads) * s.padded, 0.0f);
    for (int h = 0; h < heads; ++h) {
        own[h] = at(h, 0);
        for (int c = 0; c < tail; ++c) query[h * s.padded + s.seeds + c] = at(h, tail - c);
        for (int t = 0; t < s.tokens && mask; ++t)
            for (int j = 0; j < s.padded; ++j) {
                const int distance = t - j;
                float value = j < s.seeds ? 0.0f : MASKED;
                if (t >= s.seeds && j >= s.seeds && distance >= 0) value = at(h, distance);
                mask[(size_t(h) * s.tokens + t) * s.padded + j] = value;
            }
    }
    layer.own_bias = own, layer.query_bias = query, layer.mask = mask;
}

std::unique_ptr<Owned> fill(VistaModel &model, const VistaPlan &p, const Kernels &kernels) {
    auto owned = std::make_unique<Owned>();
    const int lanes = kernels.lanes, dim = p.dim, tokens = p.seeds + p.tail;
    Sizes &s = model.sizes;
    s = {};
    s.dim = dim, s.heads = p.heads, s.head_dim = dim / p.heads, s.seeds = p.seeds, s.tail = p.tail, s.tokens = tokens;
    s.padded = (tokens + lanes - 1) / lanes * lanes;
    s.feed = p.softmax ? p.feed : 0, s.layers = p.num_layers, s.tasks = p.num_tasks, s.softmax = p.softmax;
    s.space = p.space, s.pooled = p.pooled, s.statistics = p.statistics, s.extra = p.extra;
    s.width = dim + p.space + p.extra;
    s.recent = p.recent, s.followers = p.followers;
    for (s.slots = 1; s.slots < 2 * p.recent * p.followers;) s.slots *= 2;
    s.norm_eps = p.norm_eps, s.input_scale = p.input_scale, s.gain = p.gain;
    s.score_scale = p.softmax ? 1.0f / std::sqrt(float(s.head_dim)) : 1.0f;
    s.temperature = p.temperature;
    s.parts = std::max({4 * dim, p.candidate_head.inputs, p.counted_head.inputs});
    s.scores = std::max(s.padded, p.num_tasks);
    s.pairs = kernels.in_bfloat16 ? std::max({dim, s.padded, s.feed}) / 2 : 0;
    s.hidden = std::max({2 * s.feed, 2 * p.candidate_head.hidden, 2 * p.counted_head.hidden});
    for (int l = 0; l < p.num_layers; ++l) {
        const VistaLayer &given = p.layers[l];
        Layer &layer = owned->layers.emplace_back();
        layer.norm = owned->copy(given.norm, dim);
        layer.projections = owned->pack_parts(given.projections, dim, kernels);
        layer.head_norm = owned->copy(given.head_norm, p.softmax ? s.head_dim : dim);
        layer.out = owned->pack(given.out, dim, dim, kernels);
        if (p.softmax) {
            layer.feed_norm = owned->copy(given.feed_norm, dim);
            layer.up = owned->pack(given.up, 2 * p.feed, dim, kernels);
            layer.down = owned->pack(given.down, dim, p.feed, kernels);
        }
        lay_out_bias(s, given.bias, l == p.num_layers - 1, *owned, layer);
    }
    model.kernels = &kernels;
    model.layers = owned->layers.data();
    model.summary_norm = owned->copy(p.summary_norm, dim);
    model.summary_kind = owned->copy(p.summary_kind, size_t(p.seeds) * dim);
    model.final_norm = owned->copy(p.final_norm, dim);
    model.task_weight = owned->copy(p.task_weight, size_t(p.num_tasks) * dim);
    model.task_bias = owned->copy(p.task_bias, p.num_tasks);
    model.actions = owned->copy(p.actions, size_t(p.num_actions) * dim);
    model.gaps = owned->copy(p.gaps, size_t(p.num_gaps) * dim);
    model.request = owned->copy(p.request, dim);
    model.wide_weight = owned->copy(p.wide_weight, size_t(p.extra + p.pooled) * dim);
    model.wide_bias = owned->copy(p.wide_bias, p.extra + p.pooled);
    model.decay = owned->copy(p.decay, p.recent);
    model.gate_weight = owned->copy(p.gate_weight, dim);
    model.gate_bias = p.gate_bias;
    model.num_actions = p.num_actions, model.num_gaps = p.num_gaps;
    model.code_columns = p.code_columns;
    model.code_vectors = owned->copy(p.code_vectors, size_t(p.code_columns) * NUM_CODES * 5 * dim);
    model.candidate_head = owned->pack(p.candidate_head, lanes);
    model.counted_head = owned->pack(p.counted_head, lanes);
    return owned;
}

bool all_below(const int64_t *values, int64_t count, int64_t limit) {
    if (!values) return true;
    uint64_t largest = 0;
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, uint64_t(values[i]));
    return count == 0 || largest < uint64_t(limit);
}

bool codes_fit(const uint8_t *codes, int64_t count, int columns, int used) {
    for (int64_t i = 0; i < count; ++i)
        for (int f = 0; f < used; ++f)
            if (codes[i * columns + f] >= NUM_CODES) return false;
    return true;
}

bool ascending(const int64_t *pairs, int64_t count, int64_t limit) {
    int64_t before = -1;
    for (int64_t i = 0; i < count; before = pairs[i++])
        if (pairs[i] <= before || pairs[i] >= limit) return false;
    return true;
}

VistaError check(const VistaModel &m, const VistaRequest &r) {
    const Sizes &s = m.sizes;
    const int64_t pairs = r.offsets[r.users], events = r.users * s.tail;
    int64_t longest = 0;
    for (int64_t b = 0; b < r.users; ++b) longest = std::max(longest, r.offsets[b + 1] - r.offsets[b]);
    if (r.logits || r.scores) {
        int64_t limit = INT64_MAX;
        for (const VistaTable *table : {&r.candidates, &r.retrieval, &r.space, &r.statistics, &r.rates})
            if (table->values) limit = std::min(limit, table->rows);
        if (r.rows ? !all_below(r.rows, r.shared ? longest : pairs, limit) : longest > limit) return BAD_CANDIDATE;
    }
    if (r.items && !all_below(r.items, events, r.vectors.rows)) return BAD_EVENT;
    if (r.recent && !all_below(r.recent, r.users * s.recent, r.follower_weights.rows)) return BAD_EVENT;
    if (r.items && m.actions && !all_below(r.actions, events, m.num_actions)) return BAD_EVENT;
    if (r.items && m.gaps && !all_below(r.gaps, events, m.num_gaps)) return BAD_EVENT;
    if (r.features.values) {
        if (!all_below(r.entries, r.feature_rows * r.num_entries, r.features.rows)) return BAD_FEATURE;
        for (int64_t b = 0; b < r.users; ++b) {
            const int64_t own = r.offsets[b + 1] - r.offsets[b], rows = r.features_per_user ? own > 0 : own;
            if (r.feature_first[b] < 0 || r.feature_first[b] + rows > r.feature_rows) return BAD_FEATURE;
        }
    }
    if (!ascending(r.counted, r.num_counted, pairs) || !ascending(r.counted_next, r.num_counted_next, pairs))
        return BAD_COUNTED;
    const int columns = m.code_columns;
    if (!codes_fit(r.codes, r.num_counted, columns + 1, columns)) return BAD_COUNTED;
    return FINE;
}

// Calls work(index, thread) for 0 … count - 1, by up to `threads` threads.
template <typename Work>
void share_out(int threads, int64_t count, const Work &work) {
    std::atomic<int64_t> next{0};
    auto run = [&](int thread) {
        for (int64_t index; (index = next.fetch_add(1)) < count;) work(index, thread);
    };
    std::vector<std::thread> others;
    try {
        others.reserve(std::min<int64_t>(threads, count));  // so that adding one cannot fail while others run
        while (int(others.size()) + 1 < std::min<int64_t>(threads, count)) others.emplace_back(run, others.size() + 1);
    } catch (const std::system_error &) {  // The system has no more threads: those that there are do it.
    }
    run(0);
    for (std::thread &thread : others) thread.join();
}

struct Share {  // of one user's pairs
    int64_t user, first, stop;
};

void score_users(const VistaModel &model, const VistaRequest &request, int64_t begin, int64_t end, int threads,
                 const std::vector<Context> &contexts, const std::vector<float *> &work) {
    const Kernels &kernels = *model.kernels;
    const bool wants_user = request.scores || request.user_vectors;
    share_out(threads, end - begin, [&](int64_t index, int thread) {
        Context &context = const_cast<Context &>(contexts[index]);
        kernels.context(model, request, begin + index, context, work[thread]);
        if (!wants_user) return;
        kernels.user_vector(model, request, begin + index, context, work[thread]);
        const int width = model.sizes.width;
        if (request.user_vectors) std::copy_n(context.user, width, request.user_vectors + (begin + index) * width);
    });
    for (const bool labeled : {true, false}) {
        if (!(labeled ? request.logits : request.scores)) continue;
        const int64_t size = labeled ? TILE : SCORES_AT_ONCE;
        std::vector<Share> shares;
        for (int64_t user = begin; user < end; ++user)
            for (int64_t first = request.offsets[user]; first < request.offsets[user + 1]; first += size)
                shares.push_back({user, first, std::min(first + size, request.offsets[user + 1])});
        share_out(threads, int64_t(shares.size()), [&](int64_t index, int thread) {
            const Share &share = shares[index];
            (labeled ? kernels.logits : kernels.scores)(model, request, share.user, share.first, share.stop,
                                                        contexts[share.user - begin], work[thread]);
        });
    }
}

void score(const VistaModel &model, const VistaRequest &request, int threads) {
    const Sizes &s = model.sizes;
    const double dim = s.dim, tokens = double(request.users) * s.tokens;
    const double pairs = request.logits ? double(request.offsets[request.users]) : 0.0;
    const double flops = (tokens + pairs) * s.layers * dim * (2 * (5 + (s.softmax ? 6 : 0)) * dim + 4 * s.tokens);
    threads = std::max(1, int(std::min<double>(threads, flops / FLOPS_PER_THREAD)));
    const int64_t at_once = std::min<int64_t>(request.users, std::max(threads, TOKENS_AT_ONCE / std::max(1, s.tokens)));
    const size_t rows = std::max(TILE, (s.tokens + model.kernels->rows) / model.kernels->rows * model.kernels->rows);
    const size_t columns = size_t(s.parts) + s.scores + s.hidden + s.pairs + 3 * size_t(s.dim) + 1;
    const size_t of_thread = aligned(rows * columns) + 16 * 9;
    const size_t of_layers = aligned(size_t(s.layers) * s.padded * s.dim);
    const size_t of_bias = aligned(size_t(s.layers) * s.heads * s.padded), of_tail = aligned(size_t(s.tail) * s.dim);
    const size_t of_slots = aligned(s.slots), of_sums = aligned(size_t(s.slots) * NUM_SUMS);
    const size_t of_user = 2 * of_layers + of_bias + of_tail + aligned(s.width) + of_slots + of_sums;
    const Floats memory = floats(threads * of_thread + at_once * of_user);
    std::vector<float *> work;
    std::vector<Context> contexts;
    float *at = memory.get();
    for (int thread = 0; thread < threads; ++thread, at += of_thread) work.push_back(at);
    for (int64_t user = 0; user < at_once; ++user, at += of_user) {
        float *tail = at + 2 * of_layers + of_bias, *vector = tail + of_tail, *sums = vector + aligned(s.width);
        int32_t *followers = reinterpret_cast<int32_t *>(sums + of_sums);
        contexts.push_back({at, at + of_layers, at + 2 * of_layers, tail, vector, followers, sums, 0.0f});
    }
    for (int64_t begin = 0; begin < request.users; begin += at_once)
        score_users(model, request, begin, std::min(begin + at_once, request.users), threads, contexts, work);
}
}  // namespace

extern "C" {
int64_t vista_layout(void) { return int64_t(sizeof(VistaPlan)) << 32 | int64_t(sizeof(VistaRequest)); }

VistaModel *vista_new(const VistaPlan *plan, int32_t lanes) try {
    const Kernels *kernels = kernels_of(plan->dim / plan->heads, lanes, plan->bfloat16);
    if (!kernels) return nullptr;
    auto model = std::make_unique<VistaModel>();
    model->owned = fill(*model, *plan, *kernels).release();
    return model.release();
} catch (const std::bad_alloc &) {
    return nullptr;
}

void vista_delete(VistaModel *model) {
    if (model) delete static_cast<Owned *>(model->owned);
    delete model;
}

int32_t vista_lanes(const VistaModel *model) { return model->kernels->lanes; }

int32_t vista_bfloat16(const VistaModel *model) { return model->kernels->in_bfloat16; }

int32_t vista_score(const VistaModel *model, const VistaRequest *request, int32_t threads) try {
    const VistaError error = check(*model, *request);
    if (error == FINE && request->users) score(*model, *request, threads);
    return error;
} catch (const std::bad_alloc &) {
    return NO_MEMORY;
}
}
