// The CSV files of MiniMalloc (github.com/google/minimalloc): id,lower,upper,size[,offset], one buffer a line, live in
// [lower, upper). Read and written by `splitkern plan` and by the placement bench.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "memory/placement.h"

namespace splitkern::memory {

struct MinimallocCsv {
  std::vector<std::string> ids;  // as they stand in the file
  std::vector<Buffer> buffers;
  std::vector<int64_t> offsets;  // empty, or one a buffer
};

// The first line names the columns, in any order; lines end with LF or CRLF, the last one may lack it. Fields are
// plain: no quotes, no spaces. Throws ParseError, with line and column, for an unknown, missing or repeated column, a
// line with too few or too many fields, an empty or repeated id, a number that is no 64-bit integer, lower >= upper, a
// negative size or offset, an empty line.
MinimallocCsv read_minimalloc_csv(std::string_view text);

// With the offset column if there are offsets. Throws InvalidArgument for vectors of unequal length and for ids that
// could not be read back: empty, repeated, or with a comma or line end.
std::string write_minimalloc_csv(const MinimallocCsv& csv);

}  // namespace splitkern::memory
