// Tensor maps and the tensor memory accelerator of host execution (../primitives/host_hopper.h): loads gather and
// stores scatter with the arguments of the map, at a time of the scheduler's choosing. Until then the destination
// of a load holds poison. Loads reach both what threads and what the asynchronous proxy sees of shared memory;
// stores read the latter.
#include <algorithm>
#include <cstring>

#include "extension.h"
#include "race.h"

namespace splitkern::kernels {

namespace {

int32_t size_of(ElementType type) {
  switch (type) {
    case ElementType::kFloat64:
      return 8;
    case ElementType::kFloat32:
      return 4;
    case ElementType::kFloat16:
    case ElementType::kBFloat16:
      return 2;
  }
  throw std::runtime_error("splitkern host execution: a tensor map of an unknown element type");
}

int32_t span_bytes(Swizzle swizzle) {
  constexpr int32_t kBytes[] = {0, 32, 64, 128};
  return kBytes[static_cast<int32_t>(swizzle)];
}

class Checks {
 public:
  explicit Checks(std::string prefix) : prefix_(std::move(prefix)) {}
  void require(bool holds, const char* rule) const {
    if (!holds) throw std::runtime_error(prefix_ + ": " + rule);
  }
  void common(ElementType type, const void* base, Swizzle swizzle, int64_t inner_box) const {
    require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "the base must be a multiple of 16 bytes");
    const int64_t inner_bytes = inner_box * size_of(type);
    require(inner_bytes % 16 == 0, "the innermost extent of the box must be a multiple of 16 bytes");
    // The driver also takes less than the span, in a layout that nothing here knows.
    require(swizzle == Swizzle::kNone || inner_bytes == span_bytes(swizzle),
            "the innermost extent of the box must be the span of the swizzle");
  }
  void stride(int64_t bytes) const {
    require(bytes % 16 == 0 && bytes >= 0 && bytes < int64_t{1} << 40,
            "strides must be multiples of 16 bytes and below 2^40");
  }
  void extent(int64_t extent) const { require(extent >= 1, "extents must be at least 1"); }

 private:
  std::string prefix_;
};

template <class... Values>
std::string list(Values... values) {
  std::string text = "[";
  ((text += (text.size() > 1 ? ", " : "") + std::to_string(values)), ...);
  return text + "]";
}

}  // namespace

TensorMap encode(const Im2colMap& map, const char* operation) {
  std::string text = std::string(operation) + ": im2col tensor map of type ";
  text += std::to_string(static_cast<int32_t>(map.type)) + ", base ";
  text += std::to_string(reinterpret_cast<uintptr_t>(map.base)) + ", extents ";
  text += list(map.channels, map.columns, map.rows, map.images) + ", strides in bytes ";
  text += list(map.column_stride_bytes, map.row_stride_bytes, map.image_stride_bytes) + ", lower corner ";
  text += list(map.lower_column, map.lower_row) + ", upper corner " + list(map.upper_column, map.upper_row);
  text += ", steps " + list(map.column_step, map.row_step) + ", box of ";
  text += std::to_string(map.box_channels) + " channels and " + std::to_string(map.box_pixels) + " pixels, swizzle ";
  text += std::to_string(static_cast<int32_t>(map.swizzle)) + ", " + std::to_string(map.patches) + " patches ";
  text += std::to_string(map.patch_stride_bytes) + " bytes apart";
  const Checks checks(text);
  checks.require(map.box_channels >= 1 && map.box_channels <= 256, "the box must have 1 to 256 channels");
  checks.require(map.box_pixels >= 1 && map.box_pixels <= 1024, "the box must have 1 to 1024 pixels");
  checks.common(map.type, map.base, map.swizzle, map.box_channels);
  for (const int64_t bytes : {map.column_stride_bytes, map.row_stride_bytes, map.image_stride_bytes}) {
    checks.stride(bytes);
  }
  for (const int32_t extent : {map.channels, map.columns, map.rows, map.images}) checks.extent(extent);
  for (const int32_t corner : {map.lower_column, map.lower_row, map.upper_column, map.upper_row}) {
    checks.require(corner >= -128 && corner <= 127, "corners must lie in [-128, 127]");
    checks.require(map.patches == 0 || (corner >= -16 && corner <= 15), "with patches corners must lie in [-16, 15]");
  }
  if (map.patches != 0) {
    checks.extent(map.patches);
    checks.stride(map.patch_stride_bytes);
  }
  for (const int32_t step : {map.column_step, map.row_step}) {
    checks.require(step >= 1 && step <= 8, "steps must be 1 to 8");
  }
  checks.require(
      map.lower_column <= map.columns - 1 + map.upper_column && map.lower_row <= map.rows - 1 + map.upper_row,
      "the bounding box must not be empty");
  TensorMap result{};
  result.kind = TensorMap::Kind::kIm2col;
  result.im2col = map;
  return result;
}

