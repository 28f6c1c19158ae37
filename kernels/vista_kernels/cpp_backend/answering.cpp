// One user's request from the bytes of the record to the scores (answering.h): checks and decodes the record, and lays
// out what `vista_score` reads. Compiled without fused multiply-adds, so that its float64 values are those of NumPy.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "answering.h"

namespace {
int64_t difference(int64_t later, int64_t earlier) { return int64_t(uint64_t(later) - uint64_t(earlier)); }

// `gap_bucket` of vista/log/histories.py.
int64_t gap_bucket(int64_t gap_ms, int64_t num_gaps) {
    const double seconds = double(std::max<int64_t>(gap_ms, 0)) / 1000.0;
    return std::min<int64_t>(1 + std::ilogb(1.0 + seconds), num_gaps - 1);
}

// The sum of squares in the order in which NumPy adds up.
double sum_of_squares(const double *values, int64_t count) {
    if (count < 8) {
        double total = 0.0;
        for (int64_t i = 0; i < count; ++i) total += values[i] * values[i];
        return total;
    }
    if (count > 128) {
        const int64_t half = count / 2 - count / 2 % 8;
        return sum_of_squares(values, half) + sum_of_squares(values + half, count - half);
    }
    double sums[8];
    for (int j = 0; j < 8; ++j) sums[j] = values[j] * values[j];
    int64_t i = 8;
    for (; i < count - count % 8; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += values[i + j] * values[i + j];
    double total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < count; ++i) total += values[i] * values[i];
    return total;
}

void to_unit(const std::vector<double> &sums, float *out) {
    const double length = std::sqrt(sum_of_squares(sums.data(), int64_t(sums.size())));
    for (size_t i = 0; i < sums.size(); ++i) out[i] = float(sums[i] / (length == 0 ? 1.0 : length));
}

struct Record {
    std::vector<float> summary;
    std::vector<std::vector<int32_t>> keys;
    std::vector<std::vector<uint8_t>> codes;
    std::vector<int32_t> items;
    std::vector<int64_t> times;
    std::vector<uint8_t> actions;
};

bool decode(const VistaRecordLayout &layout, const uint8_t *record, int64_t length, const uint8_t *checksum,
            const uint8_t *key_hash, Record &out) {
    int64_t sizes[MOST_FIELDS + 1];
    const int64_t starts[] = {0, length};
    if (length < HEADER || vista_check_records(&layout, record, starts, 1, record, checksum, key_hash, sizes) != 1)
        return false;
    const size_t events = size_t(sizes[layout.num_fields]);
    out.summary.resize(size_t(layout.tokens) * layout.dim);
    out.items.resize(events), out.times.resize(events), out.actions.resize(events);
    std::vector<int32_t *> keys;
    std::vector<uint8_t *> codes;
    for (int f = 0; f < layout.num_fields; ++f) {
        out.keys.emplace_back(sizes[f]), out.codes.emplace_back(sizes[f] * layout.values);
        keys.push_back(out.keys.back().data()), codes.push_back(out.codes.back().data());
    }
    // Features are checked, and not read: models that read them get them from Python.
    std::vector<uint32_t> features(layout.num_user + layout.num_tail * events);
    std::vector<void *> user, tail;
    for (int i = 0; i < layout.num_user; ++i) user.push_back(features.data() + i);
    for (int i = 0; i < layout.num_tail; ++i) tail.push_back(features.data() + layout.num_user + i * events);
    const VistaRecordArrays arrays = {out.summary.data(), user.data(),      keys.data(),        codes.data(),
                                      out.items.data(),   out.times.data(), out.actions.data(), tail.data()};
    return vista_decode_records(&layout, record, starts, 1, sizes, &arrays) == 1;
}

// Where the keys of one field are.
class Places {
   public:
    explicit Places(const std::vector<int32_t> &keys) : keys_(keys) {
        size_t size = 1;
        while (size < 4 * keys.size() + 1) size *= 2;
        slots_.assign(size, 0);
        for (size_t i = 0; i < keys.size(); ++i) {
            size_t slot = first(keys[i]);
            while (slots_[slot]) slot = (slot + 1) & (size - 1);
            slots_[slot] = int32_t(i) + 1;
        }
    }
    int find(int64_t key) const {  // -1 if it is not counted
        for (size_t slot = first(key); slots_[slot]; slot = (slot + 1) & (slots_.size() - 1))
            if (keys_[slots_[slot] - 1] == key) return slots_[slot] - 1;
        return -1;
    }

