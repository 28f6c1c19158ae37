// Verifies the authentication codes of records (file-formats.md, "Authentication") in C++17, with record_decoder.hpp:
//
//     vista::SecretKey secret = ...;                     // the 32 bytes of authentication_key_file
//     if (vista::key_id(secret) != ...) ...              // "key_id" of the manifest: whether it is the store's key
//     vista::Record record = vista::decode_authentic(bytes, size, key, layout, secret);
//
// Needs nothing else. A record that was not written with the key, for this user and generation, throws
// vista::RecordError.
#pragma once
#include "record_decoder.hpp"

namespace vista {
using SecretKey = std::array<uint8_t, 32>;

// BLAKE2b (RFC 7693) with a key and a personalization, whose parameter block is that of the BLAKE2 specification.
class Blake2b {
public:
    Blake2b(size_t digest_size, const SecretKey& key, std::string_view personalization) : digest_size_(digest_size) {
        std::array<uint8_t, 64> parameters{uint8_t(digest_size), uint8_t(key.size()), 1, 1};  // fanout 1, depth 1
        std::copy(personalization.begin(), personalization.end(), parameters.begin() + 48);   // at most 16 bytes
        for (size_t i = 0; i < 8; ++i) state_[i] = kStart[i] ^ number_at(parameters.data() + 8 * i, 8);
        std::copy(key.begin(), key.end(), block_.begin());
        filled_ = block_.size();  // The key fills the first block, padded with zeros.
    }

    void update(const void* bytes, size_t size) {
        const uint8_t* at = static_cast<const uint8_t*>(bytes);
        while (size > 0) {
            if (filled_ == block_.size()) compress(false);  // Not before more follows: the last block is special.
            const size_t part = std::min(size, block_.size() - filled_);
            std::copy_n(at, part, block_.begin() + filled_);
            at += part, size -= part, filled_ += part;
        }
    }

    std::string digest() {  // Call it once.
        compress(true);
        std::string bytes;
        for (size_t i = 0; i < digest_size_; ++i) bytes += char(state_[i / 8] >> 8 * (i % 8) & 0xff);
        return bytes;
    }

private:
    static constexpr std::array<uint64_t, 8> kStart{
        0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
        0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};
    static constexpr uint8_t kOrder[10][16] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
        {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4}, {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
        {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13}, {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
        {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11}, {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
        {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5}, {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

    static uint64_t rotated(uint64_t value, int bits) { return value >> bits | value << (64 - bits); }

    void compress(bool is_last) {
        std::fill(block_.begin() + filled_, block_.end(), uint8_t(0));
        total_ += filled_;  // Records have at most 16 MiB, so that 64 bits suffice.
        std::array<uint64_t, 16> v;
        std::copy(state_.begin(), state_.end(), v.begin());
        std::copy(kStart.begin(), kStart.end(), v.begin() + 8);
        v[12] ^= total_;
        if (is_last) v[14] = ~v[14];
        for (int round = 0; round < 12; ++round) {
            const uint8_t* order = kOrder[round % 10];
            auto mix = [&](int a, int b, int c, int d) {
                v[a] += v[b] + number_at(&block_[8 * *order++], 8), v[d] = rotated(v[d] ^ v[a], 32);
                v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 24);
                v[a] += v[b] + number_at(&block_[8 * *order++], 8), v[d] = rotated(v[d] ^ v[a], 16);
                v[c] += v[d], v[b] = rotated(v[b] ^ v[c], 63);
            };
            for (int i = 0; i < 4; ++i) mix(i, 4 + i, 8 + i, 12 + i);
            for (int i = 0; i < 4; ++i) mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4);
        }
        for (size_t i = 0; i < 8; ++i) state_[i] ^= v[i] ^ v[i + 8];
        filled_ = 0;
    }

    size_t digest_size_, filled_ = 0;
    uint64_t total_ = 0;
    std::array<uint64_t, 8> state_{};
    std::array<uint8_t, 128> block_{};
};

// The key's name in the manifest, 16 hexadecimal digits.
inline std::string key_id(const SecretKey& secret) {
    std::string digits;
    for (unsigned char byte : Blake2b(8, secret, "vista key id 1").digest())
        digits += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    return digits;
}

// `decode` for a store with a key: also checks that a holder of the key wrote the record.
inline Record decode_authentic(const void* bytes, size_t size, std::string_view key, const Layout& layout,
                               const SecretKey& secret) {
    require(layout.authenticated, "key: the layout says that records have no authentication code");
    Record record = decode(bytes, size, key, layout);
    const uint8_t* const header = static_cast<const uint8_t*>(bytes);
    const uint8_t length[2] = {uint8_t(key.size() & 0xff), uint8_t(key.size() >> 8 & 0xff)}, zeros[8] = {};
    Blake2b code(16, secret, "vista record 1");
    code.update(length, 2);
    code.update(key.data(), key.size());
    code.update(header, 120);  // up to the checksum
    code.update(zeros, 8);
    code.update(header + 128, size - 128 - 16);
    const std::string expected = code.digest();
    int differences = 0;  // Compare all bytes, so that the time does not depend on them.
    for (size_t i = 0; i < 16; ++i) differences |= uint8_t(expected[i]) ^ header[size - 16 + i];
    require(differences == 0, "authentication_code: the record was not written with this key");
    return record;
}
}  // namespace vista
