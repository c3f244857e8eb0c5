#include "memory/json.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <unordered_set>

#include "memory/errors.h"

namespace splitkern::memory {
namespace {

// Bytes of the UTF-8 character that begins here; 0 where none does.
size_t character_bytes(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u; };
  const auto follows = [&](size_t i, unsigned low = 0x80, unsigned high = 0xbf) {
    return byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (first < 0x80) return at < text.size() ? 1 : 0;
  if (first >= 0xc2 && first <= 0xdf) return follows(1) ? 2 : 0;
  if (first >= 0xe0 && first <= 0xef) {
    const bool second = follows(1, first == 0xe0 ? 0xa0 : 0x80, first == 0xed ? 0x9f : 0xbf);  // no surrogates
    return second && follows(2) ? 3 : 0;
  }
  if (first >= 0xf0 && first <= 0xf4) {
    const bool second = follows(1, first == 0xf0 ? 0x90 : 0x80, first == 0xf4 ? 0x8f : 0xbf);
    return second && follows(2) && follows(3) ? 4 : 0;
  }
  return 0;
}

[[noreturn]] void fail_at(std::string_view text, size_t position, const std::string& message) {
  int64_t line = 1;
  int64_t column = 1;
  for (size_t i = 0; i < std::min(position, text.size()); ++i) {
    if (text[i] == '\n') {
      ++line;
      column = 1;
    } else if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) {
      ++column;
    }
  }
  throw ParseError(message, line, column);
}

void append_quoted(std::string& out, std::string_view value) {
  static constexpr char kDigits[] = "0123456789abcdef";
  out += '"';
  for (const char c : value) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\r':
        out += "\\r";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          out += "\\u00";
          out += kDigits[(c >> 4) & 15];
          out += kDigits[c & 15];
        } else {
          out += c;
        }
    }
  }
  out += '"';
}

void append_index(std::string& path, size_t index) {
  path += "[";
  path += std::to_string(index);
  path += "]";
}

// For errors: short.
std::string quoted(std::string_view value) {
  constexpr size_t kMost = 40;
  std::string out;
  if (value.size() <= kMost) {
    append_quoted(out, value);
    return out;
  }
  size_t end = 0;
  while (end + character_bytes(value, end) <= kMost && character_bytes(value, end) > 0)
    end += character_bytes(value, end);
  append_quoted(out, value.substr(0, end));
  return out + "...";
}

std::string text_of(double value) {
  char buffer[32];
  const auto [end, error] = std::to_chars(buffer, buffer + sizeof(buffer), value);
  std::string text(buffer, end);
  // As an integer it would lose the sign of zero, or not fit 64 bits.
  if (text.find_first_of(".e") == std::string::npos) text += ".0";
  return text;
}