   private:
    size_t first(int64_t key) const { return uint32_t(key) * 2654435769u >> 7 & (slots_.size() - 1); }
    const std::vector<int32_t> &keys_;
    std::vector<int32_t> slots_;
};

uint8_t code_of(double value, double resolution, double factor) {
    return uint8_t(std::min(std::rint(std::log1p(value / resolution) * factor), 63.0));
}

// Codes of counters as of a request, in the form that the heads read.
class Counted {
   public:
    Counted(const VistaAnswering &a, const Record &record, int64_t elapsed)
        : a_(a), record_(record), elapsed_(elapsed) {
        for (int f = 0; f < a.num_fields; ++f) places_.emplace_back(record.keys[f]);
        for (int day = 0; day < a.num_days; ++day)
            decay_.push_back(std::exp2(-double(elapsed) / double(a.half_lives[day])));
    }
    int item_at(int64_t row) const { return places_[0].find(row); }
    // Codes of all fields of a row -> [num_fields * columns]; whether one of them counts it.
    bool copy(int64_t row, uint8_t *out) const {
        bool any = false;
        for (int f = 0; f < a_.num_fields; ++f, out += a_.columns) {
            const int64_t key = f == 0 ? row : a_.keys[f - 1][row];
            const int at = key == 0 ? -1 : places_[f].find(key);
            if (at < 0) std::memset(out, 0, a_.columns);
            else copy_entry(record_.codes[f].data() + size_t(at) * a_.columns, out);
            any |= at >= 0;
        }
        return any;
    }

   private:
    void copy_entry(const uint8_t *codes, uint8_t *out) const {
        const int last = a_.columns - 1;
        std::memcpy(out, codes, a_.columns);
        if (elapsed_ == 0) return;
        auto value = [&](int column) { return a_.levels[codes[column] * a_.columns + column]; };
        auto code = [&](double x, int column) { return code_of(x, a_.resolution[column], a_.factor[column]); };
        for (int day = 0; day < a_.num_days; ++day) out[1 + day] = code(value(1 + day) * decay_[day], 1 + day);
        if (a_.has_time) out[last] = code(value(last) + double(elapsed_) / 1000.0, last);
    }
    const VistaAnswering &a_;
    const Record &record_;
    const int64_t elapsed_;
    std::vector<Places> places_;
    std::vector<double> decay_;
};
}  // namespace

