#include "memory/minimalloc_csv.h"

#include <array>
#include <charconv>
#include <optional>
#include <unordered_set>

#include "memory/errors.h"

namespace splitkern::memory {
namespace {

constexpr std::array<std::string_view, 5> kColumns = {"id", "lower", "upper", "size", "offset"};
enum Column : size_t { kId, kLower, kUpper, kSize, kOffset };

std::string quoted(std::string_view text) {
  constexpr size_t kShown = 40;
  std::string result(1, '"');
  result.append(text.substr(0, kShown));
  if (text.size() > kShown) result.append("...");
  result.push_back('"');
  return result;
}

struct Field {
  std::string_view text;
  int64_t column;  // counts from 1
};

// Lines without their ends; fields without their commas.
class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  bool next() {
    if (rest_.empty()) return false;
    ++line;
    const size_t end = rest_.find('\n');
    std::string_view text = rest_.substr(0, end);
    rest_ = end == std::string_view::npos ? std::string_view() : rest_.substr(end + 1);
    if (!text.empty() && text.back() == '\r') text.remove_suffix(1);
    fields.clear();
    int64_t column = 1;
    for (;;) {
      const size_t comma = text.find(',');
      fields.push_back({text.substr(0, comma), column});
      if (comma == std::string_view::npos) return true;
      text.remove_prefix(comma + 1);
      column += static_cast<int64_t>(comma) + 1;
    }
  }

  [[noreturn]] void refuse(const std::string& text, int64_t column) const {
    throw ParseError("MiniMalloc CSV: " + text, line, column);
  }

  std::vector<Field> fields;
  int64_t line = 0;

 private:
  std::string_view rest_;
};

int64_t number(const Reader& reader, const Field& field, std::string_view name) {
  int64_t value = 0;
  const char* end = field.text.data() + field.text.size();
  const auto [stop, error] = std::from_chars(field.text.data(), end, value);
  if (error == std::errc::result_out_of_range && stop == end) {
    reader.refuse(std::string(name) + " must fit 64 bits, got " + quoted(field.text), field.column);
  }
  if (error != std::errc() || stop != end) {
    reader.refuse(std::string(name) + " must be an integer, got " + quoted(field.text), field.column);
  }
  return value;
}

}  // namespace

MinimallocCsv read_minimalloc_csv(std::string_view text) {
  Reader reader(text);
  if (!reader.next()) throw ParseError("MiniMalloc CSV: the first line must name the columns, got nothing", 1, 1);
  std::array<std::optional<size_t>, kColumns.size()> place_of;
  for (size_t k = 0; k < reader.fields.size(); ++k) {
    const Field& field = reader.fields[k];
    size_t column = 0;
    while (column < kColumns.size() && kColumns[column] != field.text) ++column;
    if (column == kColumns.size()) {
      reader.refuse("a column must be one of id, lower, upper, size, offset, got " + quoted(field.text), field.column);
    }
    if (place_of[column]) reader.refuse("column " + quoted(field.text) + " is there twice", field.column);
    place_of[column] = k;
  }
  for (const size_t column : {kId, kLower, kUpper, kSize}) {
    if (!place_of[column]) reader.refuse("column " + quoted(kColumns[column]) + " is missing", 1);
  }
  const size_t width = reader.fields.size();

  MinimallocCsv csv;
  std::unordered_set<std::string_view> seen;  // views into `text`
  while (reader.next()) {
    const auto& fields = reader.fields;
    if (fields.size() != width) {
      const Field& at = fields.size() > width ? fields[width] : fields.back();
      reader.refuse("a line must have " + std::to_string(width) + " fields, got " + std::to_string(fields.size()),
                    fields.size() > width ? at.column : at.column + static_cast<int64_t>(at.text.size()));
    }
    const Field& id = fields[*place_of[kId]];
    if (id.text.empty()) reader.refuse("id must not be empty", id.column);
    if (!seen.insert(id.text).second) reader.refuse("id " + quoted(id.text) + " is there twice", id.column);
    Buffer buffer;
    buffer.begin = number(reader, fields[*place_of[kLower]], "lower");
    buffer.end = number(reader, fields[*place_of[kUpper]], "upper");
    buffer.size_bytes = number(reader, fields[*place_of[kSize]], "size");
    if (buffer.begin >= buffer.end) {
      reader.refuse(
          "lower must be below upper, got " + std::to_string(buffer.begin) + " and " + std::to_string(buffer.end),
          fields[*place_of[kLower]].column);
    }
    if (buffer.size_bytes < 0) {
      reader.refuse("size must not be negative, got " + std::to_string(buffer.size_bytes),
                    fields[*place_of[kSize]].column);
    }
    if (place_of[kOffset]) {
      const Field& field = fields[*place_of[kOffset]];
      const int64_t offset = number(reader, field, "offset");
      if (offset < 0) reader.refuse("offset must not be negative, got " + std::to_string(offset), field.column);
      csv.offsets.push_back(offset);
    }
    csv.ids.emplace_back(id.text);
    csv.buffers.push_back(buffer);
  }
  return csv;
}

std::string write_minimalloc_csv(const MinimallocCsv& csv) {
  const size_t count = csv.buffers.size();
  if (csv.ids.size() != count || (!csv.offsets.empty() && csv.offsets.size() != count)) {
    throw InvalidArgument("write_minimalloc_csv: ids and offsets must be as many as the " + std::to_string(count) +
                          " buffers (offsets may be none), got " + std::to_string(csv.ids.size()) + " and " +
                          std::to_string(csv.offsets.size()));
  }
  std::unordered_set<std::string_view> seen;
  std::string text = csv.offsets.empty() ? "id,lower,upper,size\n" : "id,lower,upper,size,offset\n";
  for (size_t i = 0; i < count; ++i) {
    const std::string& id = csv.ids[i];
    if (id.empty() || id.find_first_of(",\r\n") != std::string::npos || !seen.insert(id).second) {
      throw InvalidArgument("write_minimalloc_csv: ids must be unique, not empty and without comma and line end, got " +
                            quoted(id) + " for buffer " + std::to_string(i));
    }
    const Buffer& buffer = csv.buffers[i];
    const auto append = [&](int64_t value) {
      text.push_back(',');
      text.append(std::to_string(value));
    };
    text.append(id);
    append(buffer.begin);
    append(buffer.end);
    append(buffer.size_bytes);
    if (!csv.offsets.empty()) append(csv.offsets[i]);
    text.push_back('\n');
  }
  return text;
}

}  // namespace splitkern::memory
