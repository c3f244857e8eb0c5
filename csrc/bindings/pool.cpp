// splitkern._core: the memory pool. Addresses and streams are integers. Every method lets other Python threads run.
#include "memory/pool.h"

#include <pybind11/functional.h>

#include "bindings/value_types.h"

#ifdef SPLITKERN_WITH_CUDA_MEMORY
#include "memory/cuda/events.h"
#include "memory/cuda/upstream.h"
#endif

namespace splitkern::bindings {

using namespace memory;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

std::shared_ptr<StreamEvents> cuda_events(int device) {
#ifdef SPLITKERN_WITH_CUDA_MEMORY
  return std::make_shared<cuda::Events>(device);
#else
  (void)device;
  throw InvalidArgument("this build of splitkern has no CUDA: rebuild it with CUDA_HOME set to a CUDA 13 toolkit");
#endif
}

template <class Upstream>
std::shared_ptr<Upstream> cuda_upstream(int device) {
  return std::make_shared<Upstream>(device);
}

// The keyword arguments that all kinds of pools have, and their defaults.
template <class... Extra, class... Arguments>
void define_maker(py::class_<MemoryPool, std::shared_ptr<MemoryPool>>& type, const char* name,
                  std::function<std::pair<std::shared_ptr<Upstream>, std::shared_ptr<StreamEvents>>(Extra...)> make,
                  const char* documentation, const Arguments&... arguments) {
  static_assert(sizeof...(Extra) == sizeof...(Arguments));
  const PoolOptions defaults;
  const auto body = [make](Extra... extra, std::optional<int64_t> limit_bytes, int64_t block_bytes,
                           int64_t alignment_bytes, bool tracks, int32_t max_retries) {
    auto [upstream, events] = make(std::move(extra)...);
    PoolOptions options;
    options.limit_bytes = from_optional(limit_bytes);
    options.block_bytes = block_bytes;
    options.alignment_bytes = alignment_bytes;
    options.events = std::move(events);
    options.tracks = tracks;
    options.max_retries = max_retries;
    return MemoryPool::create(std::move(upstream), std::move(options));
  };
  type.def_static(name, body, arguments..., py::kw_only(), py::arg("limit_bytes") = py::none(),
                  py::arg("block_bytes") = defaults.block_bytes, py::arg("alignment_bytes") = defaults.alignment_bytes,
                  py::arg("tracks") = defaults.tracks, py::arg("max_retries") = defaults.max_retries, documentation);
}

void define_statistics(py::module_& module) {
  define_value_type<Usage>(module, "Usage",
                           "Of arenas, of dynamic allocations, or of both. Bytes are rounded up to the alignment.",
                           Field{"current_bytes", &Usage::current_bytes, "In use."},
                           Field{"peak_bytes", &Usage::peak_bytes, "Most ever in use."},
                           Field{"total_bytes", &Usage::total_bytes, "Of all allocations ever."},
                           Field{"asked_bytes", &Usage::asked_bytes, "In use, before rounding."},
                           Field{"current_count", &Usage::current_count, "Allocations in use."},
                           Field{"peak_count", &Usage::peak_count, "Most ever in use."},
                           Field{"total_count", &Usage::total_count, "Allocations ever."});
  define_value_type<PoolStatistics>(
      module, "PoolStatistics", "What a pool holds and did.", Field{"planned", &PoolStatistics::planned, "Arenas."},
      Field{"dynamic", &PoolStatistics::dynamic, "Dynamic allocations."},
      Field{"all", &PoolStatistics::all, "Both; its peaks are those of the sum."},
      Field{"limit_bytes", &PoolStatistics::limit_bytes, "Of what is held from the upstream."},
      Field{"upstream_bytes", &PoolStatistics::upstream_bytes, "Held from the upstream."},
      Field{"upstream_peak_bytes", &PoolStatistics::upstream_peak_bytes, "Most ever held."},
      Field{"upstream_allocations", &PoolStatistics::upstream_allocations, "Calls that gave memory."},
      Field{"upstream_failures", &PoolStatistics::upstream_failures, "Calls that did not."},
      Field{"upstream_frees", &PoolStatistics::upstream_frees, "Blocks given back."},
      Field{"block_count", &PoolStatistics::block_count, "Blocks held."},
      Field{"free_bytes", &PoolStatistics::free_bytes, "Held and not in use."},
      Field{"largest_free_bytes", &PoolStatistics::largest_free_bytes, "Longest run of free bytes."},
      Field{"stream_waits", &PoolStatistics::stream_waits, "Times that a stream was made to wait for another."},
      Field{"failure_calls", &PoolStatistics::failure_calls, "Calls of the failure callback."},
      Field{"refused", &PoolStatistics::refused, "Allocations that ended in OutOfMemory."});
  define_value_type<PoolAllocation>(module, "PoolAllocation", "An allocation or arena that has not been freed.",
                                    Field{"address", &PoolAllocation::address, "Where it begins."},
                                    Field{"size_bytes", &PoolAllocation::size_bytes, "As asked for."},
                                    Field{"is_planned", &PoolAllocation::is_planned, "Whether it is an arena."},
                                    Field{"stream", &PoolAllocation::stream, "The stream that it was allocated on."},
                                    Field{"number", &PoolAllocation::number, "Counts the pool's allocations."},
                                    Field{"tag", &PoolAllocation::tag, "Kept by a pool that tracks."});
}

void define_arena(py::module_& module) {
  py::class_<Arena>(
      module, "Arena",
      "A region of a pool for the slots of one plan; given back by `release`, at the end of a `with` block, "
      "or with its last reference.")
      .def_property_readonly(
          "base", [](const Arena& self) { return reinterpret_cast<uintptr_t>(self.base()); }, "Address of offset 0.")
      .def_property_readonly("size_bytes", &Arena::size_bytes, "Bytes.")
      .def_property_readonly("stream", &Arena::stream, "The stream that it was reserved on.")
      .def_property_readonly("is_released", &Arena::is_released, "Whether it was given back.")
      .def(
          "slot",
          [](const Arena& self, int64_t offset_bytes, int64_t size_bytes) {
            return reinterpret_cast<uintptr_t>(self.slot(offset_bytes, size_bytes));
          },
          py::arg("offset_bytes"), py::arg("size_bytes"),
          "Address of a slot.\n\nRaises:\n    InvalidArgument: it does not lie in the arena.")
      .def("touch", &Arena::touch, py::arg("offset_bytes"), py::arg("size_bytes"),
           "Accounts for a slot that a step really uses.")
      .def_property_readonly("touched_bytes", &Arena::touched_bytes, "Highest end of a touched slot.")
      .def("reset_touched", &Arena::reset_touched, "Forgets which slots were touched.")
      .def(
          "release",
          [](Arena& self, std::optional<int64_t> stream) { stream ? self.release(*stream) : self.release(); },
          py::arg("stream") = py::none(), Unlocked(),
          "Gives the region back, behind all that the stream was given so far; None: the stream it was reserved on.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](Arena& self, const py::args&) {
        py::gil_scoped_release unlocked;
        self.release();
      });
}

}  // namespace

