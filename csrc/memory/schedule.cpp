#include "memory/schedule.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

namespace splitkern::memory {
namespace {

// Values at positions 0..n-1: add to a range, ask for the largest of a range, each in O(log n).
class RangeMax {
 public:
  void assign(std::span<const int64_t> values) {
    leaves_ = static_cast<int32_t>(std::bit_ceil(std::max<size_t>(values.size(), 1)));
    most_.assign(2 * leaves_, 0);
    added_.assign(leaves_, 0);
    std::ranges::copy(values, most_.begin() + leaves_);
    for (int32_t node = leaves_ - 1; node > 0; --node) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]);
  }

  void add(int32_t begin, int32_t end, int64_t value) {
    if (begin >= end) return;
    const int32_t first = begin + leaves_;
    const int32_t last = end - 1 + leaves_;
    for (int32_t left = first, right = last + 1; left < right; left >>= 1, right >>= 1) {
      if (left & 1) add_to_node(left++, value);
      if (right & 1) add_to_node(--right, value);
    }
    lift(first);
    lift(last);
  }

  int64_t max(int32_t begin, int32_t end) const {
    if (begin >= end) return 0;
    int32_t left = begin + leaves_;
    int32_t right = end - 1 + leaves_;
    int64_t left_most = most_[left];
    int64_t right_most = most_[right];
    while (left >> 1 != right >> 1) {
      if (!(left & 1)) left_most = std::max(left_most, most_[left ^ 1]);
      if (right & 1) right_most = std::max(right_most, most_[right ^ 1]);
      left >>= 1;
      right >>= 1;
      left_most += added_[left];
      right_most += added_[right];
    }
    int64_t result = std::max(left_most, right_most);
    while (left >>= 1) result += added_[left];
    return result;
  }

  int64_t at(int32_t position) const {
    int32_t node = position + leaves_;
    int64_t result = most_[node];
    while (node >>= 1) result += added_[node];
    return result;
  }

 private:
  void add_to_node(int32_t node, int64_t value) {
    most_[node] += value;
    if (node < leaves_) added_[node] += value;
  }
  void lift(int32_t node) {
    while (node >>= 1) most_[node] = std::max(most_[2 * node], most_[2 * node + 1]) + added_[node];
  }

  int32_t leaves_ = 1;
  std::vector<int64_t> most_;   // of the node's range, without what was added to nodes above it
  std::vector<int64_t> added_;  // to the node's whole range
};

// More instances than this, times the steps: decisions under which bursts repeat each other.
constexpr int64_t kMostRepetitions = 4;

}  // namespace

double copy_us(const Limits& limits, CopyKind kind, double bytes) {
  const double gbps = kind == CopyKind::kOffload ? limits.offload_gbps : limits.prefetch_gbps;
  return limits.copy_latency_us + bytes / (gbps * 1e3);
}

bool may(const Liveness& live, const Limits& limits, int32_t storage, Decision decision) {
  switch (decision) {
    case Decision::kKeep:
      return true;
    case Decision::kOffload:
      return live.saved[storage] && limits.offload_gbps > 0 && limits.prefetch_gbps > 0 && limits.host_bytes > 0;
    case Decision::kRecompute:
      return live.saved[storage] && live.recomputable[storage];
  }
  return false;
}

class Scheduler::State {
 public:
  State(const Graph& graph, const Liveness& live, const Limits& limits) : live_(live), limits_(limits) {
    for (int32_t storage = 0; storage < live.storages(); ++storage) {
      if (live.saved[storage]) by_write_.push_back(storage);
    }
    std::ranges::stable_sort(by_write_, {}, [&](int32_t storage) { return live.last_forward_write[storage]; });
    find_layers(graph);
    storage_mark_.assign(live.storages(), 0);
    step_mark_.assign(live.steps(), 0);
  }

