// A training step as the planner sees it: operations in execution order, the tensors they read and write, and the
// storages those tensors lie in. Made by capture (splitkern/memory/capture.py), by JSON, or by hand. A value type: the
// planner never changes one. Indices are positions in the vectors of the Graph.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "memory/compression.h"

namespace splitkern::memory {

enum class StorageKind : uint8_t {
  kParameter,   // parameters and buffers: there before the step and after it
  kGradient,    // gradients of parameters: there from their first write until after the step
  kInput,       // images and labels: the caller's, there during the whole step
  kActivation,  // everything else: all that the planner may move, drop or share
};

// One allocation of the step as captured, before the planner merges any.
struct Storage {
  std::string name;  // unique among storages
  int64_t size_bytes = 0;
  StorageKind kind = StorageKind::kActivation;
  bool is_output = false;  // its value is returned: it must be there, with its last value, after the last operation
  std::optional<Compression> compression = std::nullopt;  // measured on its last value of the forward pass

  bool operator==(const Storage&) const = default;
};

// A strided box of a storage. Element (i0, i1, ...) begins at offset_bytes + i0·strides_bytes[0] + ... ; a joined
// tensor is one storage that several tensors (its patches) are boxes of. Strides are not negative. Tensors of one
// storage may overlap; no sizes means one element.
struct Tensor {
  std::string name;     // unique among tensors
  int32_t storage = 0;  // which storage
  int64_t offset_bytes = 0;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides_bytes;
  int64_t element_bytes = 1;

  bool operator==(const Tensor&) const = default;
};

// Positions in an operation's reads and writes.
struct InplacePair {
  int32_t read = 0;
  int32_t write = 0;

  bool operator==(const InplacePair&) const = default;
};

struct Operation {
  std::string name;    // unique among operations
  std::string target;  // what it computes: "conv2d", "relu", "aten.mm.default"; kinds are listed in operation_kinds.h
  double duration_us = 0;
  int64_t workspace_bytes = 0;  // device memory it needs only while it runs
  std::vector<int32_t> reads;   // tensors
  std::vector<int32_t> writes;  // tensors; each is wholly written
  // Where the operation computes the same when the write lies exactly where the read lies (relu, add). Only what may:
  // whether the planner does it is seen in the Plan.
  std::vector<InplacePair> inplace;
  // Positions in writes that the operation can add to what is in the destination, instead of overwriting it.
  std::vector<int32_t> accumulates;
  // Positions in writes whose tensor is an update of what is already there (running statistics): the operation reads it
  // too, and must run exactly once.
  std::vector<int32_t> mutates;
  bool is_sum = false;     // writes[0] = reads[0] + reads[1], element by element
  bool is_random = false;  // draws random numbers: must run exactly once, in the captured order
  bool is_backward = false;
  int32_t patch = -1;   // which patch of the split region; -1 outside
  std::string segment;  // the region or stage of the network that it belongs to; free text
  std::string module;   // qualified name of the module, for reports and errors

  bool operator==(const Operation&) const = default;
};

struct Graph {
  std::string name;
  std::vector<Storage> storages;
  std::vector<Tensor> tensors;
  std::vector<Operation> operations;  // in execution order
  // Where the durations come from: "measured: NVIDIA H200, torch 2.11" or "estimate: p100-fp32".
  std::string durations_from;

  bool operator==(const Graph&) const = default;
};

// All storages of a graph together, and each workspace, are at most this: sums of a few of them stay within int64.
inline constexpr int64_t kMaxGraphBytes = int64_t{1} << 60;

// Throws InvalidArgument with the first rule that the graph breaks: index out of range, duplicate name, negative or
// overflowing size, a tensor beyond its storage, an in-place pair of unequal boxes, a sum of unequal sizes, a tensor
// that is read before every byte of it was written, a write to a parameter or input that is not a mutation, a mutation
// that is not read, two writes of one operation that overlap, a duration that is negative or not finite, a compression
// whose ratio is not positive or whose elements do not make up the storage. An operation that depends on a later one is
// a read before a write.
void require_valid(const Graph& graph);

// A digest of everything that a plan depends on (all but names of modules, segments and the graph): plans carry it.
// 32 hexadecimal digits, the same on every machine; it tells graphs apart, it does not withstand forgery.
std::string fingerprint(const Graph& graph);

}  // namespace splitkern::memory
