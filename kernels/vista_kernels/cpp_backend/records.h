// Records of a summary store (docs/reference/file-formats.md): checked, and decoded into arrays of the caller. Plain C,
// mirrored by `records.py`. A record that is not accepted is described by vista's reader in Python.
//
// Letters: B records, K summary rows of d values, N events of all tails, E counted keys of all records in a field, F
// values per counted key.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {
struct VistaRecordLayout {          // what all records of a generation share
    const uint8_t *header;          // [128] a header with these fields
    int32_t codec, tokens, dim;     // the codec's number; K; d
    int32_t num_user, num_tail, num_fields;
    const uint32_t *user_columns;   // [num_user] number of values of a category, 0 for a number
    const uint32_t *tail_columns;   // [num_tail]
    const uint8_t *key_bytes;       // [num_fields] of a counted key
    const uint16_t *most_keys;      // [num_fields] per record
    int32_t values;                 // F
};

struct VistaRecordArrays {
    float *summary;                 // [B, K, d]
    void *const *user;              // [num_user] of [B]: int32 codes, -1 if missing, or float32 numbers
    int32_t *const *keys;           // [num_fields] of [E]
    uint8_t *const *codes;          // [num_fields] of [E, F]
    int32_t *items;                 // [N]
    int64_t *times;                 // [N]
    uint8_t *actions;               // [N]
    void *const *tail;              // [num_tail] of [N], as `user`
};

// Check records: their headers, and the sizes of their parts. Returns B, or the first record that is not accepted
// (with more than 64 fields of counters, none is).
//   content: the records end to end, with zeros for their checksums; record b is starts[b] to starts[b + 1].
//   headers: [B, 128] as stored, with checksums. checksums, key_hashes: [B, 8] as expected, big-endian.
//   sizes: out, [B, num_fields + 1] counted keys of each field, then events of the tail.
int64_t vista_check_records(const VistaRecordLayout *, const uint8_t *content, const int64_t *starts, int64_t count,
                            const uint8_t *headers, const uint8_t *checksums, const uint8_t *key_hashes,
                            int64_t *sizes);
// Decode checked records. Returns B, or the first record with an unknown category or an infinite number.
int64_t vista_decode_records(const VistaRecordLayout *, const uint8_t *content, const int64_t *starts, int64_t count,
                             const int64_t *sizes, const VistaRecordArrays *);
}
#pragma GCC visibility pop

constexpr int64_t HEADER = 128, NEWEST_EVENT = 80, EVENT_COUNT = 88;  // bytes of a header, and where fields of it are
constexpr int MOST_FIELDS = 64;

static inline uint64_t number_at(const uint8_t *at, int size) {  // little-endian
    uint64_t value = 0;
    for (int i = 0; i < size; ++i) value |= uint64_t(at[i]) << 8 * i;
    return value;
}
