// Asynchronous copies, matrix fragments and warp-wide products of host execution (../primitives/host_mma.h).
// A fragment instruction is a meeting of the warp; each lane reads or writes the row that it names by itself, at
// its own time, so that a missing barrier between lanes shows as well.
#include <algorithm>

#include "extension.h"
#include "race.h"

namespace splitkern::host {

namespace {

void land(const AsyncCopy& copy) {
  race::writes(copy.shared, copy.bytes);
  if (copy.valid) {
    race::reads(copy.global, copy.bytes);
    copy_bytes(copy.shared, copy.global, copy.bytes);
  } else {
    fill_bytes(copy.shared, 0, copy.bytes);
  }
}

}  // namespace

void copy_async(void* shared, const void* global, uint32_t bytes, bool valid) {
  const race::Quiet quiet;
  check_alignment(shared, bytes, "copy_async to shared memory");
  check_alignment(global, bytes, "copy_async from global memory");
  static_cast<void>(shared_address(shared, bytes, "copy_async"));
  race::writes(shared, bytes);
  fill_bytes(shared, kPoison, bytes);
  extension().open_copies.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
  const race::Quiet quiet;
  ThreadExtension& mine = extension();
  mine.copy_groups.push_back(std::move(mine.open_copies));
  mine.open_copies.clear();
}

void copy_async_wait(uint32_t pending) {
  const race::Quiet quiet;
  ThreadExtension& mine = extension();
  while (mine.copy_groups.size() > pending) {
    std::vector<AsyncCopy>& group = mine.copy_groups.front();
    for (size_t i = group.size(); i > 0; --i) {  // in random order
      std::swap(group[i - 1], group[random_bits() % i]);
      land(group[i - 1]);
    }
    mine.copy_groups.pop_front();
  }
  preemption_point();
}

namespace {

struct Fragment {
  uint16_t row[8];
  uint32_t registers[4];
  void* destination;  // of a store
  bool repeated;      // an earlier lane stores the same to the same place
};

Fragment& fragment_of(Thread* lanes, uint32_t lane) {
  return *static_cast<Fragment*>(lanes[lane].payload);
}

void find_repeated(Thread* lanes) {
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    Fragment& mine = fragment_of(lanes, lane);
    mine.repeated = false;
    for (uint32_t earlier = 0; earlier < lane && !mine.repeated; ++earlier) {
      const Fragment& other = fragment_of(lanes, earlier);
      mine.repeated = other.destination == mine.destination && std::equal(other.row, other.row + 8, mine.row);
    }
  }
}

uint32_t join(uint16_t low, uint16_t high) {
  return low | static_cast<uint32_t>(high) << 16;
}

void rows_to_registers(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const uint16_t* row = fragment_of(lanes, 8 * matrix + lane / 4).row;
      const uint32_t pair = 2 * (lane % 4);
      fragment_of(lanes, lane).registers[matrix] = join(row[pair], row[pair + 1]);
    }
  }
}

void columns_to_registers(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const uint32_t first = 8 * matrix + 2 * (lane % 4);
      const uint32_t column = lane / 4;
      fragment_of(lanes, lane).registers[matrix] =
          join(fragment_of(lanes, first).row[column], fragment_of(lanes, first + 1).row[column]);
    }
  }
}

void registers_to_rows(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    for (uint32_t column = 0; column < 8; ++column) {
      const uint32_t pair = fragment_of(lanes, lane % 8 * 4 + column / 2).registers[lane / 8];
      fragment_of(lanes, lane).row[column] = static_cast<uint16_t>(pair >> (column % 2 * 16));
    }
  }
  find_repeated(lanes);
}

void registers_to_columns(Block& block, uint32_t warp) {
  Thread* lanes = block.thread + warp * kWarpThreads;
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    for (uint32_t column = 0; column < 8; ++column) {
      // Row r of what is stored is column r of the fragment.
      const uint32_t pair = fragment_of(lanes, column * 4 + lane % 8 / 2).registers[lane / 8];
      fragment_of(lanes, lane).row[column] = static_cast<uint16_t>(pair >> (lane % 2 * 16));
    }
  }
  find_repeated(lanes);
}

}  // namespace

