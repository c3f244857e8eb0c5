// Checks of MiniMalloc's CSV: what is read and written, and where an error is.
#include "memory/minimalloc_csv.h"

#include <limits>

#include "memory/errors.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

void refuses_at(const std::string& text, int64_t line, int64_t column, const std::string& part) {
  try {
    read_minimalloc_csv(text);
  } catch (const ParseError& error) {
    check::require(std::string(error.what()).find(part) != std::string::npos,
                   "\"" + std::string(error.what()) + "\" lacks \"" + part + "\"");
    check::equal(error.line, line, "the line of \"" + part + "\"");
    check::equal(error.column, column, "the column of \"" + part + "\"");
    return;
  }
  throw std::runtime_error("wrong: \"" + text + "\" was read");
}

}  // namespace

CHECK_NAMED(csv_reads, "minimalloc csv: columns in any order, line ends, no lines") {
  const MinimallocCsv csv = read_minimalloc_csv("size,upper,id,lower\r\n7,5,b 1,-3\r\n0,9223372036854775807,2,0");
  check::equal(csv.buffers.size(), 2, "the number of buffers");
  check::require(csv.ids == std::vector<std::string>{"b 1", "2"}, "ids as they stand");
  check::require(csv.buffers[0] == Buffer{-3, 5, 7}, "the first buffer");
  check::require(csv.buffers[1] == Buffer{0, std::numeric_limits<int64_t>::max(), 0}, "the second buffer");
  check::require(csv.offsets.empty(), "no offsets");
  check::require(read_minimalloc_csv("id,lower,upper,size\n").buffers.empty(), "no lines");
  check::require(read_minimalloc_csv("offset,id,lower,upper,size\n4,x,0,1,2\n").offsets == std::vector<int64_t>{4},
                 "the offset");
}

CHECK_NAMED(csv_round_trip, "minimalloc csv: what is written is read back") {
  MinimallocCsv csv{{"a", "0"}, {{-5, 5, 100}, {0, 1, 0}}, {}};
  check::require(write_minimalloc_csv(csv) == "id,lower,upper,size\na,-5,5,100\n0,0,1,0\n", "the text");
  csv.offsets = {0, 100};
  const MinimallocCsv again = read_minimalloc_csv(write_minimalloc_csv(csv));
  check::require(again.ids == csv.ids && again.buffers == csv.buffers && again.offsets == csv.offsets, "with offsets");
}

CHECK_NAMED(csv_refusals, "minimalloc csv: what is refused, with line and column") {
  const std::string head = "id,lower,upper,size\n";
  refuses_at("", 1, 1, "must name the columns");
  refuses_at("id,lower,upper\n", 1, 1, "column \"size\" is missing");
  refuses_at("id,lower,upper,bytes\n", 1, 16, "got \"bytes\"");
  refuses_at("id,lower,upper,size,size\n", 1, 21, "column \"size\" is there twice");
  refuses_at("id,lower,upper,size,\n", 1, 21, "got \"\"");
  refuses_at(head + "a,0,1,2\nb,0,1", 3, 6, "4 fields, got 3");
  refuses_at(head + "a,0,1,2,3\n", 2, 9, "4 fields, got 5");
  refuses_at(head + "\n", 2, 1, "4 fields, got 1");
  refuses_at(head + ",0,1,2\n", 2, 1, "id must not be empty");
  refuses_at(head + "a,0,1,2\na,0,1,2\n", 3, 1, "id \"a\" is there twice");
  refuses_at(head + "a,0,1,2\nb,1.5,2,2\n", 3, 3, "lower must be an integer, got \"1.5\"");
  refuses_at(head + "a,0, 1,2\n", 2, 5, "upper must be an integer, got \" 1\"");
  refuses_at(head + "a,0,1,\n", 2, 7, "size must be an integer, got \"\"");
  refuses_at(head + "a,0,1,0x10\n", 2, 7, "got \"0x10\"");
  refuses_at(head + "a,0,1,9223372036854775808\n", 2, 7, "size must fit 64 bits");
  refuses_at(head + "a,5,5,1\n", 2, 3, "lower must be below upper, got 5 and 5");
  refuses_at(head + "a,0,1,-1\n", 2, 7, "size must not be negative, got -1");
  refuses_at("id,lower,upper,size,offset\na,0,1,1,-1\n", 2, 9, "offset must not be negative, got -1");
  refuses_at(head + "a,0,1," + std::string(100, '9') + "\n", 2, 7, "...");
}

CHECK_NAMED(csv_write_refusals, "minimalloc csv: what is not written") {
  const Buffer one{0, 1, 1};
  check::refuses([&] { write_minimalloc_csv({{"a"}, {one, one}, {}}); }, {"the 2 buffers", "got 1 and 0"});
  check::refuses([&] { write_minimalloc_csv({{"a"}, {one}, {1, 2}}); }, {"the 1 buffers", "got 1 and 2"});
  check::refuses([&] { write_minimalloc_csv({{"a,b"}, {one}, {}}); }, {"\"a,b\"", "buffer 0"});
  check::refuses([&] { write_minimalloc_csv({{"a", "a"}, {one, one}, {}}); }, {"unique", "buffer 1"});
  check::refuses([&] { write_minimalloc_csv({{""}, {one}, {}}); }, {"not empty"});
}
