// Executes a whole Plan with real bytes on host memory: every instance is a function call on the compute stream, every
// copy goes through the copy pipeline. Compared with the same graph executed plainly, it shows by results what the
// validator shows by proof. Called by the checks; a caller may give operations of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "memory/copy_pipeline.h"
#include "memory/graph.h"
#include "memory/pipeline/stream_backend.h"
#include "memory/plan.h"

namespace splitkern::memory {

// One run of one operation. A tensor's pointer is that of its first element.
struct OperationCall {
  int32_t operation = 0;
  std::vector<const unsigned char*> reads;
  std::vector<unsigned char*> writes;
  int32_t accumulated = -1;  // position in writes that is added to what is there, byte by byte modulo 256; or -1
  unsigned char* workspace = nullptr;
};

// Called in the order of the compute stream, by one thread at a time.
using OperationFunction = std::function<void(const Graph&, const OperationCall&)>;

// The default operation. What it writes is a pseudo-random function of the operation, the bytes of all its reads and,
// if it is random, how many random operations ran before; a sum adds byte by byte modulo 256. Before it reads it spoils
// its workspace and every write that it may not compute in place: so a wrong order, a slot that was reused too early
// and a write that lies on a read all change the result. One object serves one execution of a step.
OperationFunction hash_operations();

// Bytes by graph storage.
using StorageValues = std::vector<std::vector<unsigned char>>;

// Pseudo-random bytes for parameters and inputs; nothing for other storages.
StorageValues initial_values(const Graph& graph, uint64_t seed);

// Runs the operations in captured order, every storage by itself, and gives what is there after a step: parameters,
// gradients and outputs that any operation touches. Bytes that nothing wrote are 0. Other storages are empty.
StorageValues run_graph(const Graph& graph, const StorageValues& initial, const OperationFunction& operation);

// Names the first storage and byte that differ; empty if none does.
std::string first_difference(const Graph& graph, const StorageValues& expected, const StorageValues& actual);

// Owns its arenas and pipeline. One thread at a time calls run(); the backend outlives the runner.
class PlanRunner {
 public:
  // The graph is valid, the plan for it is valid or nearly so: throws InvalidArgument if a tensor that an instance
  // touches has no residency there, or for what CopyPipeline refuses.
  PlanRunner(StreamBackend& backend, const Graph& graph, const Plan& plan, const CopyPipelineOptions& options = {});

  // One step: as run_graph(). Throws what CopyPipeline throws, and StreamFailed with the operation's name and text if
  // `operation` throws; the runner is usable afterwards.
  StorageValues run(const StorageValues& initial, const OperationFunction& operation);

  CopyPipeline& pipeline() { return *pipeline_; }

 private:
  // Where a storage lies at a boundary or during the instance after it; -1: nowhere.
  int32_t residency_at(int32_t planned, int32_t boundary) const;
  unsigned char* address(int32_t residency) const;

  StreamBackend& backend_;
  const Graph graph_;
  const Plan plan_;
  std::vector<int32_t> planned_of_;                   // by graph storage
  std::vector<std::vector<int32_t>> residencies_of_;  // on the device, by planned storage
  std::vector<int32_t> arrival_;                      // by residency: the boundary from which its bytes are there
  std::vector<unsigned char> device_;
  std::vector<unsigned char> parameters_;
  std::vector<unsigned char> host_;
  std::vector<OperationCall> calls_;  // by instance
  std::unique_ptr<CopyPipeline> pipeline_;
};

}  // namespace splitkern::memory
