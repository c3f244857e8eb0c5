// Host-side helpers of the launches: rounding, errors that name the operator, and which tile computes a matrix
// product soonest on a device, by a model of the fullest multiprocessor.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../paths.h"

namespace splitkern::kernels::sm80 {

inline int64_t ceil_divide(int64_t numerator, int64_t divisor) {
  return (numerator + divisor - 1) / divisor;
}

// The kernels serve several operators: an error of theirs gets the name of the one that was called.
template <class Function>
void with_operator(const char* name, Function&& function) {
  try {
    function();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(name) + ": " + error.what());
  }
}

enum class TileSize : int32_t { k128x128, k128x64, k64x128, k64x64 };

struct TileModel {
  TileSize size;
  int32_t rows;
  int32_t columns;
  double cost;  // per multiplication, against the largest tile: a small one loads more for each
};

// Of `products` equal products of rows x columns.
template <size_t kCount>
TileSize choose_tile(const TileModel (&models)[kCount], int64_t rows, int64_t columns, int64_t products,
                     int64_t multiprocessors) {
  TileSize best = models[0].size;
  double best_time = 0;
  for (const TileModel& tile : models) {
    const int64_t blocks = ceil_divide(rows, tile.rows) * ceil_divide(columns, tile.columns) * products;
    const double time =
        static_cast<double>(ceil_divide(blocks, multiprocessors)) * tile.rows * tile.columns * tile.cost;
    if (best_time == 0 || time < best_time) {
      best = tile.size;
      best_time = time;
    }
  }
  return best;
}

}  // namespace splitkern::kernels::sm80