void load_matrix(uint32_t (&registers)[4], const void* row, bool transposed) {
  const race::Quiet quiet;
  check_alignment(row, 16, "load_matrix_x4");
  static_cast<void>(shared_address(row, 16, "load_matrix_x4"));
  Fragment mine;
  race::reads(row, 16);
  copy_bytes(mine.row, row, 16);
  meet_warp(transposed ? "load_matrix_x4_transposed" : "load_matrix_x4", &mine, false,
            transposed ? &columns_to_registers : &rows_to_registers);
  copy_bytes(registers, mine.registers, sizeof(registers));
}

void store_matrix(void* row, const uint32_t (&registers)[4], bool transposed) {
  const race::Quiet quiet;
  check_alignment(row, 16, "store_matrix_x4");
  const uint32_t address = shared_address(row, 16, "store_matrix_x4");
  Fragment mine;
  mine.destination = row;
  copy_bytes(mine.registers, registers, sizeof(registers));
  meet_warp(transposed ? "store_matrix_x4_transposed" : "store_matrix_x4", &mine, false,
            transposed ? &registers_to_columns : &registers_to_rows);
  if (mine.repeated) return;  // one instruction, so not a race
  race::writes(row, 16);
  copy_bytes(row, mine.row, 16);
  note_ordinary_write(address);
}

// --- Products ---------------------------------------------------------------------------------------

namespace {

struct Product {
  uint32_t a[4];
  uint32_t b[2];
  float d[4];
};

template <Operand kKind>
float widen(uint32_t bits) {
  if constexpr (kKind == Operand::kHalf) {
    return kernels::to_accumulator(kernels::Half{static_cast<uint16_t>(bits)});
  } else if constexpr (kKind == Operand::kBFloat16) {
    return kernels::to_accumulator(kernels::BFloat16{static_cast<uint16_t>(bits)});
  } else {
    return kernels::bits_float(bits & ~0x1fffu);  // the hardware does not read the low bits
  }
}

// Every product is exact in fp32; the sum runs in ascending order with one rounding per term.
template <Operand kKind>
void multiply(Block& block, uint32_t warp) {
  constexpr bool kPairs = kKind != Operand::kTf32;
  constexpr uint32_t kReduction = kPairs ? 16 : 8;
  Thread* lanes = block.thread + warp * kWarpThreads;
  float a[16][kReduction];
  float b[kReduction][8];
  float d[16][8];
  const auto each_output = [&](auto&& body) {
    for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
      Product& mine = *static_cast<Product*>(lanes[lane].payload);
      for (uint32_t i = 0; i < 4; ++i) body(mine.d[i], d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2]);
    }
  };
  for (uint32_t lane = 0; lane < kWarpThreads; ++lane) {
    const Product& mine = *static_cast<const Product*>(lanes[lane].payload);
    const uint32_t group = lane / 4;
    const uint32_t step = lane % 4;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = group + i % 2 * 8;
      if constexpr (kPairs) {
        a[row][2 * step + i / 2 * 8] = widen<kKind>(mine.a[i] & 0xffffu);
        a[row][2 * step + i / 2 * 8 + 1] = widen<kKind>(mine.a[i] >> 16);
      } else {
        a[row][step + i / 2 * 4] = widen<kKind>(mine.a[i]);
      }
    }
    for (uint32_t i = 0; i < 2; ++i) {
      if constexpr (kPairs) {
        b[2 * step + i * 8][group] = widen<kKind>(mine.b[i] & 0xffffu);
        b[2 * step + i * 8 + 1][group] = widen<kKind>(mine.b[i] >> 16);
      } else {
        b[step + i * 4][group] = widen<kKind>(mine.b[i]);
      }
    }
  }
  each_output([](const float& mine, float& element) { element = mine; });
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t k = 0; k < kReduction; ++k) {
      for (uint32_t column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  each_output([](float& mine, const float& element) { mine = element; });
}

}  // namespace

void mma(Operand operand, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Product mine;
  copy_bytes(mine.a, a, sizeof(a));
  copy_bytes(mine.b, b, sizeof(b));
  copy_bytes(mine.d, d, sizeof(d));
  switch (operand) {
    case Operand::kHalf:
      meet_warp("mma_16x8x16<Half>", &mine, false, &multiply<Operand::kHalf>);
      break;
    case Operand::kBFloat16:
      meet_warp("mma_16x8x16<BFloat16>", &mine, false, &multiply<Operand::kBFloat16>);
      break;
    case Operand::kTf32:
      meet_warp("mma_16x8x8_tf32", &mine, false, &multiply<Operand::kTf32>);
      break;
  }
  copy_bytes(d, mine.d, sizeof(d));
}

}  // namespace splitkern::host