extern "C" int32_t vista_answer(const VistaAnswering *answering, const uint8_t *bytes, int64_t length,
                                const uint8_t *checksum, const uint8_t *key_hash, int64_t now, int32_t has_now,
                                const int64_t *rows, int64_t count, const VistaRequest *asked, const float *adapter,
                                int32_t probabilities, float *logits, float *scores, int32_t threads) try {
    const VistaAnswering &a = *answering;
    const Sizes &s = a.model->sizes;
    Record record;
    if (!decode(*a.layout, bytes, length, checksum, key_hash, record)) return NOT_ACCEPTED;
    const auto newest = int64_t(number_at(bytes + NEWEST_EVENT, 8));
    const auto event_count = int64_t(number_at(bytes + EVENT_COUNT, 8));
    if (event_count < 0) return NOT_ACCEPTED;
    VistaRequest request = *a.tables;
    auto outside = [&](int64_t row) { return row < 0 || row >= a.num_rows; };
    if (std::any_of(rows, rows + count, outside)) return BAD_CANDIDATE;
    if (std::any_of(record.items.begin(), record.items.end(), outside)) return BAD_EVENT;
    auto has_no_weight = [&](int64_t action) { return action < 0 || action >= a.num_actions; };
    if (a.weights && std::any_of(record.actions.begin(), record.actions.end(), has_no_weight)) return BAD_EVENT;

    std::vector<int64_t> items(s.tail), actions(s.tail), gaps(s.tail);
    std::vector<uint8_t> valid(s.tail);
    const int64_t num_events = int64_t(record.items.size()), used = std::min<int64_t>(num_events, s.tail);
    for (int64_t i = 0; i < used; ++i) {
        const int64_t from = num_events - used + i, at = s.tail - used + i;
        items[at] = record.items[from], actions[at] = record.actions[from], valid[at] = 1;
        if (!a.num_gaps || i == 0) continue;
        gaps[at] = gap_bucket(difference(record.times[from], record.times[from - 1]), a.num_gaps);
    }
    request.summary = record.summary.data();
    request.items = items.data(), request.actions = actions.data(), request.gaps = gaps.data();
    request.valid = valid.data();
    if (a.times) {
        const bool known = has_now && num_events;
        const int64_t gap = known ? gap_bucket(difference(now, record.times[num_events - 1]), a.num_gaps) : 0;
        request.added = a.times + gap * 5 * s.dim;
    }

    std::vector<float> pooled(size_t(s.pooled) * s.space);
    if (s.pooled) {
        const float *mean = record.summary.data() + size_t(a.layout->tokens - 1) * a.layout->dim;
        std::vector<double> all(s.space), recent(s.space);
        for (int i = 0; i < s.space; ++i) all[i] = double(mean[i]) * double(event_count);
        for (int64_t at = std::max(s.tail - a.num_pooled, 0); at < s.tail; ++at) {
            const float weight = a.weights ? a.weights[items[at] * a.num_actions + actions[at]] : 1.0f;
            const float *vector = request.space.values + items[at] * s.space;
            for (int i = 0; i < s.space; ++i) recent[i] += double(vector[i] * weight);
        }
        to_unit(all, pooled.data()), to_unit(recent, pooled.data() + s.space);
        request.pooled = pooled.data();
    }
    std::vector<int64_t> newest_items(s.recent);
    for (int j = 0; j < s.recent; ++j) newest_items[j] = items[s.tail - 1 - j];
    if (s.recent) request.recent = newest_items.data();

    std::vector<int64_t> counted, counted_next;
    std::vector<uint8_t> codes, codes_next;
    const float events = float(std::log1p(double(event_count)) - 6);
    if (a.num_fields) {
        const int64_t elapsed = has_now ? std::max<int64_t>(difference(now, newest), 0) : 0;
        const Counted counters(a, record, elapsed);
        const size_t width = size_t(a.num_fields) * a.columns;
        const uint8_t of_events = code_of(double(event_count), a.event_resolution, a.event_factor);
        std::vector<uint8_t> own(width + 1);
        for (int64_t pair = 0; pair < count; ++pair) {
            const bool has_item = counters.item_at(rows[pair]) >= 0 && rows[pair] != 0;
            if (!has_item && (!logits || a.num_fields == 1)) continue;
            if (!counters.copy(rows[pair], own.data())) continue;
            own[width] = of_events;
            if (logits) counted.push_back(pair), codes.insert(codes.end(), own.begin(), own.end());
            if (!scores || !has_item) continue;
            counted_next.push_back(pair), codes_next.insert(codes_next.end(), own.begin(), own.end() - 1);
        }
        request.num_counted = int64_t(counted.size()), request.num_counted_next = int64_t(counted_next.size());
        request.counted = counted.data(), request.codes = codes.data();
        request.counted_next = counted_next.data(), request.codes_next = codes_next.data();
        request.event_counts = &events;
    }

    const int64_t offsets[] = {0, count};
    request.users = 1, request.offsets = offsets, request.rows = rows, request.shared = 1;
    if (asked) {
        request.features = asked->features, request.features_per_user = asked->features_per_user;
        request.feature_first = asked->feature_first, request.feature_rows = asked->feature_rows;
        request.entries = asked->entries, request.num_entries = asked->num_entries;
        request.dense = asked->dense, request.num_dense = asked->num_dense;
    }
    request.adapter = adapter, request.probabilities = probabilities;
    request.logits = logits, request.scores = scores;
    return vista_score(a.model, &request, threads);
} catch (const std::bad_alloc &) {
    return NO_MEMORY;
}

extern "C" int64_t vista_answering_layout(void) { return int64_t(sizeof(VistaAnswering)); }
