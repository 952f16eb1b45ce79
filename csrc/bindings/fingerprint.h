// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fusedsep {

// A 64-bit hash of memory regions, for noticing that parameters changed. Not cryptographic.
//
// Eight independent lanes, each h = (h ^ word) * odd, rotated: every step is a bijection of h, so any single changed word
// changes its lane, and the lanes keep the multiplier busy: the hash runs at the speed of the cache.
inline uint64_t fingerprint(const std::vector<std::pair<uintptr_t, size_t>>& memory) {
  constexpr uint64_t kMultiplier = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio, odd
  const auto mix = [](uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * kMultiplier;
    return hash ^ (hash >> 29);
  };
  uint64_t total = memory.size();
  for (const auto& [address, bytes] : memory) {
    const char* data = reinterpret_cast<const char*>(address);
    uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    size_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      uint64_t words[8];
      std::memcpy(words, data + i, 64);
      for (int lane = 0; lane < 8; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
    }
    for (; i < bytes; i += 8) {
      uint64_t word = 0;
      std::memcpy(&word, data + i, bytes - i < 8 ? bytes - i : 8);
      lanes[0] = mix(lanes[0], word);
    }
    total = mix(total, bytes);
    for (uint64_t lane : lanes) total = mix(total, lane);
  }
  return total;
}

}  // namespace fusedsep
