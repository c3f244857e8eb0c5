// Prints how low and how fast place() is on given MiniMalloc CSV files and on generated instances, beside the
// baselines.
//   placement_bench [--effort N] [--capacity BYTES] [--repeat N] [FILE.csv ...]
// Without files: the generated ones. Times are medians of the repetitions; a baseline that would take minutes is left
// out.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "memory/generators.h"
#include "memory/minimalloc_csv.h"
#include "memory/placement.h"
#include "memory/placement/heuristics.h"
#include "memory/placement/problem.h"

using namespace splitkern::memory;

namespace {

struct Options {
  PlacementOptions placement;
  int repeat = 3;
};

struct Times {
  double wall_ms, cpu_ms;
};

// Medians; everything measured runs in this one thread.
template <class Body>
Times times_of(int repeat, Body body) {
  std::vector<double> wall, cpu;
  for (int k = 0; k < repeat; ++k) {
    const auto begin = std::chrono::steady_clock::now();
    const std::clock_t cpu_begin = std::clock();
    body();
    cpu.push_back(1e3 * static_cast<double>(std::clock() - cpu_begin) / CLOCKS_PER_SEC);
    wall.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(wall.begin(), wall.end());
  std::sort(cpu.begin(), cpu.end());
  return {wall[wall.size() / 2], cpu[cpu.size() / 2]};
}

void row(const std::string& name, const std::vector<Buffer>& buffers, Options options) {
  constexpr int64_t kBaselineWork = 20'000'000;
  Placement placement;
  const Times place_times = times_of(options.repeat, [&] { placement = place(buffers, options.placement); });
  const placement::Problem problem = placement::make_problem(buffers, options.placement.alignment_bytes);
  const auto ratio = [&](int64_t peak) {
    return problem.lower_bound == 0 ? 1.0 : static_cast<double>(peak) / static_cast<double>(problem.lower_bound);
  };
  int64_t first_fit = 0, by_size = 0;
  const Times first_fit_times =
      times_of(1, [&] { first_fit = placement::peak_of(problem, placement::first_fit_by_begin(problem)); });
  const Times by_size_times = times_of(1, [&] {
    const auto offsets = placement::first_fit_in_order(
        problem, placement::sorted_positions(problem.size, /*descending=*/true), kBaselineWork);
    if (offsets) by_size = placement::peak_of(problem, *offsets);
  });
  std::printf("%-34s %8zu %16lld %16lld %8.4f %9.2f %9.2f | %7.4f %8.2f |", name.c_str(), buffers.size(),
              static_cast<long long>(placement.lower_bound_bytes), static_cast<long long>(placement.peak_bytes),
              placement.lower_bound_bytes == 0
                  ? 1.0
                  : static_cast<double>(placement.peak_bytes) / static_cast<double>(placement.lower_bound_bytes),
              place_times.wall_ms, place_times.cpu_ms, ratio(first_fit), first_fit_times.cpu_ms);
  if (by_size > 0) {
    std::printf(" %7.4f %8.2f\n", ratio(by_size), by_size_times.cpu_ms);
  } else {
    std::printf("       -        -\n");
  }
  std::fflush(stdout);
}

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void generated(Options options) {
  for (const int32_t pinwheels : {0, 50}) {
    for (const int64_t count : {100, 300, 1000}) {
      row("perfect packing, " + std::to_string(pinwheels) + " % pinwheels",
          perfect_packing({.buffers = count, .pinwheel_percent = pinwheels}), options);
    }
  }
  options.placement.alignment_bytes = 512;
  const std::pair<Network, const char*> networks[] = {
      {Network::kVgg19, "VGG-19"}, {Network::kResNet18, "ResNet-18"}, {Network::kResNet50, "ResNet-50"}};
  for (const auto& [network, name] : networks) {
    for (const int32_t grid : {1, 2, 4}) {
      for (const bool offload : {false, true}) {
        row(std::string(name) + " " + std::to_string(grid) + "x" + std::to_string(grid) + (offload ? " offload" : ""),
            training_trace({.network = network, .grid = grid, .offload = offload}), options);
      }
    }
  }
  struct Large {
    int32_t grid, repeat;
    int64_t image;
  };
  for (const Large& large : {Large{8, 2, 512}, Large{8, 7, 512}, Large{32, 7, 1024}}) {
    for (const bool offload : {false, true}) {
      for (const int32_t jitter : {0, 20}) {
        row("ResNet-50 " + std::to_string(large.grid) + "x" + std::to_string(large.grid) + " x" +
                std::to_string(large.repeat) + (offload ? " offload" : "") + (jitter > 0 ? " jitter" : ""),
            training_trace({.network = Network::kResNet50,
                            .image = large.image,
                            .grid = large.grid,
                            .repeat = large.repeat,
                            .offload = offload,
                            .jitter_percent = jitter}),
            options);
      }
    }
  }
}

}  // namespace

int main(int count, char** arguments) try {
  Options options;
  std::vector<std::string> files;
  for (int k = 1; k < count; ++k) {
    const std::string argument = arguments[k];
    const auto value = [&] {
      if (k + 1 == count) throw std::runtime_error(argument + " needs a value");
      return std::string(arguments[++k]);
    };
    if (argument == "--effort") {
      options.placement.effort = std::stoll(value());
    } else if (argument == "--capacity") {
      options.placement.capacity_bytes = std::stoll(value());
    } else if (argument == "--repeat") {
      options.repeat = std::max(1, std::stoi(value()));
    } else if (argument.starts_with("--")) {
      throw std::runtime_error("unknown option " + argument + "; there are --effort, --capacity, --repeat");
    } else {
      files.push_back(argument);
    }
  }
  std::printf("%-34s %8s %16s %16s %8s %9s | %16s | %16s\n", "instance", "buffers", "lower bound", "peak", "ratio",
              "ms", "first-fit    ms", "by size      ms");
  for (const std::string& file : files) {
    row(file.substr(file.find_last_of('/') + 1), read_minimalloc_csv(text_of(file)).buffers, options);
  }
  if (files.empty()) generated(options);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "placement_bench: %s\n", error.what());
  return 1;
}
