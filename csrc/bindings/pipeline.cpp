// splitkern._core: the pipeline that carries out a plan's copies beside an executor written in Python. Addresses and
// streams are integers. Every method lets other Python threads run.
#include <unistd.h>

#include <algorithm>

#include "bindings/value_types.h"
#include "memory/copy_pipeline.h"
#include "memory/pipeline/threaded_streams.h"

#ifdef SPLITKERN_WITH_CUDA_MEMORY
#include "memory/cuda/stream_backend.h"
#endif

namespace splitkern::bindings {

using namespace memory;

namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

// A pipeline and the streams that it runs on. On the CPU operations run in the calling thread, so what they must wait
// for is waited for here; on a GPU the compute stream waits.
class Pipeline {
 public:
  Pipeline(std::unique_ptr<StreamBackend> streams, const Plan& plan, const Arenas& arenas,
           const CopyPipelineOptions& options, bool host_computes)
      : streams_(std::move(streams)),
        pipeline_(std::make_unique<CopyPipeline>(*streams_, plan, arenas, options)),
        host_computes_(host_computes) {
    if (!host_computes) return;
    reached_ = streams_->create_event();
    for (const Boundary& boundary : plan.boundaries) waits_.push_back(options.poison || !boundary.waits.empty());
  }

  // Python lets go of its objects with its lock held, and the wait for the streams can be long: other threads run on.
  // A forked process has none of the threads that its copy of a pipeline would wait for: it keeps the copy.
  ~Pipeline() {
    if (is_of_parent()) {
      [[maybe_unused]] const CopyPipeline* const kept_pipeline = pipeline_.release();
      [[maybe_unused]] const StreamBackend* const kept_streams = streams_.release();
      return;
    }
    const py::gil_scoped_release unlocked;
    pipeline_.reset();
    streams_.reset();
  }
  Pipeline(const Pipeline&) = delete;
  Pipeline& operator=(const Pipeline&) = delete;

  void at_boundary(int32_t boundary) {
    require_own();
    pipeline_->at_boundary(boundary);
    if (!host_computes_ || !waits_[static_cast<size_t>(boundary)]) return;
    streams_->record(reached_, StreamId::kCompute);
    streams_->synchronize(reached_);
  }
  void synchronize() {
    require_own();
    pipeline_->synchronize();
  }
  void abort() {
    if (!is_of_parent()) pipeline_->abort();
  }
  CopyPipeline& pipeline() { return *pipeline_; }

 private:
  bool is_of_parent() const { return getpid() != process_; }
  void require_own() const {
    if (is_of_parent()) throw InvalidArgument("a copy pipeline must be used in the process that made it");
  }

  const pid_t process_ = getpid();
  std::unique_ptr<StreamBackend> streams_;
  std::unique_ptr<CopyPipeline> pipeline_;
  const bool host_computes_;
  EventId reached_ = -1;
  std::vector<bool> waits_;
};

Arenas arenas(const Plan& plan, uintptr_t device, int64_t device_bytes, uintptr_t host, int64_t host_bytes) {
  Arenas made;
  made.device = reinterpret_cast<void*>(device);
  made.device_bytes = device_bytes;
  made.host = reinterpret_cast<void*>(host);
  made.host_bytes = host_bytes;
  // Parameters and the like stay where the caller has them; nothing of that pool is ever touched.
  made.parameters_bytes = plan.predicted.parameters_peak_bytes;
  return made;
}

CopyPipelineOptions options(int64_t chunk_bytes, int32_t max_in_flight, bool checksums, bool poison,
                            int32_t count_every) {
  CopyPipelineOptions made;
  made.chunk_bytes = chunk_bytes;
  made.max_in_flight = max_in_flight;
  made.checksums = checksums;
  made.poison = poison;
  made.count_every = count_every;
  return made;
}

}  // namespace

