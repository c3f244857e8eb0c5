// Checks of graphs and plans as JSON: what is written reads back equal, what is wrong is refused where it is, and no
// text crashes the reader.
#include "memory/json.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "graphs.h"
#include "memory/errors.h"
#include "memory/graph_json.h"
#include "memory/plan_json.h"
#include "native/check.h"

using namespace splitkern::memory;

namespace {

// No field has its default, so a field that is not written or not read is seen.
Graph every_field() {
  Graph graph{.name = "every \"field\"\n\x01\x7f\\ ü 学 😀",
              .storages = {},
              .tensors = {},
              .operations = {},
              .durations_from = "measured: x"};
  graph.storages = {{.name = "weights",
                     .size_bytes = std::numeric_limits<int64_t>::max(),
                     .kind = StorageKind::kParameter,
                     .is_output = true},
                    {.name = "g", .size_bytes = 2, .kind = StorageKind::kGradient},
                    {.name = "i", .size_bytes = 3, .kind = StorageKind::kInput},
                    {.name = "a",
                     .size_bytes = 4,
                     .kind = StorageKind::kActivation,
                     .compression = Compression{.ratio = 1.75, .element_bytes = 2}}};
  graph.tensors = {
      {.name = "t", .storage = 3, .offset_bytes = 5, .sizes = {2, 3}, .strides_bytes = {12, 4}, .element_bytes = 4}};
  graph.operations = {{.name = "op",
                       .target = "conv2d",
                       .duration_us = 0.1,
                       .workspace_bytes = 7,
                       .reads = {1, 2},
                       .writes = {3},
                       .inplace = {{.read = 1, .write = 2}, {.read = 3, .write = 4}},
                       .accumulates = {5},
                       .mutates = {6, 7},
                       .is_sum = true,
                       .is_random = true,
                       .is_backward = true,
                       .patch = 8,
                       .segment = "stem",
                       .module = "layer1.0.conv1"}};
  return graph;
}

Plan every_plan_field() {
  Plan plan;
  plan.graph_fingerprint = "abc";
  plan.strategy = "hmms-paper";
  plan.limits = {.device_bytes = 1,
                 .host_bytes = 2,
                 .offload_gbps = 3.5,
                 .prefetch_gbps = 4.25,
                 .copy_latency_us = 5,
                 .alignment_bytes = 256};
  plan.storages = {{.size_bytes = 9, .members = {1, 2}, .compression = Compression{.ratio = 1.5, .element_bytes = 8}}};
  plan.fused = {{.sum = 3, .producer = 4}};
  plan.instances = {{.operation = 5, .is_recomputation = true, .accumulate = true}};
  plan.boundaries = {{.waits = {1}, .issues = {2, 3}}, {}};
  plan.residencies = {{.storage = 1, .pool = Pool::kDevice, .offset_bytes = 2, .size_bytes = 3, .begin = 4, .end = 5},
                      {.storage = -1, .pool = Pool::kParameters},
                      {.storage = 2, .pool = Pool::kHost}};
  plan.copies = {{.kind = CopyKind::kPrefetch,
                  .storage = 1,
                  .source = 2,
                  .destination = 3,
                  .issue = 4,
                  .wait = 5,
                  .after = {6},
                  .compressed = true},
                 {.kind = CopyKind::kOffload, .storage = 7, .after = {}}};
  plan.predicted = {.step_us = 1.5,
                    .compute_us = 2.5,
                    .recompute_us = 3.5,
                    .stall_us = 4.5,
                    .device_peak_bytes = 5,
                    .parameters_peak_bytes = 6,
                    .host_peak_bytes = 7,
                    .device_lower_bound_bytes = 8,
                    .host_lower_bound_bytes = 9};
  return plan;
}

void refused(const std::string& text, const std::vector<std::string>& parts) {
  check::refuses([&] { graph_from_json(text); }, parts);
}

// A graph's text with one place replaced.
std::string changed(const std::string& from, const std::string& to) {
  std::string text = to_json(every_field());
  const size_t place = text.find(from);
  check::require(place != std::string::npos, "the text has " + from);
  return text.replace(place, from.size(), to);
}

double read_number(const std::string& text) {
  const JsonValue value = parse_json(text);
  double number = 0;
  read_json(JsonNode(text, value), number);
  return number;
}

}  // namespace

