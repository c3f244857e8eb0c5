// splitkern._core: static placement of buffers with known lifetimes.
#include "memory/placement.h"

#include "bindings/value_types.h"
#include "memory/generators.h"
#include "memory/minimalloc_csv.h"

namespace splitkern::bindings {

using namespace memory;

void define_placement(py::module_& module) {
  define_value_type<Buffer>(module, "Buffer", "Bytes that are live from time `begin` until time `end`.",
                            Field{"begin", &Buffer::begin, "First time."},
                            Field{"end", &Buffer::end, "Time after the last."},
                            Field{"size_bytes", &Buffer::size_bytes, "Bytes."});
  define_value_type<Placement>(
      module, "Placement", "Addresses of buffers.", Field{"offsets", &Placement::offsets, "One a buffer."},
      Field{"peak_bytes", &Placement::peak_bytes, "Highest end of a buffer."},
      Field{"lower_bound_bytes", &Placement::lower_bound_bytes, "Most bytes live at one time."});
  const PlacementOptions defaults;
  module.def(
      "place",
      [](const std::vector<Buffer>& buffers, int64_t alignment_bytes, std::optional<int64_t> capacity_bytes,
         int64_t effort, std::optional<double> time_limit_s) {
        const PlacementOptions options{alignment_bytes, from_optional(capacity_bytes), effort,
                                       time_limit_s.value_or(0)};
        py::gil_scoped_release unlocked;
        return place(buffers, options);
      },
      py::arg("buffers"), py::kw_only(), py::arg("alignment_bytes") = defaults.alignment_bytes,
      py::arg("capacity_bytes") = py::none(), py::arg("effort") = defaults.effort, py::arg("time_limit_s") = py::none(),
      "Gives every buffer an address so that the highest used address is as low as can be found.\n\n"
      "Args:\n    buffers: lifetimes and sizes.\n    alignment_bytes: of every offset and size.\n"
      "    capacity_bytes: stop as soon as the peak is at most this.\n"
      "    effort: work spent where simple rules do not reach the lower bound; the result depends on nothing else\n"
      "        unless there is a time limit.\n    time_limit_s: seconds, after which the best so far is returned.\n\n"
      "Raises:\n    InvalidArgument: a buffer or option out of range.");
  module.def(
      "lower_bound_bytes",
      [](const std::vector<Buffer>& buffers, int64_t alignment_bytes) {
        return lower_bound_bytes(buffers, alignment_bytes);
      },
      py::arg("buffers"), py::kw_only(), py::arg("alignment_bytes") = defaults.alignment_bytes,
      "Most bytes live at one time: no placement is lower.");

  define_value_type<MinimallocCsv>(module, "MinimallocCsv",
                                   "A placement problem, or a solved one, as MiniMalloc's CSV.",
                                   Field{"ids", &MinimallocCsv::ids, "As they stand in the file."},
                                   Field{"buffers", &MinimallocCsv::buffers, "One a line."},
                                   Field{"offsets", &MinimallocCsv::offsets, "Empty, or one a buffer."});
  module.def(
      "read_minimalloc_csv", [](const std::string& text) { return read_minimalloc_csv(text); }, py::arg("text"),
      py::call_guard<py::gil_scoped_release>(),
      "Reads id,lower,upper,size[,offset].\n\nRaises:\n    ParseError: malformed text, with line and column.");
  module.def("write_minimalloc_csv", &write_minimalloc_csv, py::arg("csv"), py::call_guard<py::gil_scoped_release>(),
             "Writes id,lower,upper,size, and offset where there are offsets.");

  py::native_enum<Network>(module, "Network", "enum.Enum", "Whose training step `training_trace` generates.")
      .value("VGG19", Network::kVgg19)
      .value("RESNET18", Network::kResNet18)
      .value("RESNET50", Network::kResNet50)
      .finalize();
  const PerfectPacking packing;
  module.def(
      "perfect_packing",
      [](int64_t buffers, int64_t duration, int64_t height_bytes, int64_t time_step, int64_t byte_step,
         int32_t pinwheel_percent, uint64_t seed) {
        return perfect_packing({buffers, duration, height_bytes, time_step, byte_step, pinwheel_percent, seed});
      },
      py::kw_only(), py::arg("buffers") = packing.buffers, py::arg("duration") = packing.duration,
      py::arg("height_bytes") = packing.height_bytes, py::arg("time_step") = packing.time_step,
      py::arg("byte_step") = packing.byte_step, py::arg("pinwheel_percent") = packing.pinwheel_percent,
      py::arg("seed") = packing.seed, py::call_guard<py::gil_scoped_release>(),
      "Buffers that fill a rectangle of time and addresses without a gap: the optimum is its height.");
  const TrainingTrace trace;
  module.def(
      "training_trace",
      [](Network network, int64_t batch, int64_t image, int64_t element_bytes, int32_t grid, int32_t repeat,
         bool offload, double tera_flops, double link_gbps, int32_t jitter_percent, uint64_t seed) {
        return training_trace(
            {network, batch, image, element_bytes, grid, repeat, offload, tera_flops, link_gbps, jitter_percent, seed});
      },
      py::kw_only(), py::arg("network") = trace.network, py::arg("batch") = trace.batch, py::arg("image") = trace.image,
      py::arg("element_bytes") = trace.element_bytes, py::arg("grid") = trace.grid, py::arg("repeat") = trace.repeat,
      py::arg("offload") = trace.offload, py::arg("tera_flops") = trace.tera_flops,
      py::arg("link_gbps") = trace.link_gbps, py::arg("jitter_percent") = trace.jitter_percent,
      py::arg("seed") = trace.seed, py::call_guard<py::gil_scoped_release>(),
      "The device buffers of a generated CNN training step, one time unit an operation.");
}

}  // namespace splitkern::bindings