TensorMap encode(const TiledMap& map, const char* operation) {
  const auto each = [&](const auto* values, int32_t count) {
    std::string text = "[";
    for (int32_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return text + "]";
  };
  const int32_t rank = std::clamp(map.rank, 1, 5);
  std::string text = std::string(operation) + ": tiled tensor map of type ";
  text += std::to_string(static_cast<int32_t>(map.type)) + ", base ";
  text += std::to_string(reinterpret_cast<uintptr_t>(map.base)) + ", rank " + std::to_string(map.rank);
  text += ", extents " + each(map.extents, rank) + ", strides in bytes " + each(map.strides_bytes, rank - 1);
  text += ", box " + each(map.box, rank) + ", swizzle " + std::to_string(static_cast<int32_t>(map.swizzle));
  const Checks checks(text);
  checks.require(map.rank == rank, "the rank must be 1 to 5");
  for (int32_t i = 0; i < rank; ++i) {
    checks.require(map.box[i] >= 1 && map.box[i] <= 256, "the extents of the box must be 1 to 256");
    checks.extent(map.extents[i]);
    if (i > 0) checks.stride(map.strides_bytes[i - 1]);
  }
  checks.common(map.type, map.base, map.swizzle, map.box[0]);
  TensorMap result{};
  result.kind = TensorMap::Kind::kTiled;
  result.tiled = map;
  return result;
}

}  // namespace splitkern::kernels