CHECK_NAMED(json_round_trip, "json: graphs and plans read back equal, every field of them") {
  const Graph graph = every_field();
  check::require(graph_from_json(to_json(graph)) == graph, "every field of a graph");
  const Plan plan = every_plan_field();
  check::require(plan_from_json(to_json(plan)) == plan, "every field of a plan");
  for (const Graph& step : graphs::small_training_steps()) {
    const Graph again = graph_from_json(to_json(step));
    check::require(again == step && to_json(again) == to_json(step) && fingerprint(again) == fingerprint(step),
                   step.name);
  }
  check::require(graph_from_json(to_json(Graph{})) == Graph{}, "an empty graph");
  check::require(plan_from_json(to_json(Plan{})) == Plan{}, "an empty plan");
  check::require(to_json(Plan{}).find("\"device_bytes\": null") != std::string::npos, "unlimited is null");
}

CHECK_NAMED(json_defaults, "json: fields that are left out have their default") {
  check::require(graph_from_json(R"({"format":"splitkern.graph","version":1})") == Graph{}, "graph");
  check::require(plan_from_json(R"( {"version":1,"format":"splitkern.plan"} )") == Plan{}, "plan");
  const Graph graph =
      graph_from_json(R"({"format":"splitkern.graph","version":1,"storages":[{}],"operations":[{"duration_us":3}]})");
  check::require(graph.storages == std::vector<Storage>(1), "storage");
  check::equal(graph.operations.at(0).patch, -1, "patch");
  check::equal(graph.operations.at(0).duration_us, 3.0, "an integer where a number may be");
}

