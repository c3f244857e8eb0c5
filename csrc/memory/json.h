// A small strict reader and writer of JSON (RFC 8259) for the value types of this library. Called by graph_json and
// plan_json. Refused beyond what the RFC refuses: a key twice, integers beyond 64 bits, numbers that a double does not
// hold, text that is not UTF-8, more than kMaxDepth levels, anything behind the value. Errors are ParseError: the path
// (operations[3].reads[0]), what is allowed, what came, line and column (in characters).
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace splitkern::memory {

struct JsonValue {
  using Array = std::vector<JsonValue>;
  using Object = std::vector<std::pair<std::string, JsonValue>>;  // in the order of the text

  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> content;
  size_t position = 0;  // of its first byte in the text

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(content); }
};

inline constexpr int kMaxJsonDepth = 64;

JsonValue parse_json(std::string_view text);

// A value of a document with the way to it. Valid as long as the text, the value and the parent.
class JsonNode {
 public:
  JsonNode(std::string_view text, const JsonValue& value) : text_(text), value_(&value) {}
  JsonNode(const JsonNode& parent, std::string_view key, const JsonValue& value)
      : text_(parent.text_), value_(&value), parent_(&parent), key_(key) {}
  JsonNode(const JsonNode& parent, size_t index, const JsonValue& value)
      : text_(parent.text_), value_(&value), parent_(&parent), index_(index) {}

  const JsonValue& value() const { return *value_; }
  std::string path() const;  // "" for the document
  // ParseError "PATH must be ALLOWED, got VALUE at line ...".
  [[noreturn]] void refuse(const std::string& allowed) const;
  // ParseError "PATH TEXT at line ...".
  [[noreturn]] void fail(const std::string& text) const;

 private:
  std::string_view text_;
  const JsonValue* value_;
  const JsonNode* parent_ = nullptr;
  std::string_view key_;
  size_t index_ = 0;
};

void read_json(const JsonNode& node, bool& out);
void read_json(const JsonNode& node, int64_t& out);
void read_json(const JsonNode& node, int32_t& out);
void read_json(const JsonNode& node, double& out);
void read_json(const JsonNode& node, std::string& out);

const JsonValue::Array& require_array(const JsonNode& node);

template <class T>
void read_json(const JsonNode& node, std::vector<T>& out) {
  const JsonValue::Array& items = require_array(node);
  out.clear();
  out.reserve(items.size());
  for (size_t i = 0; i < items.size(); ++i) read_json(JsonNode(node, i, items[i]), out.emplace_back());
}

// One of `names`, by position.
size_t read_json_name(const JsonNode& node, const std::vector<std::string_view>& names);

// The fields of an object: read() each, then finish(), which refuses all others.
class JsonFields {
 public:
  explicit JsonFields(const JsonNode& node);

  // What is left out keeps its value.
  template <class T>
  void read(std::string_view key, T& out) {
    if (const JsonValue* value = find(key)) read_json(JsonNode(node_, key, *value), out);
  }
  // Nothing where it is left out.
  const JsonValue* find(std::string_view key);
  const JsonValue& require(std::string_view key);
  void finish() const;
  const JsonNode& node() const { return node_; }

 private:
  const JsonNode& node_;
  const JsonValue::Object& object_;
  std::vector<std::string_view> known_;
  size_t found_ = 0;
};

// Reads "format" and "version" of a document: another format and newer versions are refused. Returns the version.
int64_t read_json_header(JsonFields& fields, std::string_view format, int64_t newest);

// Appends JSON to a text. Objects and arrays are opened and closed by the caller; commas are its own work.
class JsonWriter {
 public:
  JsonWriter& begin_object() { return open('{'); }
  JsonWriter& end_object() { return close('}'); }
  JsonWriter& begin_array() { return open('['); }
  JsonWriter& end_array() { return close(']'); }
  JsonWriter& key(std::string_view key);
  // The next value begins on a line of its own, for people who read it and for line numbers in errors.
  JsonWriter& new_line();

  void write(bool value);
  void write(int32_t value) { write(int64_t{value}); }
  void write(int64_t value);
  void write(double value);  // the shortest text that reads back equal; InvalidArgument where it is not finite
  void write(std::string_view value);  // InvalidArgument where it is not UTF-8
  void write(const std::string& value) { write(std::string_view(value)); }
  void write(const char* value) { write(std::string_view(value)); }
  void write_null();
  template <class T>
  void write(const std::vector<T>& values) {
    begin_array();
    for (const T& value : values) write(value);
    end_array();
  }
  template <class T>
  JsonWriter& field(std::string_view name, const T& value) {
    key(name);
    write(value);
    return *this;
  }

  std::string take();  // the text, with a newline at its end

 private:
  JsonWriter& open(char bracket);
  JsonWriter& close(char bracket);
  void separate();

  std::string text_;
  bool needs_comma_ = false;
  bool on_new_line_ = false;
};

}  // namespace splitkern::memory
