// Prints records of a vista store as JSON, with record_decoder.hpp and record_authentication.hpp:
//
//     g++ -std=c++17 -O2 record_to_json.cpp -o record_to_json
//     ./record_to_json tokens=16 dim=64 codec=1 generation=7 summarizer_id=9f86d0... < records.txt
//
// Arguments are the fields of vista::Layout; lists are written as user_columns=4,0 and may be left out if they are empty.
// For a store with a key, the environment variable VISTA_AUTHENTICATION_KEY holds its 64 hexadecimal digits.
// Standard input has one record per line: its key and its bytes in hexadecimal. Each line of the output is an object, or
// {"error": "..."} for a record that is refused, and the exit code is then 1.
#include "record_authentication.hpp"

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>

static std::vector<uint8_t> from_hex(const std::string& text) {
    std::vector<uint8_t> bytes;
    for (size_t i = 0; i + 1 < text.size(); i += 2) bytes.push_back(uint8_t(std::stoul(text.substr(i, 2), nullptr, 16)));
    return bytes;
}

template <class Number>
static std::vector<Number> list_of(const std::string& text) {
    std::vector<Number> numbers;
    std::stringstream words(text);
    for (std::string word; std::getline(words, word, ',');) numbers.push_back(Number(std::stoull(word)));
    return numbers;
}

static vista::Layout layout_of(int argc, char** argv) {
    vista::Layout layout;
    for (int i = 1; i < argc; ++i) {
        std::string word = argv[i], name = word.substr(0, word.find('=')), value = word.substr(name.size() + 1);
        if (name == "summarizer_id") {
            auto bytes = from_hex(value);
            std::copy_n(bytes.begin(), std::min(bytes.size(), size_t(32)), layout.summarizer_id.begin());
        } else if (name == "user_columns") {
            layout.user_columns = list_of<uint32_t>(value);
        } else if (name == "tail_columns") {
            layout.tail_columns = list_of<uint32_t>(value);
        } else if (name == "counter_key_bytes") {
            layout.counter_key_bytes = list_of<uint8_t>(value);
        } else {
            uint64_t number = std::stoull(value);
            if (name == "generation") layout.generation = number;
            else if (name == "tokens") layout.tokens = uint16_t(number);
            else if (name == "dim") layout.dim = uint16_t(number);
            else if (name == "codec") layout.codec = vista::Codec(number);
            else if (name == "counter_values") layout.counter_values = uint8_t(number);
            else throw std::invalid_argument("unknown argument " + name);
        }
    }
    return layout;
}

static void print(float value) { std::isnan(value) ? std::printf("NaN") : std::printf("%.8e", double(value)); }
static void print(int64_t value) { std::printf("%lld", static_cast<long long>(value)); }
static void print(uint64_t value) { std::printf("%llu", static_cast<unsigned long long>(value)); }
static void print(int32_t value) { print(int64_t(value)); }
static void print(uint8_t value) { print(int64_t(value)); }
template <class Value>
static void print(const std::vector<Value>& values);
static void print(const vista::Feature& feature) { feature.codes.empty() ? print(feature.numbers) : print(feature.codes); }
static void print(const vista::Counter& counter) {
    std::printf("[%u, ", counter.key);
    print(counter.codes);
    std::printf("]");
}
template <class Value>
static void print(const std::vector<Value>& values) {
    std::printf("[");
    for (size_t i = 0; i < values.size(); ++i) std::printf(i ? ", " : ""), print(values[i]);
    std::printf("]");
}
template <class Value>
static void field(const char* name, const Value& value, const char* before = ", ") {
    std::printf("%s\"%s\": ", before, name);
    print(value);
}

int main(int argc, char** argv) {
    vista::Layout layout = layout_of(argc, argv);
    vista::SecretKey secret{};
    if (const char* digits = std::getenv("VISTA_AUTHENTICATION_KEY")) {
        const auto bytes = from_hex(digits);
        if (bytes.size() != secret.size()) throw std::invalid_argument("VISTA_AUTHENTICATION_KEY: not 64 digits");
        std::copy(bytes.begin(), bytes.end(), secret.begin());
        layout.authenticated = true;
    }
    int status = 0;
    for (std::string key, hex; std::cin >> key >> hex;) {
        const auto key_bytes = from_hex(key), bytes = from_hex(hex);
        try {
            const std::string user(key_bytes.begin(), key_bytes.end());
            const vista::Record record = layout.authenticated
                ? vista::decode_authentic(bytes.data(), bytes.size(), user, layout, secret)
                : vista::decode(bytes.data(), bytes.size(), user, layout);
            field("generation", record.generation, "{");
            field("applied_segment", record.applied_segment);
            field("history_digest", record.history_digest);
            field("created_at", record.created_at);
            field("last_event_ts", record.last_event_ts);
            field("event_count", record.event_count);
            field("summary", record.summary);
            field("user", record.user);
            field("counters", record.counters);
            field("items", record.items);
            field("times", record.times);
            field("actions", record.actions);
            field("tail", record.tail);
            std::printf("}\n");
        } catch (const vista::RecordError& error) {
            std::printf("{\"error\": \"%s\"}\n", error.what());
            status = 1;
        }
    }
    return status;
}
