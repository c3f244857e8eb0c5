// Checksum of bytes, for the pipeline's check that a storage comes back as it left. Not for security.
#pragma once

#include <cstdint>
#include <cstring>

namespace splitkern::memory {

inline constexpr uint64_t kChecksumSeed = 0x9e3779b97f4a7c15;

// Continues `state` over more bytes. In pieces the result is that of the whole if all but the last are multiples of 8
// bytes. For a given state every step is a bijection, so a change of any single word changes the result.
inline uint64_t checksum(uint64_t state, const void* source, int64_t size_bytes) {
  const auto* bytes = static_cast<const unsigned char*>(source);
  const auto step = [&state](uint64_t word) {
    state = (state ^ word) * 0xff51afd7ed558ccd;
    state ^= state >> 32;
  };
  uint64_t word = 0;
  int64_t done = 0;
  for (; done + 8 <= size_bytes; done += 8) {
    std::memcpy(&word, bytes + done, 8);
    step(word);
  }
  if (done < size_bytes) {
    word = 0;
    std::memcpy(&word, bytes + done, static_cast<size_t>(size_bytes - done));
    step(word + (static_cast<uint64_t>(size_bytes - done) << 56));
  }
  return state;
}

}  // namespace splitkern::memory