std::string described(const JsonValue& value) {
  struct Describe {
    std::string operator()(std::nullptr_t) const { return "null"; }
    std::string operator()(bool b) const { return b ? "true" : "false"; }
    std::string operator()(int64_t i) const { return std::to_string(i); }
    std::string operator()(double d) const { return text_of(d); }
    std::string operator()(const std::string& s) const { return quoted(s); }
    std::string operator()(const JsonValue::Array& a) const {
      return "an array of " + std::to_string(a.size()) + (a.size() == 1 ? " element" : " elements");
    }
    std::string operator()(const JsonValue::Object&) const { return "an object"; }
  };
  return std::visit(Describe{}, value.content);
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  JsonValue parse() {
    skip_space();
    JsonValue value = parse_value();
    skip_space();
    if (position_ < text_.size()) fail("expected the end of the text, got " + next());
    return value;
  }

 private:
  struct Step {
    std::string_view key;
    size_t index;  // where the key is none
    bool is_index;
  };

  [[noreturn]] void fail(const std::string& message) const { fail(message, position_); }
  [[noreturn]] void fail(const std::string& message, size_t position) const {
    std::string path;
    for (const Step& step : steps_) {
      if (step.is_index) {
        append_index(path, step.index);
      } else {
        if (!path.empty()) path += ".";
        path += step.key;
      }
    }
    fail_at(text_, position, path.empty() ? message : path + ": " + message);
  }
  // What comes next, for errors.
  std::string next() const {
    if (position_ >= text_.size()) return "the end of the text";
    const size_t bytes = character_bytes(text_, position_);
    if (bytes == 0) return "a byte that is not UTF-8";
    std::string out;
    append_quoted(out, text_.substr(position_, bytes));
    return out;
  }
  bool at(char c) const { return position_ < text_.size() && text_[position_] == c; }
  void skip_space() {
    while (at(' ') || at('\n') || at('\t') || at('\r')) ++position_;
  }

  JsonValue parse_value() {
    if (depth_ == kMaxJsonDepth) fail("at most " + std::to_string(kMaxJsonDepth) + " levels are allowed");
    JsonValue value;
    value.position = position_;
    if (at('{'))
      value.content = parse_object();
    else if (at('['))
      value.content = parse_array();
    else if (at('"'))
      value.content = parse_string();
    else if (at('-') || is_digit())
      parse_number(value);
    else if (take("true"))
      value.content = true;
    else if (take("false"))
      value.content = false;
    else if (take("null"))
      value.content = nullptr;
    else if (text_.substr(position_, 3) == "NaN" || text_.substr(position_, 3) == "Inf")
      fail("a number must be finite");
    else
      fail("expected a value, got " + next());
    return value;
  }

  bool take(std::string_view word) {
    if (text_.substr(position_, word.size()) != word) return false;
    position_ += word.size();
    return true;
  }

  JsonValue::Object parse_object() {
    JsonValue::Object object;
    std::unordered_set<std::string> keys;
    ++position_;
    ++depth_;
    skip_space();
    if (!at('}')) {
      while (true) {
        if (!at('"')) fail("expected a key in quotes, got " + next());
        const size_t begin = position_;
        std::string key = parse_string();
        // Few keys are found fastest by looking at each.
        constexpr size_t kFew = 32;
        if (object.size() == kFew) {
          for (const auto& [known, value] : object) keys.insert(known);
        }
        const bool is_known = object.size() < kFew ? std::any_of(
                                                         object.begin(), object.end(),
                                                         [&](const auto& member) { return member.first == key; })
                                                   : !keys.insert(key).second;
        if (is_known) fail("the key " + quoted(key) + " must come once", begin);
        skip_space();
        if (!at(':')) fail("expected \":\" after the key " + quoted(key) + ", got " + next());
        ++position_;
        skip_space();
        steps_.push_back({.key = key, .index = 0, .is_index = false});
        JsonValue value = parse_value();
        steps_.pop_back();
        object.emplace_back(std::move(key), std::move(value));
        skip_space();
        if (at('}')) break;
        if (!at(',')) fail("expected \",\" or \"}\", got " + next());
        ++position_;
        skip_space();
      }
    }
    ++position_;
    --depth_;
    return object;
  }

  JsonValue::Array parse_array() {
    JsonValue::Array array;
    ++position_;
    ++depth_;
    skip_space();
    if (!at(']')) {
      while (true) {
        steps_.push_back({.key = {}, .index = array.size(), .is_index = true});
        array.push_back(parse_value());
        steps_.pop_back();
        skip_space();
        if (at(']')) break;
        if (!at(',')) fail("expected \",\" or \"]\", got " + next());
        ++position_;
        skip_space();
      }
    }
    ++position_;
    --depth_;
    return array;
  }

  bool is_digit() const { return position_ < text_.size() && text_[position_] >= '0' && text_[position_] <= '9'; }
  void take_digits() {
    if (!is_digit()) fail("expected a digit, got " + next());
    while (is_digit()) ++position_;
  }
  void parse_number(JsonValue& value) {
    const size_t begin = position_;
    bool is_integer = true;
    if (at('-')) ++position_;
    if (text_.substr(position_, 3) == "Inf") fail("a number must be finite", begin);
    if (at('0')) {
      ++position_;
      if (is_digit()) fail("a number must not begin with 0, got " + next() + " after it");
    } else {
      take_digits();
    }
    if (at('.')) {
      is_integer = false;
      ++position_;
      take_digits();
    }
    if (at('e') || at('E')) {
      is_integer = false;
      ++position_;
      if (at('+') || at('-')) ++position_;
      take_digits();
    }
    const std::string_view digits = text_.substr(begin, position_ - begin);
    if (is_integer) {
      int64_t integer = 0;
      if (std::from_chars(digits.begin(), digits.end(), integer).ec != std::errc{})
        fail("an integer must be from " + std::to_string(std::numeric_limits<int64_t>::min()) + " to " +
                 std::to_string(std::numeric_limits<int64_t>::max()) + ", got " + shortened(digits),
             begin);
      value.content = integer;
      return;
    }
    double number = 0;
    if (std::from_chars(digits.begin(), digits.end(), number).ec != std::errc{} || !std::isfinite(number))
      fail("a number must fit a double, got " + shortened(digits), begin);
    value.content = number;
  }
  static std::string shortened(std::string_view digits) {
    constexpr size_t kMost = 40;
    return digits.size() <= kMost ? std::string(digits) : std::string(digits.substr(0, kMost)) + "...";
  }

  unsigned parse_unit() {
    unsigned unit = 0;
    for (int i = 0; i < 4; ++i, ++position_) {
      const char c = position_ < text_.size() ? text_[position_] : '\0';
      if (c >= '0' && c <= '9')
        unit = unit * 16 + static_cast<unsigned>(c - '0');
      else if (c >= 'a' && c <= 'f')
        unit = unit * 16 + static_cast<unsigned>(c - 'a' + 10);
      else if (c >= 'A' && c <= 'F')
        unit = unit * 16 + static_cast<unsigned>(c - 'A' + 10);
      else
        fail("expected four hexadecimal digits, got " + next());
    }
    return unit;
  }
  static void append_character(std::string& out, unsigned code) {
    const auto byte = [&](unsigned value) { out += static_cast<char>(value); };
    if (code < 0x80) {
      byte(code);
    } else if (code < 0x800) {
      byte(0xc0 | code >> 6);
      byte(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
      byte(0xe0 | code >> 12);
      byte(0x80 | (code >> 6 & 0x3f));
      byte(0x80 | (code & 0x3f));
    } else {
      byte(0xf0 | code >> 18);
      byte(0x80 | (code >> 12 & 0x3f));
      byte(0x80 | (code >> 6 & 0x3f));
      byte(0x80 | (code & 0x3f));
    }
  }
  void parse_escape(std::string& out) {
    const size_t begin = position_++;
    const char c = position_ < text_.size() ? text_[position_] : '\0';
    static constexpr std::string_view kLetters = "\"\\/bfnrt";
    static constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    const size_t letter = kLetters.find(c);
    if (letter != std::string_view::npos) {
      out += kMeanings[letter];
      ++position_;
      return;
    }
    if (c != 'u') fail("expected one of \"\\/bfnrtu after a backslash, got " + next());
    ++position_;
    unsigned code = parse_unit();
    if (code >= 0xdc00 && code <= 0xdfff) fail("half of a surrogate pair", begin);
    if (code >= 0xd800 && code <= 0xdbff) {
      if (!take("\\u")) fail("half of a surrogate pair", begin);
      const unsigned low = parse_unit();
      if (low < 0xdc00 || low > 0xdfff) fail("half of a surrogate pair", begin);
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    append_character(out, code);
  }
  std::string parse_string() {
    const size_t begin = position_++;
    std::string out;
    while (!at('"')) {
      if (position_ >= text_.size()) fail("a string without an end", begin);
      if (at('\\')) {
        parse_escape(out);
        continue;
      }
      const size_t bytes = character_bytes(text_, position_);
      if (bytes == 0) fail("a string must be UTF-8, got a byte that is not");
      if (static_cast<unsigned char>(text_[position_]) < 0x20)
        fail("a control character must be escaped, got " + next());
      out += text_.substr(position_, bytes);
      position_ += bytes;
    }
    ++position_;
    return out;
  }

  std::string_view text_;
  size_t position_ = 0;
  int depth_ = 0;
  std::vector<Step> steps_;
};

}  // namespace

JsonValue parse_json(std::string_view text) {
  return Parser(text).parse();
}

std::string JsonNode::path() const {
  if (parent_ == nullptr) return "";
  std::string path = parent_->path();
  if (key_.data() == nullptr) {
    append_index(path, index_);
  } else {
    if (!path.empty()) path += ".";
    path += key_;
  }
  return path;
}

void JsonNode::refuse(const std::string& allowed) const {
  fail("must be " + allowed + ", got " + described(*value_));
}

void JsonNode::fail(const std::string& text) const {
  const std::string place = path();
  fail_at(text_, value_->position, (place.empty() ? "the document" : place) + " " + text);
}

void read_json(const JsonNode& node, bool& out) {
  const bool* value = std::get_if<bool>(&node.value().content);
  if (value == nullptr) node.refuse("true or false");
  out = *value;
}

void read_json(const JsonNode& node, int64_t& out) {
  const int64_t* value = std::get_if<int64_t>(&node.value().content);
  if (value == nullptr) node.refuse("an integer");
  out = *value;
}

void read_json(const JsonNode& node, int32_t& out) {
  const int64_t* value = std::get_if<int64_t>(&node.value().content);
  if (value == nullptr || *value < std::numeric_limits<int32_t>::min() || *value > std::numeric_limits<int32_t>::max())
    node.refuse("an integer of 32 bits");
  out = static_cast<int32_t>(*value);
}

void read_json(const JsonNode& node, double& out) {
  if (const double* value = std::get_if<double>(&node.value().content)) {
    out = *value;
  } else if (const int64_t* integer = std::get_if<int64_t>(&node.value().content)) {
    out = static_cast<double>(*integer);
  } else {
    node.refuse("a number");
  }
}

void read_json(const JsonNode& node, std::string& out) {
  const std::string* value = std::get_if<std::string>(&node.value().content);
  if (value == nullptr) node.refuse("a string");
  out = *value;
}

const JsonValue::Array& require_array(const JsonNode& node) {
  const JsonValue::Array* value = std::get_if<JsonValue::Array>(&node.value().content);
  if (value == nullptr) node.refuse("an array");
  return *value;
}

size_t read_json_name(const JsonNode& node, const std::vector<std::string_view>& names) {
  const std::string* value = std::get_if<std::string>(&node.value().content);
  const auto found = value == nullptr ? names.end() : std::find(names.begin(), names.end(), *value);
  if (found == names.end()) {
    std::string allowed;
    for (const std::string_view name : names) allowed += (allowed.empty() ? "one of " : ", ") + quoted(name);
    node.refuse(allowed);
  }
  return static_cast<size_t>(found - names.begin());
}

JsonFields::JsonFields(const JsonNode& node)
    : node_(node), object_([&]() -> const JsonValue::Object& {
        const JsonValue::Object* object = std::get_if<JsonValue::Object>(&node.value().content);
        if (object == nullptr) node.refuse("an object");
        return *object;
      }()) {}

const JsonValue* JsonFields::find(std::string_view key) {
  known_.push_back(key);
  for (const auto& [name, value] : object_) {
    if (name != key) continue;
    ++found_;
    return &value;
  }
  return nullptr;
}

const JsonValue& JsonFields::require(std::string_view key) {
  const JsonValue* value = find(key);
  if (value == nullptr) node_.fail("must have the field " + quoted(key));
  return *value;
}

void JsonFields::finish() const {
  if (found_ == object_.size()) return;
  for (const auto& [name, value] : object_) {
    if (std::find(known_.begin(), known_.end(), name) != known_.end()) continue;
    std::string allowed;
    for (const std::string_view key : known_) allowed += (allowed.empty() ? "" : ", ") + std::string(key);
    JsonNode(node_, name, value).fail("is an unknown field; allowed are " + allowed);
  }
}

int64_t read_json_header(JsonFields& fields, std::string_view format, int64_t newest) {
  const JsonNode kind(fields.node(), "format", fields.require("format"));
  std::string name;
  read_json(kind, name);
  if (name != format) kind.refuse(quoted(format));
  const JsonNode node(fields.node(), "version", fields.require("version"));
  int64_t version = 0;
  read_json(node, version);
  if (version < 1 || version > newest)
    node.refuse(newest == 1 ? "1, the only version that this library reads"
                            : "from 1 to " + std::to_string(newest) + ", the newest version that this library reads");
  return version;
}

void JsonWriter::separate() {
  if (needs_comma_) text_ += on_new_line_ ? "," : ", ";
  if (on_new_line_) text_ += "\n";
  on_new_line_ = false;
  needs_comma_ = false;
}

JsonWriter& JsonWriter::open(char bracket) {
  separate();
  text_ += bracket;
  return *this;
}

JsonWriter& JsonWriter::close(char bracket) {
  if (on_new_line_) text_ += "\n";
  on_new_line_ = false;
  text_ += bracket;
  needs_comma_ = true;
  return *this;
}

JsonWriter& JsonWriter::key(std::string_view key) {
  write(key);
  text_ += ": ";
  needs_comma_ = false;
  return *this;
}

JsonWriter& JsonWriter::new_line() {
  on_new_line_ = true;
  return *this;
}

void JsonWriter::write(bool value) {
  separate();
  text_ += value ? "true" : "false";
  needs_comma_ = true;
}

void JsonWriter::write(int64_t value) {
  separate();
  text_ += std::to_string(value);
  needs_comma_ = true;
}

void JsonWriter::write(double value) {
  if (!std::isfinite(value)) throw InvalidArgument("a number in JSON must be finite, got " + std::to_string(value));
  separate();
  text_ += text_of(value);
  needs_comma_ = true;
}

void JsonWriter::write(std::string_view value) {
  for (size_t i = 0; i < value.size();) {
    const size_t bytes = character_bytes(value, i);
    if (bytes == 0) {
      std::string printable;
      for (const char c : value.substr(0, 40)) printable += c >= 0x20 && c < 0x7f ? c : '?';
      throw InvalidArgument("a string in JSON must be UTF-8, got \"" + printable + "\" with another byte at " +
                            std::to_string(i));
    }
    i += bytes;
  }
  separate();
  append_quoted(text_, value);
  needs_comma_ = true;
}

void JsonWriter::write_null() {
  separate();
  text_ += "null";
  needs_comma_ = true;
}

std::string JsonWriter::take() {
  return std::move(text_) + "\n";
}

}  // namespace splitkern::memory
