// Decodes the records of a vista summary store (file-formats.md, "Record") in C++17.
//
//     vista::Layout layout = ...;                        // the same for all records of a generation
//     std::string key = vista::user_key(42);             // under which LMDB or the server holds the record
//     vista::Record record = vista::decode(bytes, size, key, layout);
//
// Needs xxhash.h (Debian and Ubuntu: libxxhash-dev) and nothing else. A truncated, damaged, or foreign record throws
// vista::RecordError; whatever the bytes are, nothing outside them is read. record_authentication.hpp verifies codes.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace vista {
struct RecordError : std::runtime_error { using std::runtime_error::runtime_error; };

enum class Codec : uint16_t { float32 = 0, int8 = 1, float16 = 2, int4 = 3 };

// What the manifest of a generation says about its records ("!manifest" in the store, "record" in export.json).
struct Layout {
    std::array<uint8_t, 32> summarizer_id{};
    uint64_t generation = 0;
    uint16_t tokens = 0, dim = 1;            // K rows of d values
    Codec codec = Codec::int8;
    std::vector<uint32_t> user_columns;      // per feature of the user: number of values of a category, 0 for a number
    std::vector<uint32_t> tail_columns;      // per feature of an event, likewise
    std::vector<uint8_t> counter_key_bytes;  // per field that is counted; empty without counters
    uint8_t counter_values = 0;              // F, the number of values per counted key: at most 10
    bool authenticated = false;              // key_id of the manifest is not null
};

struct Feature {                 // of the user, or of each event of the tail
    std::vector<int32_t> codes;  // of a category: the model's codes, -1 for a missing value
    std::vector<float> numbers;  // of a number: NaN for a missing value
};

struct Counter {
    uint32_t key;                // model row of the item, or key of another field
    std::vector<uint8_t> codes;  // F codes from 0 to 63: count, decayed sums, age
};

struct Record {
    uint64_t generation, applied_segment, history_digest;
    int64_t created_at, last_event_ts, event_count;
    std::vector<float> summary;                  // [K, d], row by row
    std::vector<Feature> user;                   // one value each
    std::vector<std::vector<Counter>> counters;  // per field, keys ascending
    std::vector<int32_t> items;                  // of the tail, oldest first: model rows, 0 for an unknown item
    std::vector<int64_t> times;                  // ms
    std::vector<uint8_t> actions;
    std::vector<Feature> tail;                   // one value per event
};

// Keys of users with integer ids: "ui" and the id, big-endian, with its sign bit flipped.
inline std::string user_key(int64_t id) {
    std::string key = "ui";
    for (int shift = 56; shift >= 0; shift -= 8) key += char((uint64_t(id) ^ (uint64_t(1) << 63)) >> shift & 0xff);
    return key;
}

// Keys of users with text ids: "us" and the id in UTF-8.
inline std::string user_key(std::string_view id) { return "us" + std::string(id); }

inline void require(bool holds, const char* problem) {
    if (!holds) throw RecordError(problem);
}

inline uint64_t number_at(const uint8_t* at, size_t size) {  // little-endian, unsigned, of 1 to 8 bytes
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= uint64_t(at[i]) << 8 * i;
    return value;
}