  const Schedule& run(std::span<const Decision> decisions, CopyPolicy policy, int64_t device_bytes,
                      int64_t host_bytes) {
    if (!build(decisions)) return result_;
    find_transfers(decisions);
    find_clock();
    profile();
    result_.least_device_bytes = most(live_bytes_, result_.short_at);
    if (result_.least_device_bytes > device_bytes) {
      result_.shortage_bytes = result_.least_device_bytes - device_bytes;
      return result_;
    }
    if (policy == CopyPolicy::kBudget) {
      if (!follow_budget(device_bytes)) return result_;
    } else {
      if (policy == CopyPolicy::kHidden) {
        hide();
      } else {
        follow_layers();
      }
      follow_boundaries();
    }
    check_budgets(device_bytes, host_bytes);
    return result_;
  }

  const Schedule& measure(std::span<const Decision> decisions) {
    if (!build(decisions)) return result_;
    find_transfers(decisions);
    profile();
    result_.least_device_bytes = most(live_bytes_, result_.short_at);
    result_.host_live_bytes = 0;
    for (const Transfer& transfer : result_.transfers) result_.host_live_bytes += host_bytes_of(transfer);
    return result_;
  }

  int32_t offloads_needed(std::span<const Decision> decisions, std::span<const int32_t> order, int64_t device_bytes) {
    const int32_t never = static_cast<int32_t>(order.size()) + 1;
    if (!build(decisions)) return never;
    find_transfers(decisions);
    profile();
    const std::vector<int64_t> alone = live_bytes_;
    const auto fits = [&](int32_t taken) {
      change_.assign(count() + 1, 0);
      for (int32_t index = 0; index < taken; ++index) {
        const int32_t storage = order[index];
        const auto [leaves, returns] = absence(storage);
        if (decisions[storage] != Decision::kKeep || leaves >= returns) continue;
        change_[leaves] -= live_.bytes[storage];
        change_[returns] += live_.bytes[storage];
      }
      int64_t more = 0;
      for (int32_t boundary = 0; boundary < count(); ++boundary) {
        more += change_[boundary];
        if (alone[boundary] + more > device_bytes) return false;
      }
      return true;
    };
    int32_t low = 0;
    int32_t high = never;  // the least that is known to do
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (fits(std::min(middle, never - 1))) {
        high = middle;
      } else {
        if (middle >= never - 1) return never;
        low = middle + 1;
      }
    }
    return high;
  }

  bool would_be_absent(int32_t storage, int32_t instance) const {
    const auto [leaves, returns] = absence(storage);
    return leaves <= instance && instance < returns;
  }

  int64_t work() const { return work_; }

 private:
  int32_t count() const { return static_cast<int32_t>(result_.instances.size()); }

  // Layers: runs of steps of one module, patch and direction.
  void find_layers(const Graph& graph) {
    layer_begin_.resize(live_.steps());
    layer_end_.resize(live_.steps());
    int32_t begin = 0;
    const auto same = [&](int32_t a, int32_t b) {
      const Operation& first = graph.operations[live_.operations[a]];
      const Operation& second = graph.operations[live_.operations[b]];
      return !first.module.empty() && first.module == second.module && first.patch == second.patch &&
             first.is_backward == second.is_backward;
    };
    for (int32_t step = 0; step < live_.steps(); ++step) {
      if (step > 0 && !same(step - 1, step)) begin = step;
      layer_begin_[step] = begin;
      layer_end_[step] = step + 1;
    }
    for (int32_t step = live_.steps() - 1; step-- > 0;) {
      if (layer_begin_[step] == layer_begin_[step + 1]) layer_end_[step] = layer_end_[step + 1];
    }
  }

  void fail_without_remedy(int32_t step) {
    result_.feasible = false;
    result_.shortage_bytes = kUnlimited;
    result_.short_at = step;
    result_.least_device_bytes = kUnlimited;
  }

  // Instances and episodes. What is computed again is so right before the backward step that reads it first, with all
  // that it needs; in captured order, so that a storage passes through the same states as in the forward pass. It then
  // stays until its last reader, while operands that nothing saves go at once.
  bool build(std::span<const Decision> decisions) {
    result_ = Schedule{.instances = std::move(result_.instances),
                       .episodes = std::move(result_.episodes),
                       .transfers = std::move(result_.transfers),
                       .issue_order = std::move(result_.issue_order)};
    result_.instances.clear();
    result_.episodes.clear();
    result_.transfers.clear();
    result_.issue_order.clear();
    episode_of_.assign(live_.storages(), -1);
    back_.assign(live_.storages(), -1);
    is_changed_.assign(live_.storages(), 0);
    for (int32_t step = 0; step < live_.steps(); ++step) {
      if (step == live_.turn) {
        for (int32_t storage = 0; storage < live_.storages(); ++storage) {
          const bool dies = !live_.output[storage] && live_.last_access[storage] < step;
          if (dies || is_dropped(decisions, storage)) episode_of_[storage] = -1;
        }
      }
      if (step >= live_.turn && !bring_back(decisions, step)) return false;
      append(step, false);
      if (step < live_.turn) continue;
      for (const Access& access : live_.accesses[step]) {
        if (access.writes) is_changed_[access.storage] = 1;
      }
    }
    work_ += count();
    for (Episode& episode : result_.episodes) {
      if (live_.output[episode.storage]) episode.end = count();
    }
    return true;
  }

  bool is_dropped(std::span<const Decision> decisions, int32_t storage) const {
    return decisions[storage] == Decision::kRecompute && live_.saved[storage] && live_.recomputable[storage];
  }
  bool is_absent(int32_t storage) const {
    return !live_.resident[storage] && episode_of_[storage] < 0 && live_.first_access[storage] < live_.turn;
  }

  void append(int32_t step, bool is_recomputation) {
    const int32_t instance = count();
    result_.instances.push_back({step, is_recomputation});
    for (const Access& access : live_.accesses[step]) {
      const int32_t storage = access.storage;
      if (live_.resident[storage]) continue;
      int32_t& episode = episode_of_[storage];
      // A result that is of no use now: it has a place only while it is written.
      const bool is_scrap = is_recomputation && episode < 0 && storage_mark_[storage] != mark_;
      if (episode < 0) {
        episode = static_cast<int32_t>(result_.episodes.size());
        result_.episodes.push_back({storage, instance, instance + 1, -1});
      }
      result_.episodes[episode].end = instance + 1;
      if (instance >= live_.turn && back_[storage] < 0) back_[storage] = instance;
      if (is_scrap) episode = -1;
    }
  }

  // Everything that `step` touches and that was dropped.
  bool bring_back(std::span<const Decision> decisions, int32_t step) {
    ++mark_;
    marked_.clear();
    const auto mark = [&](int32_t storage) {
      if (storage_mark_[storage] == mark_) return;
      storage_mark_[storage] = mark_;
      marked_.push_back(storage);
    };
    for (const Access& access : live_.accesses[step]) {
      if (is_absent(access.storage)) mark(access.storage);
    }
    if (marked_.empty()) return true;
    burst_.clear();
    for (size_t next = 0; next < marked_.size(); ++next) {
      for (int32_t writer : live_.writers[marked_[next]]) {
        if (step_mark_[writer] == mark_) continue;
        step_mark_[writer] = mark_;
        burst_.push_back(writer);
        for (const Access& access : live_.accesses[writer]) {
          if (is_changed_[access.storage]) {
            fail_without_remedy(step);
            return false;
          }
          if (access.reads && is_absent(access.storage)) mark(access.storage);
        }
      }
    }
    // Other results of the same operations that were dropped too: they are there now, if they are whole.
    const size_t asked = burst_.size();
    for (size_t index = 0; index < asked; ++index) {
      for (const Access& access : live_.accesses[burst_[index]]) {
        const int32_t storage = access.storage;
        if (!access.writes || !is_absent(storage) || storage_mark_[storage] == mark_ || !is_dropped(decisions, storage))
          continue;
        if (std::ranges::all_of(live_.writers[storage], [&](int32_t writer) { return step_mark_[writer] == mark_; }))
          mark(storage);
      }
    }
    std::ranges::sort(burst_);
    if (count() + static_cast<int64_t>(burst_.size()) > (kMostRepetitions + 1) * live_.steps()) {
      fail_without_remedy(step);
      return false;
    }
    for (int32_t writer : burst_) append(writer, true);
    for (int32_t storage : marked_) {
      if (live_.last_access[storage] < live_.turn) episode_of_[storage] = -1;
    }
    return true;
  }

  // The longest time that a storage can be off the device, in boundaries; the second is before the first where it
  // cannot.
  std::pair<int32_t, int32_t> absence(int32_t storage) const {
    return {std::max(live_.last_forward[storage] + 1, live_.last_forward_write[storage] + 2), back_[storage] - 1};
  }

  // A copy is waited for at a later boundary than it is issued at, and the prefetch is issued at or after the wait for
  // the offload: shorter gaps are kept.
  void find_transfers(std::span<const Decision> decisions) {
    for (int32_t storage : by_write_) {
      if (decisions[storage] != Decision::kOffload) continue;
      const auto [leaves, returns] = absence(storage);
      if (leaves >= returns) continue;
      const int32_t episode = episode_of_[storage];
      result_.episodes[episode].transfer = static_cast<int32_t>(result_.transfers.size());
      result_.transfers.push_back({.episode = episode,
                                   .offload_issue = live_.last_forward_write[storage] + 1,
                                   .offload_wait = leaves,
                                   .prefetch_issue = returns,
                                   .prefetch_wait = back_[storage]});
    }
    by_need_.resize(result_.transfers.size());
    std::iota(by_need_.begin(), by_need_.end(), 0);
    std::ranges::sort(by_need_, {},
                      [&](int32_t index) { return std::pair(result_.transfers[index].prefetch_wait, index); });
  }

  int64_t bytes_of(const Transfer& transfer) const { return live_.bytes[result_.episodes[transfer.episode].storage]; }
  int64_t host_bytes_of(const Transfer& transfer) const {
    return live_.host_bytes[result_.episodes[transfer.episode].storage];
  }
  double us(const Transfer& transfer, CopyKind kind) const {
    return copy_us(limits_, kind, live_.link_bytes[result_.episodes[transfer.episode].storage]);
  }

  // When each instance would start if nothing were waited for.
  void find_clock() {
    clock_.resize(count() + 1);
    double now = 0;
    for (int32_t index = 0; index < count(); ++index) {
      clock_[index] = now;
      const auto [step, is_recomputation] = result_.instances[index];
      now += live_.duration_us[step];
      (is_recomputation ? result_.recompute_us : result_.compute_us) += live_.duration_us[step];
    }
    clock_[count()] = now;
  }

  // Live bytes at every boundary, under the transfers' boundaries as they stand.
  void profile() {
    live_bytes_.assign(count() + 1, 0);
    for (const Episode& episode : result_.episodes) {
      const int64_t bytes = live_.bytes[episode.storage];
      live_bytes_[episode.begin] += bytes;
      live_bytes_[episode.end] -= bytes;
      if (episode.transfer < 0) continue;
      live_bytes_[result_.transfers[episode.transfer].offload_wait] -= bytes;
      live_bytes_[result_.transfers[episode.transfer].prefetch_issue] += bytes;
    }
    std::partial_sum(live_bytes_.begin(), live_bytes_.end(), live_bytes_.begin());
    for (int32_t index = 0; index < count(); ++index)
      live_bytes_[index] += live_.workspace_bytes[result_.instances[index].step];
  }

  static int64_t most(std::span<const int64_t> values, int32_t& where) {
    const auto found = std::ranges::max_element(values);
    where = static_cast<int32_t>(found - values.begin());
    return *found;
  }

  // The boundaries at which prefetches must be issued to arrive just in time, one after the other on the link.
  void find_latest_issues() {
    latest_.resize(result_.transfers.size());
    double link = clock_.back();
    for (size_t index = by_need_.size(); index-- > 0;) {
      const Transfer& transfer = result_.transfers[by_need_[index]];
      link = std::min(link, clock_[transfer.prefetch_wait]) - us(transfer, CopyKind::kPrefetch);
      const auto after = std::upper_bound(clock_.begin(), clock_.begin() + transfer.prefetch_wait, link);
      latest_[by_need_[index]] =
          std::clamp<int32_t>(static_cast<int32_t>(after - clock_.begin()) - 1, 0, transfer.prefetch_wait - 1);
    }
  }

  // The first boundary by which `end_us` has passed, if from boundary `from` at `now_us` on nothing is waited for.
  int32_t boundary_after(double end_us, int32_t from, double now_us) const {
    const double target = clock_[from] + (end_us - now_us) * (1 - 1e-12);
    const auto found = std::lower_bound(clock_.begin() + from, clock_.end(), target);
    return std::min<int32_t>(static_cast<int32_t>(found - clock_.begin()), count());
  }

  // CopyPolicy::kBudget. Goes through the boundaries with the three streams' clocks. tree_ holds the live bytes of
  // every boundary: what lies behind is history, what lies ahead is the least that must be there, with offloads at
  // their predicted ends. A prefetch is issued early only where all that lies ahead still fits with it.
  bool follow_budget(int64_t device_bytes) {
    tree_.assign(live_bytes_);
    find_latest_issues();
    std::vector<Transfer>& transfers = result_.transfers;
    const int32_t transfer_count = static_cast<int32_t>(transfers.size());
    offload_end_.assign(transfer_count, 0);
    prefetch_end_.assign(transfer_count, 0);
    is_released_.assign(transfer_count, 0);
    soonest_.resize(transfer_count);
    for (int32_t index = 0; index < transfer_count; ++index) soonest_[index] = transfers[index].offload_wait;
    releases_.assign(count() + 1, -1);
    next_release_.assign(transfer_count, -1);

    double now = 0;
    double offload_link = 0;
    double prefetch_link = 0;
    int32_t oldest = 0;        // offload not released, in order of issue
    int32_t issued = 0;        // offloads
    size_t next_prefetch = 0;  // in order of need
    size_t next_arrival = 0;
    const auto release = [&](int32_t index, int32_t boundary) {
      Transfer& transfer = transfers[index];
      tree_.add(boundary, transfer.offload_wait, -bytes_of(transfer));
      transfer.offload_wait = boundary;
      is_released_[index] = 1;
      now = std::max(now, offload_end_[index]);
    };
    const auto release_oldest = [&](int32_t boundary) {
      while (oldest < issued && is_released_[oldest]) ++oldest;
      for (int32_t index = oldest; index < issued; ++index) {
        if (is_released_[index] || soonest_[index] > boundary) continue;
        release(index, boundary);
        return true;
      }
      return false;
    };

    for (int32_t boundary = 0; boundary <= count(); ++boundary) {
      for (int32_t index = releases_[boundary]; index >= 0; index = next_release_[index]) {
        if (!is_released_[index]) release(index, boundary);
      }
      for (; next_arrival < by_need_.size() && transfers[by_need_[next_arrival]].prefetch_wait == boundary;
           ++next_arrival)
        now = std::max(now, prefetch_end_[by_need_[next_arrival]]);
      if (boundary == count()) break;
      // A slot that the next instance needs the copy out of.
      for (size_t next = next_prefetch; next < by_need_.size(); ++next) {
        const int32_t index = by_need_[next];
        if (transfers[index].prefetch_wait - 1 != boundary) break;
        if (!is_released_[index]) release(index, boundary);
      }
      while (tree_.at(boundary) > device_bytes) {
        if (release_oldest(boundary)) continue;
        result_.shortage_bytes = tree_.at(boundary) - device_bytes;
        result_.short_at = boundary;
        return false;
      }

      for (; issued < transfer_count && transfers[issued].offload_issue == boundary; ++issued) {
        Transfer& transfer = transfers[issued];
        offload_link = std::max(offload_link, now) + us(transfer, CopyKind::kOffload);
        offload_end_[issued] = offload_link;
        const int32_t soonest = soonest_[issued];
        transfer.offload_wait =
            std::clamp(boundary_after(offload_link, boundary, now), soonest, transfer.prefetch_wait - 1);
        tree_.add(soonest, transfer.offload_wait, bytes_of(transfer));
        next_release_[issued] = releases_[transfer.offload_wait];
        releases_[transfer.offload_wait] = issued;
        result_.issue_order.push_back(2 * issued);
      }
      for (; next_prefetch < by_need_.size(); ++next_prefetch) {
        const int32_t index = by_need_[next_prefetch];
        Transfer& transfer = transfers[index];
        const bool is_due = transfer.prefetch_wait - 1 == boundary;
        if (!is_due) {
          if (latest_[index] > boundary || index >= issued || !is_released_[index]) break;
          if (tree_.max(boundary, transfer.prefetch_wait - 1) > device_bytes - bytes_of(transfer)) break;
          tree_.add(boundary, transfer.prefetch_wait - 1, bytes_of(transfer));
        }
        transfer.prefetch_issue = boundary;
        prefetch_link = std::max(prefetch_link, now) + us(transfer, CopyKind::kPrefetch);
        prefetch_end_[index] = prefetch_link;
        result_.issue_order.push_back(2 * index + 1);
      }
      now += live_.duration_us[result_.instances[boundary].step];
    }
    result_.step_us = now;
    return true;
  }

  // CopyPolicy::kHidden: boundaries from the clock alone.
  void hide() {
    find_latest_issues();
    double link = 0;
    for (size_t index = 0; index < result_.transfers.size(); ++index) {
      Transfer& transfer = result_.transfers[index];
      link = std::max(link, clock_[transfer.offload_issue]) + us(transfer, CopyKind::kOffload);
      const int32_t hidden = boundary_after(link, transfer.offload_issue, clock_[transfer.offload_issue]);
      transfer.offload_wait = std::clamp(hidden, transfer.offload_wait, transfer.prefetch_wait - 1);
      transfer.prefetch_issue = std::max(latest_[index], transfer.offload_wait);
    }
  }

  // CopyPolicy::kLayerwise. There are no recomputations, so instances are steps.
  void follow_layers() {
    for (Transfer& transfer : result_.transfers) {
      const int32_t reader = live_.last_forward[result_.episodes[transfer.episode].storage];
      const int32_t needed = layer_begin_[transfer.prefetch_wait];
      transfer.offload_issue = std::max(layer_begin_[reader], transfer.offload_issue);
      transfer.offload_wait = std::clamp(layer_end_[reader], transfer.offload_wait, transfer.prefetch_wait - 1);
      transfer.prefetch_issue = needed > 0 ? layer_begin_[needed - 1] : 0;
      transfer.prefetch_issue = std::clamp(transfer.prefetch_issue, transfer.offload_wait, transfer.prefetch_wait - 1);
      transfer.prefetch_wait = std::max(needed, transfer.prefetch_issue + 1);
    }
  }

  // Issue order and step time of boundaries that are given.
  void follow_boundaries() {
    std::vector<Transfer>& transfers = result_.transfers;
    const size_t copies = 2 * transfers.size();
    const auto issue = [&](int32_t copy) {
      const Transfer& transfer = transfers[copy / 2];
      return copy % 2 == 0 ? transfer.offload_issue : transfer.prefetch_issue;
    };
    const auto wait = [&](int32_t copy) {
      const Transfer& transfer = transfers[copy / 2];
      return copy % 2 == 0 ? transfer.offload_wait : transfer.prefetch_wait;
    };
    // Of one boundary: offloads in order of writing, prefetches in order of need.
    for (size_t index = 0; index < transfers.size(); ++index)
      result_.issue_order.push_back(static_cast<int32_t>(2 * index));
    for (int32_t index : by_need_) result_.issue_order.push_back(2 * index + 1);
    std::ranges::stable_sort(result_.issue_order, {}, issue);
    std::vector<int32_t> waits(copies);
    std::iota(waits.begin(), waits.end(), 0);
    std::ranges::stable_sort(waits, {}, wait);
    std::vector<double> end(copies, 0);
    double now = 0;
    double link[2] = {0, 0};
    size_t next_issue = 0;
    size_t next_wait = 0;
    for (int32_t boundary = 0; boundary <= count(); ++boundary) {
      for (; next_wait < copies && wait(waits[next_wait]) == boundary; ++next_wait)
        now = std::max(now, end[waits[next_wait]]);
      for (; next_issue < copies && issue(result_.issue_order[next_issue]) == boundary; ++next_issue) {
        const int32_t copy = result_.issue_order[next_issue];
        const CopyKind kind = copy % 2 == 0 ? CopyKind::kOffload : CopyKind::kPrefetch;
        link[copy % 2] = std::max(link[copy % 2], now) + us(transfers[copy / 2], kind);
        end[copy] = link[copy % 2];
      }
      if (boundary < count()) now += live_.duration_us[result_.instances[boundary].step];
    }
    result_.step_us = now;
  }

  // Exact live bytes of both pools.
  void check_budgets(int64_t device_bytes, int64_t host_bytes) {
    profile();
    int32_t device_at = 0;
    result_.device_live_bytes = most(live_bytes_, device_at);
    live_bytes_.assign(count() + 1, 0);
    for (const Transfer& transfer : result_.transfers) {
      live_bytes_[transfer.offload_issue] += host_bytes_of(transfer);
      live_bytes_[transfer.prefetch_wait] -= host_bytes_of(transfer);
    }
    std::partial_sum(live_bytes_.begin(), live_bytes_.end(), live_bytes_.begin());
    int32_t host_at = 0;
    result_.host_live_bytes = most(live_bytes_, host_at);
    result_.short_on_host = result_.host_live_bytes > host_bytes && result_.device_live_bytes <= device_bytes;
    result_.short_at = result_.short_on_host ? host_at : device_at;
    result_.shortage_bytes = result_.short_on_host ? result_.host_live_bytes - host_bytes
                                                   : std::max<int64_t>(0, result_.device_live_bytes - device_bytes);
    result_.feasible = result_.shortage_bytes == 0;
  }

  const Liveness& live_;
  const Limits limits_;
  int64_t work_ = 0;
  Schedule result_;

  // Of all runs.
  std::vector<int32_t> by_write_;  // saved storages, by their last forward write
  std::vector<int32_t> layer_begin_, layer_end_;

  // Of one run, per storage.
  std::vector<int32_t> episode_of_;  // that is open; -1: absent
  std::vector<int32_t> back_;        // first instance at or after the turn that touches it
  std::vector<char> is_changed_;     // written by a backward step: no longer what forward steps left
  // Stamps of the burst that is being collected.
  int32_t mark_ = 0;
  std::vector<int32_t> storage_mark_, step_mark_;
  std::vector<int32_t> marked_, burst_;
  // Per boundary.
  std::vector<double> clock_;
  std::vector<int64_t> live_bytes_, change_;
  RangeMax tree_;
  std::vector<int32_t> releases_;  // first of a list through next_release_
  // Per transfer.
  std::vector<int32_t> by_need_, latest_, soonest_, next_release_;
  std::vector<double> offload_end_, prefetch_end_;
  std::vector<char> is_released_;
};

Scheduler::Scheduler(const Graph& graph, const Liveness& live, const Limits& limits)
    : state_(std::make_unique<State>(graph, live, limits)) {}
Scheduler::~Scheduler() = default;

const Schedule& Scheduler::run(std::span<const Decision> decisions, CopyPolicy policy, int64_t device_bytes,
                               int64_t host_bytes) {
  return state_->run(decisions, policy, device_bytes, host_bytes);
}
const Schedule& Scheduler::measure(std::span<const Decision> decisions) {
  return state_->measure(decisions);
}
int32_t Scheduler::offloads_needed(std::span<const Decision> decisions, std::span<const int32_t> order,
                                   int64_t device_bytes) {
  return state_->offloads_needed(decisions, order, device_bytes);
}
bool Scheduler::would_be_absent(int32_t storage, int32_t instance) const {
  return state_->would_be_absent(storage, instance);
}
int64_t Scheduler::work() const {
  return state_->work();
}

}  // namespace splitkern::memory