CHECK_NAMED(json_refusals, "json: what is refused, with path, line and column") {
  refused("", {"expected a value", "end of the text", "line 1, column 1"});
  refused("{\n  \"format\": \"splitkern.graph\",\n  \"ü\": flase}", {"expected a value", "\"f\"", "line 3, column 8"});
  refused("[1]", {"the document must be an object", "an array of 1 element"});
  refused("{}", {"must have the field \"format\"", "line 1, column 1"});
  refused(R"({"format":"splitkern.plan"})",
          {"format must be \"splitkern.graph\"", "got \"splitkern.plan\"", "column 11"});
  refused(R"({"format":"splitkern.graph"})", {"must have the field \"version\""});
  refused(R"({"format":"splitkern.graph","version":3})", {"version must be from 1 to 2", "newest version", "got 3"});
  refused(R"({"format":"splitkern.graph","version":0})", {"version must be from 1 to 2", "got 0"});
  refused(R"({"format":"splitkern.graph","version":1,"x":1})",
          {"x is an unknown field", "durations_from, storages", "column 45"});
  refused(changed("\"patch\"", "\"patsh\""),
          {"operations[0].patsh is an unknown field", "name, target, duration_us", "line 10"});
  refused(changed("\"size_bytes\": 2", "\"size_bytes\": 2.0"),
          {"storages[1].size_bytes must be an integer, got 2.0", "line 4"});
  refused(changed("\"size_bytes\": 2", "\"size_bytes\": true"),
          {"storages[1].size_bytes must be an integer, got true"});
  refused(changed("9223372036854775807", "9223372036854775808"),
          {"storages[0].size_bytes: an integer must be from", "got 9223372036854775808"});
  refused(
      changed("\"gradient\"", "\"gradiant\""),
      {"storages[1].kind must be one of \"parameter\", \"gradient\", \"input\", \"activation\"", "got \"gradiant\""});
  refused(changed("\"is_output\": true", "\"is_output\": 1"), {"storages[0].is_output must be true or false, got 1"});
  refused(changed("\"storage\": 3", "\"storage\": 3000000000"), {"tensors[0].storage must be an integer of 32 bits"});
  refused(changed("\"reads\": [1, 2]", "\"reads\": [1, \"2\"]"),
          {"operations[0].reads[1] must be an integer of 32 bits, got \"2\""});
  refused(changed("\"reads\": [1, 2]", "\"reads\": null"), {"operations[0].reads must be an array, got null"});
  refused(changed("[1, 2], [3, 4]", "[1, 2], [3]"),
          {"operations[0].inplace[1] must be an array [read, write]", "1 element"});
  refused(changed("\"stem\"", "7"), {"operations[0].segment must be a string, got 7"});
  refused(changed("0.1", "\"0.1\""), {"operations[0].duration_us must be a number"});
  refused(changed("\"segment\": \"stem\"", "\"name\": \"stem\""),
          {"operations[0]", "\"name\" must come once", "line 10"});
  for (const char* number : {"NaN", "Infinity", "-Infinity"})
    refused(changed("0.1", number), {"operations[0].duration_us: a number must be finite"});
  refused(changed("0.1", "1e400"), {"a number must fit a double, got 1e400"});
  refused(changed("0.1", "00.1"), {"a number must not begin with 0"});
  refused(changed("0.1", ".1"), {"expected a value, got \".\""});
  refused(changed("0.1", "1."), {"expected a digit, got \",\""});
  refused(changed("0.1", "+1"), {"expected a value, got \"+\""});
  refused(changed("0.1", "0x1"), {"operations[0]: expected \",\" or \"}\", got \"x\""});
  refused(changed("[1, 2]", "[1, 2,]"), {"operations[0].reads[2]: expected a value, got \"]\""});
  refused(changed("[1, 2]", "[1 2]"), {"operations[0].reads: expected \",\" or \"]\", got \"2\""});
  refused(changed("\"stem\"", "\"st\tem\""), {"a control character must be escaped", "\\t"});
  refused(changed("\"stem\"", "\"st\\xem\""), {"after a backslash", "got \"x\""});
  refused(changed("\"stem\"", "\"\\ud800x\""), {"surrogate"});
  refused(changed("\"stem\"", "\"\\ud800\\u0041\""), {"surrogate"});
  refused(changed("\"stem\"", "\"\\udc00\""), {"surrogate"});
  refused(changed("\"stem\"", "\"\\u12g4\""), {"four hexadecimal digits", "\"g\""});
  refused(changed("\"stem\"", "'stem'"), {"expected a value, got \"'\""});
  for (const char* bytes :
       {"\xff", "\xc3", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf0\x80\x80\x80"})
    refused(changed("stem", bytes), {"a string must be UTF-8", "line 10"});
  refused(to_json(every_field()) + "x", {"expected the end of the text, got \"x\"", "line 11, column 1"});
  refused("\xef\xbb\xbf{}", {"expected a value"});
  refused(std::string(1'000'000, '['), {"at most 64 levels", "column 65"});
  check::refuses([] { plan_from_json(R"({"format":"splitkern.plan","version":1,"limits":{"host_bytes":"all"}})"); },
                 {"limits.host_bytes must be an integer, or null for no limit, got \"all\""});
  check::refuses([] { plan_from_json(R"({"format":"splitkern.plan","version":1,"residencies":[{"pool":"gpu"}]})"); },
                 {"residencies[0].pool must be one of \"device\", \"parameters\", \"host\", got \"gpu\""});
  check::refuses([] { plan_from_json(R"({"format":"splitkern.plan","version":1,"copies":[{"kind":1}]})"); },
                 {"copies[0].kind must be one of \"offload\", \"prefetch\", got 1"});
  try {
    parse_json("[1,\n 2,\n x]");
    check::require(false, "refused");
  } catch (const ParseError& error) {
    check::equal(error.line, 3, "line");
    check::equal(error.column, 2, "column");
  }
}

CHECK_NAMED(json_write_refusals, "json: what cannot be written is refused") {
  Graph graph = every_field();
  graph.operations[0].duration_us = NAN;
  check::refuses([&] { to_json(graph); }, {"finite", "nan"});
  graph = every_field();
  graph.storages[0].name = "ab\xff";
  check::refuses([&] { to_json(graph); }, {"UTF-8", "\"ab?\"", "at 2"});
  graph = every_field();
  graph.storages[0].kind = static_cast<StorageKind>(9);
  check::refuses([&] { to_json(graph); }, {"storage kind", "9"});
}

CHECK_NAMED(json_numbers, "json: numbers come back exactly") {
  std::mt19937_64 random(1);
  std::vector<double> numbers = {0.0, -0.0, 0.1, 1e308, 5e-324, 2.2250738585072014e-308, 123456789012345680.0, 1.0 / 3};
  while (numbers.size() < 10000) {
    const uint64_t bits = random();
    double number = 0;
    static_assert(sizeof(number) == sizeof(bits));
    std::memcpy(&number, &bits, sizeof(number));
    if (std::isfinite(number)) numbers.push_back(number);
  }
  for (const double number : numbers) {
    JsonWriter writer;
    writer.write(number);
    const double again = read_number(writer.take());
    check::require(again == number && std::signbit(again) == std::signbit(number), std::to_string(number));
  }
  const std::string text = "[9223372036854775807, -9223372036854775808, 9007199254740993, -0]";
  const JsonValue value = parse_json(text);
  std::vector<int64_t> integers;
  read_json(JsonNode(text, value), integers);
  check::require(integers == std::vector<int64_t>{std::numeric_limits<int64_t>::max(),
                                                  std::numeric_limits<int64_t>::min(), 9007199254740993, 0},
                 "integers");
  check::equal(read_number("1E+2"), 100.0, "1E+2");
  check::equal(read_number("25e-1"), 2.5, "25e-1");
}

CHECK_NAMED(json_strings, "json: strings come back, escaped or not") {
  const std::string text = R"("a\u00fc\ud83d\ude00\n\/\u0000b")";
  const JsonValue value = parse_json(text);
  std::string out;
  read_json(JsonNode(text, value), out);
  check::require(out == std::string("aü😀\n/") + '\0' + "b", "escapes");
  JsonWriter writer;
  writer.write(out);
  const std::string written = writer.take();
  const JsonValue again = parse_json(written);
  check::require(std::get<std::string>(again.content) == out, "round trip");
}

CHECK_NAMED(json_many_keys, "json: a key that comes twice among many is found") {
  std::string text = "{";
  for (int i = 0; i < 5000; ++i) text += "\"k" + std::to_string(i) + "\":1,";
  check::require(std::get<JsonValue::Object>(parse_json(text + "\"x\":1}").content).size() == 5001, "without");
  for (const char* key : {"k3", "k40", "k4999"}) {
    const std::string twice = text + "\"" + key + "\":1}";
    check::refuses([&] { parse_json(twice); }, {std::string("\"") + key + "\" must come once"});
  }
}

CHECK_NAMED(json_truncated, "json: every prefix of a document is refused") {
  const std::string graph = to_json(every_field());
  const std::string plan = to_json(every_plan_field());
  for (const std::string& text : {graph, plan}) {
    for (size_t bytes = 0; bytes + 1 < text.size(); ++bytes) {  // the last byte is a newline
      // A copy of exactly this size, so that a read beyond it is seen by the address sanitizer.
      const std::vector<char> prefix(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(bytes));
      check::refuses([&] { parse_json({prefix.data(), prefix.size()}); }, {"line"});
    }
  }
}

CHECK_NAMED(json_flipped, "json: changed bytes are read or refused, never worse") {
  std::mt19937_64 random(2);
  const std::string graph = to_json(every_field());
  const std::string plan = to_json(every_plan_field());
  int read = 0;
  int refused = 0;
  for (int round = 0; round < 4000; ++round) {
    const bool is_graph = round % 2 == 0;
    std::string text = is_graph ? graph : plan;
    for (uint64_t changes = 1 + random() % 3; changes > 0; --changes) {
      const size_t place = random() % text.size();
      switch (random() % 4) {
        case 0:
          text[place] = static_cast<char>(random());
          break;
        case 1:
          text[place] = "{}[]\",:0-.e\\nu"[random() % 14];
          break;
        case 2:
          text.erase(place, 1 + random() % 4);
          break;
        default:
          text.insert(place, text.substr(random() % text.size(), random() % 8));
      }
      if (text.empty()) break;
    }
    try {
      // What reads is a value: it can be written and reads back equal.
      if (is_graph) {
        const Graph value = graph_from_json(text);
        check::require(graph_from_json(to_json(value)) == value, "round trip");
      } else {
        const Plan value = plan_from_json(text);
        check::require(plan_from_json(to_json(value)) == value, "round trip");
      }
      ++read;
    } catch (const ParseError& error) {
      check::require(error.line >= 1 && error.column >= 1, "place");
      ++refused;
    }
  }
  check::require(read > 100 && refused > 2000, std::to_string(read) + " read, " + std::to_string(refused) + " refused");
}
