// Checks and decodes records of a summary store (records.h).
#include <cmath>
#include <cstring>

#include "records.h"
#include "scoring.h"

namespace {
constexpr uint32_t SHORT_TIMES = 2;

int row_bytes(const VistaRecordLayout &layout) {
    const int dim = layout.dim;
    switch (layout.codec) {
        case FLOAT32: return 4 * dim;
        case INT8: return dim + 8;
        case FLOAT16: return 2 * dim;
        default: return (dim + 1) / 2 + 4;
    }
}

int column_bytes(uint32_t values) { return values == 0 ? 4 : values < 256 ? 1 : values < 65536 ? 2 : 4; }

int all_bytes(const uint32_t *columns, int count) {
    int total = 0;
    for (int i = 0; i < count; ++i) total += column_bytes(columns[i]);
    return total;
}

int code_bytes(const VistaRecordLayout &layout) { return (6 * layout.values + 7) / 8; }

bool accepted(const VistaRecordLayout &layout, const uint8_t *record, int64_t length, const uint8_t *header,
              const uint8_t *checksum, const uint8_t *key_hash, int64_t *sizes) {
    auto same = [&](int from, int to) { return std::memcmp(header + from, layout.header + from, to - from) == 0; };
    auto reversed = [](const uint8_t *stored, const uint8_t *expected) {
        for (int i = 0; i < 8; ++i)
            if (stored[i] != expected[7 - i]) return false;
        return true;
    };
    if (!same(0, 8) || !same(12, 20) || !same(24, 64)) return false;
    if (number_at(header + 20, 4) != uint64_t(length - HEADER)) return false;
    if (!reversed(header + 120, checksum) || !reversed(header + 64, key_hash)) return false;
    const uint32_t flags = uint32_t(number_at(header + 8, 4)), given = uint32_t(number_at(layout.header + 8, 4));
    if ((layout.num_fields ? flags & ~SHORT_TIMES : flags) != given) return false;
    int64_t at = HEADER + int64_t(layout.tokens) * row_bytes(layout) + all_bytes(layout.user_columns, layout.num_user);
    const int64_t counters = at;
    for (int f = 0; f < layout.num_fields; ++f) {
        if (at + 2 > length) return false;
        sizes[f] = int64_t(number_at(record + at, 2));
        if (sizes[f] > layout.most_keys[f]) return false;
        at += 2 + sizes[f] * (layout.key_bytes[f] + code_bytes(layout));
    }
    if (at > length || number_at(header + 116, 4) != uint64_t(at - counters)) return false;
    const int64_t events = int64_t(number_at(header + 112, 4));
    const int64_t of_event = 5 + (flags & SHORT_TIMES ? 4 : 8) + all_bytes(layout.tail_columns, layout.num_tail);
    sizes[layout.num_fields] = events;
    return at + events * of_event == length;
}

// Values of one column, from `at` on, into the array that starts at `out`; false if one is not allowed.
bool decode_column(const uint8_t *at, uint32_t values, int64_t count, void *out, int64_t first) {
    const int width = column_bytes(values);
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t stored = uint32_t(number_at(at + width * i, width));
        if (values == 0) {
            float number;
            std::memcpy(&number, &stored, 4);
            if (std::isinf(number)) return false;
            static_cast<float *>(out)[first + i] = number;
        } else {
            if (stored > values) return false;
            static_cast<int32_t *>(out)[first + i] = int32_t(stored) - 1;
        }
    }
    return true;
}
}  // namespace

extern "C" {
int64_t vista_check_records(const VistaRecordLayout *layout, const uint8_t *content, const int64_t *starts,
                            int64_t count, const uint8_t *headers, const uint8_t *checksums, const uint8_t *key_hashes,
                            int64_t *sizes) {
    if (layout->num_fields > MOST_FIELDS) return 0;
    for (int64_t b = 0; b < count; ++b)
        if (!accepted(*layout, content + starts[b], starts[b + 1] - starts[b], headers + HEADER * b, checksums + 8 * b,
                      key_hashes + 8 * b, sizes + b * (layout->num_fields + 1)))
            return b;
    return count;
}

int64_t vista_decode_records(const VistaRecordLayout *layout, const uint8_t *content, const int64_t *starts,
                             int64_t count, const int64_t *sizes, const VistaRecordArrays *out) {
    const int fields = layout->num_fields, of_codes = code_bytes(*layout);
    const Kernels &kernels = widest_kernels();
    int64_t counted[MOST_FIELDS] = {}, first = 0;  // keys of each field, and events, of the records before
    for (int64_t b = 0; b < count; ++b, sizes += fields + 1) {
        const uint8_t *record = content + starts[b], *at = record + HEADER;
        const bool short_times = number_at(record + 8, 4) & SHORT_TIMES;
        const int64_t events = sizes[fields], newest = int64_t(number_at(record + NEWEST_EVENT, 8));
        kernels.dequantize(layout->codec, at, layout->tokens, layout->dim,
                           out->summary + b * layout->tokens * layout->dim);
        at += int64_t(layout->tokens) * row_bytes(*layout);
        for (int i = 0; i < layout->num_user; at += column_bytes(layout->user_columns[i++]))
            if (!decode_column(at, layout->user_columns[i], 1, out->user[i], b)) return b;
        for (int f = 0; f < fields; ++f) {
            at += 2;
            for (int64_t e = 0; e < sizes[f]; ++e, ++counted[f]) {
                out->keys[f][counted[f]] = int32_t(number_at(at, layout->key_bytes[f]));
                at += layout->key_bytes[f];
                const uint64_t packed = number_at(at, of_codes);
                at += of_codes;
                for (int i = 0; i < layout->values; ++i)
                    out->codes[f][counted[f] * layout->values + i] = packed >> 6 * i & 63;
            }
        }
        const int width = short_times ? 4 : 8;
        if (events) std::memcpy(out->items + first, at, 4 * size_t(events));
        at += 4 * events;
        for (int64_t i = 0; i < events; ++i) {
            const uint64_t time = number_at(at + width * i, width);
            out->times[first + i] = int64_t(short_times ? uint64_t(newest) - time : time);
        }
        at += width * events;
        if (events) std::memcpy(out->actions + first, at, size_t(events));
        at += events;
        for (int i = 0; i < layout->num_tail; at += column_bytes(layout->tail_columns[i++]) * events)
            if (!decode_column(at, layout->tail_columns[i], events, out->tail[i], first)) return b;
        first += events;
    }
    return count;
}
}