namespace splitkern::host {

using kernels::Im2colMap;
using kernels::TensorMap;
using kernels::TiledMap;

namespace {

// A row of a box: `elements` neighbours in global memory from element `first` of a line that has `extent`.
struct BoxRow {
  int64_t index;        // in the box
  unsigned char* line;  // null: wholly outside
  int64_t first;
  int64_t extent;
  int32_t elements;
};

template <class Visit>
void walk(const Im2colMap& map, const int32_t* at, uint16_t column_offset, uint16_t row_offset, Visit&& visit) {
  auto* base = static_cast<unsigned char*>(const_cast<void*>(map.base));
  const int32_t last_column = map.columns - 1 + map.upper_column;
  const int32_t last_row = map.rows - 1 + map.upper_row;
  int64_t column = at[1];
  int64_t row = at[2];
  int64_t image = at[3];
  const int32_t patches = map.patches == 0 ? 1 : map.patches;
  int64_t patch = map.patches == 0 ? 0 : at[4];
  for (int32_t pixel = 0; pixel < map.box_pixels; ++pixel) {
    const int64_t x = column + column_offset;
    const int64_t y = row + row_offset;
    const bool inside = x >= 0 && x < map.columns && y >= 0 && y < map.rows && image >= 0 && image < map.images;
    visit(BoxRow{pixel,
                 inside ? base + image * map.image_stride_bytes + patch * map.patch_stride_bytes +
                              y * map.row_stride_bytes + x * map.column_stride_bytes
                        : nullptr,
                 at[0], map.channels, map.box_channels});
    column += map.column_step;
    if (column <= last_column) continue;
    column = map.lower_column;
    row += map.row_step;
    if (row <= last_row) continue;
    row = map.lower_row;
    if (++patch < patches) continue;
    patch = 0;
    ++image;
  }
}

template <class Visit>
void walk(const TiledMap& map, const int32_t* at, Visit&& visit) {
  auto* base = static_cast<unsigned char*>(const_cast<void*>(map.base));
  int64_t rows = 1;
  for (int32_t i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (int64_t index = 0; index < rows; ++index) {
    int64_t rest = index;
    bool inside = true;
    unsigned char* line = base;
    for (int32_t i = 1; i < map.rank; ++i) {
      const int64_t position = at[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && position >= 0 && position < map.extents[i];
      line += position * map.strides_bytes[i - 1];
    }
    visit(BoxRow{index, inside ? line : nullptr, at[0], map.extents[0], map.box[0]});
  }
}

struct Box {
  int32_t element_bytes;
  uint32_t bytes;
  kernels::Swizzle swizzle;
};
Box box_of(const TensorMap& map) {
  if (map.kind == TensorMap::Kind::kIm2col) {
    const int32_t size = kernels::size_of(map.im2col.type);
    return {size, static_cast<uint32_t>(map.im2col.box_channels * map.im2col.box_pixels * size), map.im2col.swizzle};
  }
  const int32_t size = kernels::size_of(map.tiled.type);
  int64_t elements = 1;
  for (int32_t i = 0; i < map.tiled.rank; ++i) elements *= map.tiled.box[i];
  return {size, static_cast<uint32_t>(elements * size), map.tiled.swizzle};
}

// Calls visit(offset in shared memory, chunk of global memory or null, its first valid byte, one past its last) for
// every 16 bytes of the box.
template <class Visit>
void each_chunk(const TensorMap& map, const int32_t* at, uint16_t column_offset, uint16_t row_offset,
                uint32_t offset_bytes, Visit&& visit) {
  const Box box = box_of(map);
  const auto row = [&](const BoxRow& row) {
    const int64_t row_bytes = static_cast<int64_t>(row.elements) * box.element_bytes;
    for (int64_t byte = 0; byte < row_bytes; byte += 16) {
      const auto address = static_cast<uint32_t>(kSharedBase + offset_bytes + row.index * row_bytes + byte);
      const int64_t global_byte = row.first * box.element_bytes + byte;
      const int64_t first = std::clamp<int64_t>(-global_byte, 0, 16);
      const int64_t last = std::clamp<int64_t>(row.extent * box.element_bytes - global_byte, first, 16);
      const bool any = row.line != nullptr && first < last;
      visit(swizzled(address, box.swizzle) - kSharedBase, any ? row.line + global_byte : nullptr, any ? first : 0,
            any ? last : 0);
    }
  };
  if (map.kind == TensorMap::Kind::kIm2col) {
    walk(map.im2col, at, column_offset, row_offset, row);
  } else {
    walk(map.tiled, at, row);
  }
}

void check_box(const TensorMap& map, const void* shared, const char* what) {
  const Box box = box_of(map);
  static_cast<void>(shared_address(shared, box.bytes, what));
  check_alignment(shared, box.swizzle == kernels::Swizzle::k128Bytes ? 1024 : 128, what);
}

void check_im2col(const TensorMap& map, const int32_t* at, int32_t rank, const char* what) {
  if (map.kind != TensorMap::Kind::kIm2col) fail(std::string(what) + ": the map is not an im2col map");
  const Im2colMap& walk = map.im2col;
  if ((walk.patches != 0) != (rank == 5)) {
    fail(std::string(what) + ": the map has " + std::to_string(walk.patches) + " patches, the access rank " +
         std::to_string(rank));
  }
  if (rank == 5 && (at[4] < 0 || at[4] >= walk.patches)) {
    fail(std::string(what) + ": there is no patch " + std::to_string(at[4]));
  }
  const auto on_the_walk = [](int32_t position, int32_t lower, int32_t last, int32_t step) {
    return position >= lower && position <= last && (position - lower) % step == 0;
  };
  if (!on_the_walk(at[1], walk.lower_column, walk.columns - 1 + walk.upper_column, walk.column_step) ||
      !on_the_walk(at[2], walk.lower_row, walk.rows - 1 + walk.upper_row, walk.row_step) || at[3] < 0) {
    fail(std::string(what) + ": pixel (column " + std::to_string(at[1]) + ", row " + std::to_string(at[2]) +
         ", image " + std::to_string(at[3]) + ") is not on the walk through the bounding box");
  }
}

void check_tiled(const TensorMap& map, int32_t rank, const char* what) {
  if (map.kind != TensorMap::Kind::kTiled || map.tiled.rank != rank) {
    fail(std::string(what) + ": the map is not a tiled map of rank " + std::to_string(rank));
  }
}

struct Load final : AsyncWork {
  TensorMap map;
  int32_t at[5] = {};
  uint16_t column_offset = 0;
  uint16_t row_offset = 0;
  uint32_t offset_bytes = 0;
  uint32_t barrier_offset_bytes = 0;
  std::vector<Block*> blocks;
  char race_address = 0;

  void run() override {
    const race::Engine engine;
    race::acquire(&race_address);
    for (Block* block : blocks) {
      if (block->finished == block->threads) fail("TMA load: its destination is a block that has ended");
      BlockExtension& extension = block_extension(*block);
      each_chunk(map, at, column_offset, row_offset, offset_bytes,
                 [&](uint32_t offset, const unsigned char* global, int64_t first, int64_t last) {
                   unsigned char chunk[16] = {};
                   if (global != nullptr) {
                     race::reads(global + first, last - first);
                     copy_bytes(chunk + first, global + first, last - first);
                   }
                   race::writes(block->shared + offset, 16);
                   copy_bytes(block->shared + offset, chunk, 16);
                   copy_bytes(extension.shadow.data() + offset, chunk, 16);
                 });
      complete_bytes(*block, barrier_offset_bytes, box_of(map).bytes);
    }
  }
  const char* unfinished() const override { return "a TMA load"; }
};

void issue(std::unique_ptr<Load> load, void* shared, const TensorMap& map, const kernels::Barrier& barrier,
           const int32_t* at, int32_t rank, uint16_t blocks) {
  const uint32_t bytes = box_of(map).bytes;
  load->map = map;
  std::copy_n(at, rank, load->at);
  load->offset_bytes = shared_address(shared, bytes, "TMA load") - kSharedBase;
  load->barrier_offset_bytes = barrier_for_load(barrier);
  if (blocks == kThisBlock) {
    load->blocks = {current_thread().block};
  } else {
    for (uint32_t rank_of_block = 0; rank_of_block < 16; ++rank_of_block) {
      if ((blocks >> rank_of_block & 1) != 0) load->blocks.push_back(&block_of_cluster(rank_of_block, "TMA load"));
    }
  }
  for (Block* block : load->blocks) {
    BlockExtension& extension = block_extension(*block);
    unsigned char* destination = block->shared + load->offset_bytes;
    race::writes(destination, bytes);
    fill_bytes(destination, kPoison, bytes);
    fill_bytes(extension.shadow.data() + load->offset_bytes, kPoison, bytes);
    std::fill_n(extension.writers.begin() + load->offset_bytes / 16, bytes / 16, uint16_t{0});
  }
  race::release(&load->race_address);
  add_async(std::move(load));
  preemption_point();
}

// Once for reading and once for writing, unless a wait was first.
struct StoreWork final : AsyncWork {
  explicit StoreWork(std::shared_ptr<TensorStore> work) : store(std::move(work)) {}
  std::shared_ptr<TensorStore> store;

  void run() override {
    if (store->stage == TensorStore::Stage::kIssued) {
      store->read();
      add_async(std::make_unique<StoreWork>(std::move(store)));
    } else {
      store->write();
    }
  }
};

void issue(const TensorMap& map, const void* shared, const int32_t* at, int32_t rank) {
  auto store = std::make_shared<TensorStore>();
  store->map = map;
  std::copy_n(at, rank, store->at);
  store->block = current_thread().block;
  store->offset_bytes = shared_address(shared, box_of(map).bytes, "TMA store") - kSharedBase;
  race::release(&store->race_address);
  extension().open_stores.push_back(store);
  add_async(std::make_unique<StoreWork>(std::move(store)));
  preemption_point();
}

}  // namespace

void TensorStore::read() {
  if (stage != Stage::kIssued) return;
  stage = Stage::kRead;
  const race::Engine engine;
  race::acquire(&race_address);
  const BlockExtension& extension = block_extension(*block);
  data.reserve(box_of(map).bytes);
  each_chunk(map, at, 0, 0, offset_bytes, [&](uint32_t offset, const unsigned char*, int64_t, int64_t) {
    race::reads(block->shared + offset, 16);
    const unsigned char* chunk = extension.shadow.data() + offset;
    data.insert(data.end(), chunk, chunk + 16);
  });
  race::release(&race_address);
}

void TensorStore::write() {
  read();
  if (stage != Stage::kRead) return;
  stage = Stage::kWritten;
  const race::Engine engine;
  race::acquire(&race_address);
  const unsigned char* chunk = data.data();
  each_chunk(map, at, 0, 0, offset_bytes, [&](uint32_t, unsigned char* global, int64_t first, int64_t last) {
    if (global != nullptr) {
      race::writes(global + first, last - first);
      copy_bytes(global + first, chunk + first, last - first);
    }
    chunk += 16;
  });
  race::release(&race_address);
}

void load_im2col(void* shared, const TensorMap& map, kernels::Barrier& barrier, const int32_t* at, int32_t rank,
                 uint16_t column_offset, uint16_t row_offset) {
  const race::Quiet quiet;
  check_im2col(map, at, rank, "tma_load_im2col");
  check_box(map, shared, "tma_load_im2col");
  const uint16_t limit = rank == 5 ? 31 : 255;
  if (column_offset > limit || row_offset > limit) {
    fail("tma_load_im2col: offsets must be at most " + std::to_string(limit));
  }
  auto load = std::make_unique<Load>();
  load->column_offset = column_offset;
  load->row_offset = row_offset;
  issue(std::move(load), shared, map, barrier, at, rank, kThisBlock);
}

void load_tiled(void* shared, const TensorMap& map, kernels::Barrier& barrier, const int32_t* at, int32_t rank,
                uint16_t blocks) {
  const race::Quiet quiet;
  check_tiled(map, rank, "TMA load");
  check_box(map, shared, "TMA load");
  issue(std::make_unique<Load>(), shared, map, barrier, at, rank, blocks);
}

void store_im2col(const TensorMap& map, const void* shared, const int32_t* at, int32_t rank) {
  const race::Quiet quiet;
  check_im2col(map, at, rank, "tma_store_im2col");
  check_box(map, shared, "tma_store_im2col");
  issue(map, shared, at, rank);
}

void store_tiled(const TensorMap& map, const void* shared, const int32_t* at, int32_t rank) {
  const race::Quiet quiet;
  check_tiled(map, rank, "TMA store");
  check_box(map, shared, "TMA store");
  issue(map, shared, at, rank);
}

void store_commit() {
  const race::Quiet quiet;
  ThreadExtension& mine = extension();
  mine.store_groups.push_back(std::move(mine.open_stores));
  mine.open_stores.clear();
}

void store_wait(uint32_t pending, bool written) {
  const race::Quiet quiet;
  ThreadExtension& mine = extension();
  const size_t groups = mine.store_groups.size();
  for (size_t i = 0; i + pending < groups; ++i) {
    for (const std::shared_ptr<TensorStore>& store : mine.store_groups[i]) {
      if (written) {
        store->write();
      } else {
        store->read();
      }
      race::acquire(&store->race_address);
    }
  }
  if (written && groups > pending) {
    mine.store_groups.erase(mine.store_groups.begin(), mine.store_groups.end() - pending);
  }
  preemption_point();
}

void note_ordinary_write(uint32_t address) {
  const Thread& self = current_thread();
  block_extension(*self.block).writers[(address - kSharedBase) / 16] = static_cast<uint16_t>(self.index + 1);
}

// Publishes what this thread wrote, and every write whose thread is not known: those that no primitive made.
void fence_async_shared() {
  const race::Quiet quiet;
  const Thread& self = current_thread();
  const Block& block = *self.block;
  BlockExtension& extension = block_extension(*self.block);
  const size_t chunks = extension.writers.size();
  for (size_t i = 0; i < chunks; ++i) {
    uint16_t& writer = extension.writers[i];
    if (writer != 0 && writer != self.index + 1) continue;
    writer = 0;
    const size_t offset = i * 16;
    copy_bytes(extension.shadow.data() + offset, block.shared + offset,
               std::min<size_t>(16, block.shared_bytes - offset));
  }
  preemption_point();
}

}  // namespace splitkern::host