inline float float_at(const uint8_t* at) {
    uint32_t bits = uint32_t(number_at(at, 4));
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float half_at(const uint8_t* at) {  // IEEE 754 binary16
    int bits = int(number_at(at, 2)), exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = std::ldexp(float(exponent ? 1024 + fraction : fraction), (exponent ? exponent : 1) - 25);
    if (exponent == 31) size = fraction ? NAN : INFINITY;
    return bits >> 15 ? -size : size;
}

// Hands out the bytes of a record one after another, and refuses to go past their end.
struct Cursor {
    const uint8_t* at;
    const uint8_t* end;
    const uint8_t* take(uint64_t size) {
        require(size <= uint64_t(end - at), "length: the record ends too early");
        const uint8_t* first = at;
        at += size;
        return first;
    }
    uint64_t integer(size_t size) { return number_at(take(size), size); }
};

// Appends the d values of the next row to `out`.
inline void decode_row(Cursor& cursor, Codec codec, size_t dim, std::vector<float>& out) {
    if (codec == Codec::float32 || codec == Codec::float16) {
        const size_t width = codec == Codec::float32 ? 4 : 2;
        const uint8_t* bytes = cursor.take(width * dim);
        for (size_t i = 0; i < dim; ++i) out.push_back(width == 4 ? float_at(bytes + 4 * i) : half_at(bytes + 2 * i));
        return;
    }
    const bool is_int8 = codec == Codec::int8;
    const uint8_t* q = cursor.take(is_int8 ? dim : (dim + 1) / 2);
    const uint8_t* ends = cursor.take(is_int8 ? 8 : 4);
    float scale = is_int8 ? float_at(ends) : half_at(ends), bias = is_int8 ? float_at(ends + 4) : half_at(ends + 2);
    for (size_t i = 0; i < dim; ++i)  // fma rounds once, as the specification demands
        out.push_back(std::fma(float(is_int8 ? q[i] : q[i / 2] >> 4 * (i % 2) & 15), scale, bias));
}

inline Feature decode_feature(Cursor& cursor, uint32_t num_values, size_t count) {
    Feature feature;
    const size_t width = num_values == 0 ? 4 : num_values < 256 ? 1 : num_values < 65536 ? 2 : 4;
    const uint8_t* bytes = cursor.take(uint64_t(width) * count);
    for (size_t i = 0; i < count; ++i) {
        if (num_values == 0) {
            feature.numbers.push_back(float_at(bytes + 4 * i));
            require(!std::isinf(feature.numbers.back()), "a feature is infinite");
        } else {
            uint64_t stored = number_at(bytes + width * i, width);
            require(stored <= num_values && stored <= INT32_MAX, "a feature has a value that the model does not know");
            feature.codes.push_back(int32_t(stored) - 1);
        }
    }
    return feature;
}

// Checks and decodes one record. Layout and key say what it must hold.
inline Record decode(const void* bytes, size_t size, std::string_view key, const Layout& layout) {
    const uint8_t* const header = static_cast<const uint8_t*>(bytes);
    auto field = [&](size_t offset, size_t width) { return number_at(header + offset, width); };
    require(size >= 128 && size <= (1 << 24), "length: must be from 128 bytes to 16 MiB");
    require(std::memcmp(header, "VSUM", 4) == 0, "magic: not a record");
    require(field(4, 2) == 3 && field(6, 2) == 128, "format_version: must be 3, with a header of 128 bytes");
    require(field(20, 4) == size - 128, "payload_length: does not match the length");
    std::string blank(reinterpret_cast<const char*>(header), size);
    std::fill_n(blank.begin() + 120, 8, '\0');
    require(field(120, 8) == XXH3_64bits(blank.data(), size), "checksum: the record is damaged");

    require(field(12, 2) == uint16_t(layout.codec), "codec: not the generation's");
    require(field(14, 2) == layout.tokens && field(16, 2) == layout.dim, "tokens, dim: not the generation's");
    uint64_t scale_dtype = layout.codec == Codec::int8 ? 1 : layout.codec == Codec::int4 ? 2 : 0;
    require(field(18, 2) == scale_dtype, "scale_dtype: does not match the codec");
    require(field(24, 8) == layout.generation, "generation: another one");
    require(std::memcmp(header + 32, layout.summarizer_id.data(), 32) == 0, "summarizer_id: of another model");
    require(field(64, 8) == XXH3_64bits(key.data(), key.size()), "key_hash: the record of another user");
    const bool short_times = field(8, 4) & 2, may_be_short = !layout.counter_key_bytes.empty();
    require((field(8, 4) & ~2u) == uint64_t(layout.authenticated) && (may_be_short || !short_times), "flags");
    const size_t code = layout.authenticated ? 16 : 0;
    require(size >= 128 + code, "length: no room for the authentication code");

    Record record{field(24, 8), field(96, 8), field(104, 8), int64_t(field(72, 8)), int64_t(field(80, 8)),
                  int64_t(field(88, 8)), {}, {}, {}, {}, {}, {}, {}};
    Cursor cursor{header + 128, header + size - code};
    for (size_t k = 0; k < layout.tokens; ++k) decode_row(cursor, layout.codec, layout.dim, record.summary);
    for (uint32_t column : layout.user_columns) record.user.push_back(decode_feature(cursor, column, 1));

    const uint8_t* counters = cursor.at;
    const size_t code_bytes = (6 * size_t(layout.counter_values) + 7) / 8;
    for (uint8_t key_bytes : layout.counter_key_bytes) {
        std::vector<Counter>& held = record.counters.emplace_back();
        for (uint64_t left = cursor.integer(2); left > 0; --left) {
            Counter counter{uint32_t(cursor.integer(key_bytes)), {}};
            uint64_t packed = cursor.integer(code_bytes);
            for (int i = 0; i < layout.counter_values; ++i) counter.codes.push_back(packed >> 6 * i & 63);
            held.push_back(counter);
        }
    }
    require(field(116, 4) == uint64_t(cursor.at - counters), "counters_length: the counters have another length");

    const size_t length = field(112, 4);
    const size_t width = short_times ? 4 : 8;
    const uint8_t* items = cursor.take(4 * uint64_t(length));
    const uint8_t* times = cursor.take(width * uint64_t(length));
    const uint8_t* actions = cursor.take(length);
    record.actions.assign(actions, actions + length);
    for (size_t i = 0; i < length; ++i) {
        record.items.push_back(int32_t(uint32_t(number_at(items + 4 * i, 4))));
        uint64_t time = number_at(times + width * i, width);
        record.times.push_back(int64_t(short_times ? uint64_t(record.last_event_ts) - time : time));
    }
    for (uint32_t column : layout.tail_columns) record.tail.push_back(decode_feature(cursor, column, length));
    require(cursor.at == cursor.end, "tail_length: the tail has another length");
    return record;
}
}  // namespace vista