void define_pool(py::module_& module) {
  define_statistics(module);
  define_arena(module);

  py::class_<MemoryPool, std::shared_ptr<MemoryPool>> type(
      module, "Pool",
      "Memory for planned steps and for everything beside them, from one upstream and under one hard limit.\n\n"
      "Every method may be called from any thread. What was freed on a stream is at once free on that stream; another\n"
      "stream gets it once the free has passed, or after it was made to wait for it. Options of all kinds of pools:\n\n"
      "Args:\n    limit_bytes: of what is held from the upstream at any time; None: no limit.\n"
      "    block_bytes: least size of a new block for dynamic allocations.\n"
      "    alignment_bytes: of every address and size; a power of two.\n"
      "    tracks: keep tags, and report at the pool's end what was never freed.\n"
      "    max_retries: calls of the failure callback for one allocation.");
  using Parts = std::pair<std::shared_ptr<Upstream>, std::shared_ptr<StreamEvents>>;
  define_maker(type, "host", std::function([]() -> Parts { return {std::make_shared<HostUpstream>(), nullptr}; }),
               "A pool of the process's ordinary memory.");
  define_maker(type, "from_functions",
               std::function([](CallbackUpstream::Allocate allocate, CallbackUpstream::Free free,
                                std::optional<int64_t> ordered_on, std::optional<int> cuda_device) -> Parts {
                 return {std::make_shared<CallbackUpstream>(std::move(allocate), std::move(free), ordered_on),
                         cuda_device ? cuda_events(*cuda_device) : nullptr};
               }),
               "A pool over another allocator.\n\n"
               "Args:\n    allocate: (size_bytes, alignment_bytes) -> address; raises where it cannot.\n"
               "    free: (address, size_bytes) -> None.\n"
               "    ordered_on: the stream in whose order new blocks are free to use; None: at once on every stream.\n"
               "    cuda_device: the device whose streams order frees; None: the CPU alone uses the memory.",
               py::arg("allocate"), py::arg("free"), py::arg("ordered_on") = py::none(),
               py::arg("cuda_device") = py::none());
#ifdef SPLITKERN_WITH_CUDA_MEMORY
  define_maker(type, "device", std::function([](int device) -> Parts {
                 return {cuda_upstream<cuda::DeviceUpstream>(device), cuda_events(device)};
               }),
               "A pool of a GPU's memory, from cudaMalloc.", py::arg("device"));
  define_maker(type, "pinned", std::function([](int device) -> Parts {
                 return {cuda_upstream<cuda::PinnedUpstream>(device), cuda_events(device)};
               }),
               "A pool of page-locked host memory, whose users are streams of the device.", py::arg("device"));
#endif
  type.def("add_stream", &MemoryPool::add_stream, py::arg("stream"), Unlocked(),
           "Makes a stream known; False where it was. Stream 0 is known from the start.")
      .def("remove_stream", &MemoryPool::remove_stream, py::arg("stream"), Unlocked(),
           "Forgets a stream, before it is destroyed; what was freed on it stays in order.")
      .def("order_after", &MemoryPool::order_after, py::arg("stream"), py::arg("earlier"), Unlocked(),
           "Makes `stream` wait for every free so far on `earlier`.")
      .def(
          "allocate",
          [](MemoryPool& self, int64_t size_bytes, int64_t stream, std::string tag) {
            return reinterpret_cast<uintptr_t>(self.allocate(size_bytes, stream, std::move(tag)));
          },
          py::arg("size_bytes"), py::arg("stream") = 0, py::arg("tag") = "", Unlocked(),
          "Address of memory for the work that the stream is given from now on; 0 for size 0.\n\n"
          "Raises:\n    OutOfMemory: the limit or the upstream do not allow it.")
      .def(
          "free",
          [](MemoryPool& self, uintptr_t address, int64_t stream) {
            self.free(reinterpret_cast<void*>(address), stream);
          },
          py::arg("address"), py::arg("stream") = 0, Unlocked(),
          "Frees what `allocate` returned, behind all that the stream was given so far.\n\n"
          "Raises:\n    InvalidArgument: freed already, inside an allocation, an arena's, or not the pool's.")
      .def("reserve", &MemoryPool::reserve, py::arg("size_bytes"), py::arg("stream") = 0, py::arg("tag") = "",
           Unlocked(),
           "A contiguous region for a plan's peak; what is left under the limit is for dynamic allocations.\n\n"
           "Raises:\n    OutOfMemory: the limit or the upstream do not allow it.")
      .def("trim", &MemoryPool::trim, py::arg("wait") = false, Unlocked(),
           "Gives unused blocks back to the upstream and returns their bytes; `wait`: waits for pending frees first.")
      .def_property_readonly("statistics", &MemoryPool::statistics, "What it holds and did.")
      .def("reset_peaks", &MemoryPool::reset_peaks, "Peaks become what is current.")
      .def("outstanding", &MemoryPool::outstanding, Unlocked(), "What is in use, in order of allocation.")
      .def(
          "leak_report", [](const MemoryPool& self) { return leak_report(self.outstanding()); }, Unlocked(),
          "What is in use, as text.")
      .def("set_failure_callback", &MemoryPool::set_failure_callback, py::arg("callback"), Unlocked(),
           "Called with the bytes that are missing: frees something and returns True to try again, or False.")
      .def("set_leak_callback", &MemoryPool::set_leak_callback, py::arg("callback"), Unlocked(),
           "Called at the end of a pool that tracks with what was never freed.");
}

}  // namespace splitkern::bindings