void define_pipeline(py::module_& module) {
  define_value_type<CopyStatistics>(
      module, "CopyStatistics", "What a pipeline did since it was made.",
      Field{"steps", &CopyStatistics::steps, "Completed steps."},
      Field{"offloads", &CopyStatistics::offloads, "Copies to the host."},
      Field{"offload_chunks", &CopyStatistics::offload_chunks, "Their chunks."},
      Field{"offloaded_bytes", &CopyStatistics::offloaded_bytes, "Their bytes, plain also where compressed."},
      Field{"prefetches", &CopyStatistics::prefetches, "Copies to the device."},
      Field{"prefetch_chunks", &CopyStatistics::prefetch_chunks, "Their chunks."},
      Field{"prefetched_bytes", &CopyStatistics::prefetched_bytes, "Their bytes."},
      Field{"counted_bytes", &CopyStatistics::counted_bytes, "Of compressed offloads that were counted, plain."},
      Field{"counted_link_bytes", &CopyStatistics::counted_link_bytes, "What crossed the link for them."},
      Field{"host_wait_us", &CopyStatistics::host_wait_us, "The calling thread waited, microseconds."});

  const CopyPipelineOptions defaults;
  py::class_<Pipeline> type(
      module, "CopyPipeline",
      "Carries out a plan's offloads and prefetches beside the operations that the caller runs.\n\n"
      "One thread at a time calls `at_boundary` for every boundary in order, and runs instance i after boundary i.\n"
      "The arenas must outlive the pipeline.");
  type.def_static(
          "on_host",
          [](const Plan& plan, uintptr_t device, int64_t device_bytes, uintptr_t host, int64_t host_bytes,
             int64_t chunk_bytes, int32_t max_in_flight, bool checksums, bool poison, int32_t count_every,
             uint64_t seed, int32_t max_delay_us) {
            ThreadedStreamOptions streams;
            streams.seed = seed;
            streams.max_delay_us = max_delay_us;
            return std::make_unique<Pipeline>(
                std::make_unique<ThreadedStreams>(streams), plan, arenas(plan, device, device_bytes, host, host_bytes),
                options(chunk_bytes, max_in_flight, checksums, poison, count_every), true);
          },
          py::arg("plan"), py::kw_only(), py::arg("device"), py::arg("device_bytes"), py::arg("host"),
          py::arg("host_bytes"), py::arg("chunk_bytes") = defaults.chunk_bytes,
          py::arg("max_in_flight") = defaults.max_in_flight, py::arg("checksums") = defaults.checksums,
          py::arg("poison") = defaults.poison, py::arg("count_every") = defaults.count_every, py::arg("seed") = 0,
          py::arg("max_delay_us") = 0, Unlocked(),
          "Ordinary memory stands for the device's, threads for its copy engines.\n\n"
          "Args:\n    plan: a valid plan.\n    device: address of the device arena; host: of the host arena.\n"
          "    chunk_bytes: largest piece of a copy.\n    max_in_flight: pieces of one direction at a time.\n"
          "    checksums: compare what comes back with what left.\n    poison: fill bytes that are free with 0xFF.\n"
          "    count_every: steps; in the first of so many the bytes of compressed offloads are counted.\n"
          "    seed: of the delays.\n    max_delay_us: every action rests for a random time up to this.")
#ifdef SPLITKERN_WITH_CUDA_MEMORY
      .def_static(
          "on_cuda",
          [](const Plan& plan, uintptr_t device, int64_t device_bytes, uintptr_t host, int64_t host_bytes,
             int device_index, int64_t compute_stream, uintptr_t copy_slots, int64_t chunk_bytes, int32_t max_in_flight,
             bool checksums, bool poison, int32_t count_every) {
            if (copy_slots == 0 && std::ranges::any_of(plan.copies, &Copy::compressed))
              throw InvalidArgument("copy_slots must be the address of the kernels' launcher for a plan with " +
                                    std::string("compressed copies, got 0"));
            const auto launch = reinterpret_cast<cuda::CopySlots>(copy_slots);
            return std::make_unique<Pipeline>(std::make_unique<cuda::Streams>(device_index, compute_stream, launch),
                                              plan, arenas(plan, device, device_bytes, host, host_bytes),
                                              options(chunk_bytes, max_in_flight, checksums, poison, count_every),
                                              false);
          },
          py::arg("plan"), py::kw_only(), py::arg("device"), py::arg("device_bytes"), py::arg("host"),
          py::arg("host_bytes"), py::arg("device_index"), py::arg("compute_stream"), py::arg("copy_slots") = 0,
          py::arg("chunk_bytes") = defaults.chunk_bytes, py::arg("max_in_flight") = defaults.max_in_flight,
          py::arg("checksums") = defaults.checksums, py::arg("poison") = defaults.poison,
          py::arg("count_every") = defaults.count_every, Unlocked(),
          "Copies on streams of their own beside the compute stream; the host arena must be pinned.\n\n"
          "Args:\n    copy_slots: address of `splitkern_copy_slots` of the operator library, for compressed copies.")
#endif
      .def("at_boundary", &Pipeline::at_boundary, py::arg("boundary"), Unlocked(),
           "Waits and issues as the plan says; afterwards the instance may be run.\n\n"
           "Raises:\n    CopyFailed: a copy did not arrive, or arrived changed; the next boundary is 0.\n"
           "    InvalidArgument: a boundary out of turn.")
      .def("synchronize", &Pipeline::synchronize, Unlocked(), "Waits until all copies issued so far are done.")
      .def("abort", &Pipeline::abort, Unlocked(), "Ends a step in the middle; afterwards nothing touches the arenas.")
      .def_property_readonly(
          "statistics", [](Pipeline& self) { return self.pipeline().statistics(); }, "Since the pipeline was made.");
}

}  // namespace splitkern::bindings
