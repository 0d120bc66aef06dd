// Philox4x32-10 (Salmon et al., SC 2011): the C++ form of vrpo_kernels/philox.py, word for word.
#pragma once

#include <cstdint>

namespace vrpo {

struct PhiloxKey {
  uint32_t a, b;
  explicit PhiloxKey(int64_t seed)
      : a(static_cast<uint32_t>(seed)), b(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

// One block: counter words in, four random words out. Branch-free, so that a loop over c0 vectorises.
__attribute__((always_inline)) inline void philox4x32(
    PhiloxKey key, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_a = uint64_t{0xD2511F53} * c0;
    const uint64_t product_b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product_b >> 32) ^ c1 ^ key.a;
    c1 = static_cast<uint32_t>(product_b);
    c2 = static_cast<uint32_t>(product_a >> 32) ^ c3 ^ key.b;
    c3 = static_cast<uint32_t>(product_a);
    key.a += 0x9E3779B9u;
    key.b += 0xBB67AE85u;
  }
}

}  // namespace vrpo
