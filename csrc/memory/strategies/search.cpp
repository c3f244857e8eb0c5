// The strategies that search for decisions: "recompute" (nothing is copied) and "default" (everything goes). What one
// decision costs depends on all others, through the link, the bytes and what bursts of recomputation need, so the
// search rates whole decisions by scheduling them. First a sweep: compute again what costs least per byte, offload of
// the rest what came first, as much as the budget asks for, keep the remainder; over the share that is computed again
// and the bytes that one burst may need. Then descent from the best: blocks of neighbours, in time or in cost, large to
// small, get another decision, and where that no longer fits, more is offloaded. Deterministic: effort is counted in
// instances.
#include <algorithm>
#include <array>
#include <numeric>
#include <utility>

#include "memory/strategies/strategy.h"

namespace splitkern::memory {
namespace {

// Steele, Lea and Flood's SplitMix64: the same everywhere.
class Random {
 public:
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  size_t below(size_t bound) { return next() % bound; }

 private:
  uint64_t state_ = 1;
};

class Search {
 public:
  Search(const Problem& problem, Scheduler& scheduler, bool may_offload)
      : problem_(problem), live_(problem.live), scheduler_(scheduler), end_of_work_(scheduler.work() + problem.effort) {
    for (int32_t storage : saved_by_write(live_)) {
      can_offload_.push_back(may_offload && may(live_, problem.limits, storage, Decision::kOffload));
      can_recompute_.push_back(may(live_, problem.limits, storage, Decision::kRecompute));
      if (!can_offload_.back() && !can_recompute_.back()) {
        can_offload_.pop_back();
        can_recompute_.pop_back();
        continue;
      }
      by_time_.push_back(storage);
    }
    int64_t saved_bytes = 0;
    for (int32_t index = 0; index < count(); ++index) {
      if (can_recompute_[index]) by_cost_.push_back(index);
      saved_bytes += live_.bytes[by_time_[index]];
    }
    // Half of its time on the link would be latency, or it is a small part of the average.
    const double latency_bytes = problem.limits.copy_latency_us * problem.limits.offload_gbps * 1e3;
    small_bytes_ = std::max<int64_t>(static_cast<int64_t>(std::min(latency_bytes, 1e15)),
                                     count() > 0 ? saved_bytes / count() / kSmallShare : 0);
    std::ranges::stable_sort(by_cost_, {}, [&](int32_t index) {
      return live_.recompute_us[by_time_[index]] / static_cast<double>(live_.bytes[by_time_[index]]);
    });
  }

  // Seeds: the best is where the descent begins if the sweep finds nothing better.
  void consider(const std::vector<Decision>& decisions) { rate(decisions); }

  void run() {
    rate(keep_all(problem_));
    if (is_perfect()) return;
    sweep();
    if (!best_.feasible) {
      const Proposal least = find_least();
      rate(least.decisions);
    }
    if (best_.feasible) descend();
  }

  const Proposal& best() const { return best_; }

  Proposal find_least() {
    least_ = Proposal{.decisions = {}, .least_live_bytes = kUnlimited};
    weigh(keep_all(problem_));
    if (count() == 0) return least_;
    for (int level = 0; level < kBursts; ++level) {
      const int64_t burst = burst_bytes(level);
      for (int part = 0; part <= kParts; ++part) {
        std::vector<Decision> decisions = recompute_cheapest(share(part), burst);
        const std::vector<int32_t> order = offload_order(decisions);
        for (int32_t storage : order) decisions[storage] = Decision::kOffload;
        weigh(decisions);
      }
    }
    for (const std::vector<Decision>& rule : {layerwise_decisions(problem_), paper_decisions(problem_)}) {
      if (is_allowed(rule)) weigh(rule);
    }
    lighten();
    return least_;
  }

 private:
  static constexpr int kParts = 8;
  static constexpr int kSmallShare = 16;
  static constexpr int kRepairs = 6;
  static constexpr int kLightenings = 128;

  int32_t count() const { return static_cast<int32_t>(by_time_.size()); }
  bool has_work() const { return scheduler_.work() < end_of_work_; }
  // Nothing is faster than the captured operations alone.
  bool is_perfect() const { return best_.feasible && best_.step_us <= compute_us_ * (1 + 1e-9); }
  size_t share(int part) const { return by_cost_.size() * part / kParts; }

  bool is_allowed(const std::vector<Decision>& decisions) const {
    for (int32_t index = 0; index < count(); ++index) {
      const Decision decision = decisions[by_time_[index]];
      if (decision == Decision::kOffload && !can_offload_[index]) return false;
      if (decision == Decision::kRecompute && !can_recompute_[index]) return false;
    }
    return true;
  }

  // Returns whether this is the best so far.
  bool rate(const std::vector<Decision>& decisions) {
    const Schedule& schedule =
        scheduler_.run(decisions, CopyPolicy::kBudget, problem_.device_bytes, problem_.limits.host_bytes);
    if (!schedule.feasible) return false;
    compute_us_ = schedule.compute_us;
    if (best_.feasible && schedule.step_us >= best_.step_us * (1 - 1e-12)) return false;
    best_ = Proposal{.decisions = decisions,
                     .policy = CopyPolicy::kBudget,
                     .feasible = true,
                     .step_us = schedule.step_us,
                     .least_live_bytes = schedule.least_device_bytes};
    return true;
  }

  bool weigh(const std::vector<Decision>& decisions) {
    const Schedule& schedule = scheduler_.measure(decisions);
    if (schedule.host_live_bytes > problem_.limits.host_bytes) return false;
    if (!least_.decisions.empty() && schedule.least_device_bytes >= least_.least_live_bytes) return false;
    least_ = Proposal{
        .decisions = decisions, .policy = CopyPolicy::kBudget, .least_live_bytes = schedule.least_device_bytes};
    return true;
  }

  // Bytes that one burst of recomputation may need. They do not depend on the budget: what is feasible at all must not.
  static constexpr int kBursts = 8;
  int64_t burst_bytes(int level) const {
    int64_t saved = 0;
    for (int32_t storage : by_time_) saved += live_.bytes[storage];
    return level == 0 ? kUnlimited : std::max<int64_t>(1, saved >> level);
  }

  // The first `taken` of by_cost_, but so that no chain of them needs much more than `burst` bytes at a time: where one
  // would, it is cut at the smallest storage in its second half, which is saved instead.
  std::vector<Decision> recompute_cheapest(size_t taken, int64_t burst) {
    std::vector<Decision> decisions = keep_all(problem_);
    for (size_t index = 0; index < taken; ++index) decisions[by_time_[by_cost_[index]]] = Decision::kRecompute;
    if (burst == kUnlimited) return decisions;
    // Per storage: what the chain up to it holds, and where it would best be cut.
    chain_bytes_.assign(live_.storages(), 0);
    cut_.assign(live_.storages(), -1);
    const auto is_computed = [&](int32_t storage) {
      return !live_.saved[storage] || decisions[storage] == Decision::kRecompute;
    };
    const auto renew = [&](int32_t storage) {
      const int32_t cut = cut_[storage];
      if (cut < 0 || is_computed(cut)) return;
      chain_bytes_[storage] = std::max<int64_t>(0, chain_bytes_[storage] - cut_bytes_[cut]);
      cut_[storage] = -1;
    };
    cut_bytes_.assign(live_.storages(), 0);
    for (int32_t step = 0; step < live_.turn; ++step) {
      int64_t before = 0;
      int32_t cut = -1;
      for (const Access& access : live_.accesses[step]) {
        if (!access.reads || access.writes) continue;
        renew(access.storage);
        if (chain_bytes_[access.storage] > before) {
          before = chain_bytes_[access.storage];
          cut = cut_[access.storage];
        }
      }
      for (const Access& access : live_.accesses[step]) {
        const int32_t storage = access.storage;
        if (!access.writes || live_.resident[storage] || live_.output[storage] || !is_computed(storage)) continue;
        // A joined tensor needs the chains of all its writers.
        const bool is_first = live_.first_access[storage] == step;
        chain_bytes_[storage] += before + (is_first && live_.saved[storage] ? live_.bytes[storage] : 0);
        if (cut_[storage] < 0) cut_[storage] = cut;
        if (!live_.saved[storage]) continue;
        renew(storage);
        if (chain_bytes_[storage] >= burst / 2 &&
            (cut_[storage] < 0 || live_.bytes[storage] <= live_.bytes[cut_[storage]])) {
          cut_[storage] = storage;
          cut_bytes_[storage] = chain_bytes_[storage];
        }
        if (chain_bytes_[storage] <= burst) continue;
        decisions[cut_[storage]] = Decision::kKeep;
        if (cut_[storage] == storage) {
          chain_bytes_[storage] = 0;
          cut_[storage] = -1;
        } else {
          renew(storage);
        }
      }
    }
    return decisions;
  }

  // What is kept and could be offloaded, first written first, as far as the host has room; at the end what is so small
  // that its copy costs the link more than it relieves the device.
  std::vector<int32_t> offload_order(const std::vector<Decision>& decisions) const {
    int64_t host_bytes = 0;
    for (int32_t storage : by_time_) {
      if (decisions[storage] == Decision::kOffload) host_bytes += live_.host_bytes[storage];
    }
    std::vector<int32_t> order;
    for (const bool is_small : {false, true}) {
      for (int32_t index = 0; index < count(); ++index) {
        const int32_t storage = by_time_[index];
        if (!can_offload_[index] || decisions[storage] != Decision::kKeep) continue;
        if ((live_.bytes[storage] < small_bytes_) != is_small) continue;
        if (live_.host_bytes[storage] > problem_.limits.host_bytes - host_bytes) continue;
        host_bytes += live_.host_bytes[storage];
        order.push_back(storage);
      }
    }
    return order;
  }

  void sweep() {
    for (int level = 0; level < kBursts; ++level) {
      const int64_t burst = burst_bytes(level);
      for (int part = 0; part <= kParts; ++part) try_share(share(part), burst);
    }
    // Finer around the best.
    for (size_t width = by_cost_.size() / (2 * kParts); width > 0; width /= 2) {
      const size_t taken = best_taken_;
      if (taken >= width) try_share(taken - width, best_burst_);
      if (taken + width <= by_cost_.size()) try_share(taken + width, best_burst_);
    }
  }

  void try_share(size_t taken, int64_t burst) {
    if (is_perfect()) return;
    const std::vector<Decision> decisions = recompute_cheapest(taken, burst);
    const std::vector<int32_t> order = offload_order(decisions);
    const int32_t all = static_cast<int32_t>(order.size());
    const int32_t needed = scheduler_.offloads_needed(decisions, order, problem_.device_bytes);
    if (needed > all) return;
    const int32_t large = static_cast<int32_t>(
        std::ranges::count_if(order, [&](int32_t storage) { return live_.bytes[storage] >= small_bytes_; }));
    int32_t before = -1;
    for (int32_t offloaded : {needed, needed + (all - needed) / 4, needed + (all - needed) / 2, large, all}) {
      if (offloaded <= before) continue;
      before = offloaded;
      std::vector<Decision> tried = decisions;
      for (int32_t index = 0; index < offloaded; ++index) tried[order[index]] = Decision::kOffload;
      if (rate(tried)) {
        best_taken_ = taken;
        best_burst_ = burst;
      }
    }
  }

  // Where it does not fit, offloads more, or computes more again of what is live at the peak, cheapest first.
  bool rate_repaired(const std::vector<Decision>& decisions) {
    bool improved = false;
    const std::vector<int32_t> order = offload_order(decisions);
    const int32_t needed = scheduler_.offloads_needed(decisions, order, problem_.device_bytes);
    if (needed <= static_cast<int32_t>(order.size())) {
      std::vector<Decision> repaired = decisions;
      for (int32_t index = 0; index < needed; ++index) repaired[order[index]] = Decision::kOffload;
      improved = rate(repaired);
      if (needed == 0) return improved;
    }
    std::vector<Decision> repaired = decisions;
    for (int round = 0; round < kRepairs; ++round) {
      const Schedule& schedule = scheduler_.measure(repaired);
      if (schedule.least_device_bytes <= problem_.device_bytes) return rate(repaired) || improved;
      if (schedule.least_device_bytes == kUnlimited) return improved;
      int64_t excess = schedule.least_device_bytes - problem_.device_bytes;
      for (int32_t index : by_cost_) {
        const int32_t storage = by_time_[index];
        if (excess <= 0) break;
        if (repaired[storage] != Decision::kKeep || !scheduler_.would_be_absent(storage, schedule.short_at)) continue;
        repaired[storage] = Decision::kRecompute;
        excess -= live_.bytes[storage];
      }
      if (excess > 0) return improved;
    }
    return improved;
  }

  void descend() {
    std::vector<int32_t> time_order(count());
    std::iota(time_order.begin(), time_order.end(), 0);
    std::vector<int32_t> cost_order = by_cost_;
    for (int32_t index = 0; index < count(); ++index) {
      if (!can_recompute_[index]) cost_order.push_back(index);
    }
    for (bool improved = true; improved && has_work() && !is_perfect();) {
      improved = false;
      for (int32_t size = std::max(1, count() / 4);; size = std::max(1, size / 2)) {
        for (const std::vector<int32_t>* order : {&time_order, &cost_order})
          improved |= descend_by_blocks(*order, size);
        if (size == 1 || !has_work() || is_perfect()) break;
      }
    }
    descend_by_pairs();
  }

  bool descend_by_blocks(const std::vector<int32_t>& order, int32_t size) {
    bool improved = false;
    std::vector<int32_t> begins;
    for (int32_t begin = 0; begin < count(); begin += size) begins.push_back(begin);
    for (size_t left = begins.size(); left > 1; --left) std::swap(begins[left - 1], begins[random_.below(left)]);
    for (int32_t begin : begins) {
      for (Decision decision : {Decision::kKeep, Decision::kOffload, Decision::kRecompute}) {
        if (!has_work() || is_perfect()) return improved;
        std::vector<Decision> decisions = best_.decisions;
        bool changed = false;
        for (int32_t index = begin; index < std::min(begin + size, count()); ++index)
          changed |= set(decisions, order[index], decision);
        if (changed) improved |= rate_repaired(decisions);
      }
    }
    return improved;
  }

  bool set(std::vector<Decision>& decisions, int32_t index, Decision decision) const {
    if (decision == Decision::kOffload && !can_offload_[index]) return false;
    if (decision == Decision::kRecompute && !can_recompute_[index]) return false;
    return std::exchange(decisions[by_time_[index]], decision) != decision;
  }

  // Two storages that change places, as it were: one decision alone does not fit or does not pay. From anew after every
  // success, until all pairs have failed or the work is done.
  void descend_by_pairs() {
    constexpr std::array kAll = {Decision::kKeep, Decision::kOffload, Decision::kRecompute};
    for (bool improved = true; improved;) {
      improved = false;
      for (int32_t distance = 1; distance < count() && !improved; ++distance) {
        for (int32_t first = 0; first + distance < count() && !improved; ++first) {
          for (Decision one : kAll) {
            for (Decision other : kAll) {
              if (!has_work() || is_perfect()) return;
              std::vector<Decision> decisions = best_.decisions;
              if (set(decisions, first, one) && set(decisions, first + distance, other)) improved |= rate(decisions);
            }
          }
        }
      }
    }
  }

  // From the lightest of the sweep: blocks of neighbours in time, then single storages, largest first.
  void lighten() {
    std::vector<int32_t> by_size(count());
    std::iota(by_size.begin(), by_size.end(), 0);
    int left = kLightenings;
    for (int32_t size = std::max(1, count() / 8);; size = std::max(1, size / 4)) {
      if (size == 1) {
        std::ranges::stable_sort(by_size, std::ranges::greater{},
                                 [&](int32_t index) { return live_.bytes[by_time_[index]]; });
      }
      for (int32_t begin = 0; begin < count(); begin += size) {
        for (Decision decision : {Decision::kOffload, Decision::kRecompute}) {
          if (left == 0) return;
          std::vector<Decision> decisions = least_.decisions;
          bool changed = false;
          for (int32_t index = begin; index < std::min(begin + size, count()); ++index)
            changed |= set(decisions, by_size[index], decision);
          if (!changed) continue;
          --left;
          weigh(decisions);
        }
      }
      if (size == 1) return;
    }
  }

  const Problem& problem_;
  const Liveness& live_;
  Scheduler& scheduler_;
  const int64_t end_of_work_;
  Random random_;

  std::vector<int32_t> by_time_;  // storages with a choice; other orders hold positions in this one
  std::vector<char> can_offload_, can_recompute_;
  int64_t small_bytes_ = 0;
  std::vector<int32_t> by_cost_;  // that can be computed again, by microseconds per byte
  std::vector<int64_t> chain_bytes_, cut_bytes_;
  std::vector<int32_t> cut_;

  double compute_us_ = 0;
  Proposal best_;
  size_t best_taken_ = 0;
  int64_t best_burst_ = kUnlimited;
  Proposal least_;
};

}  // namespace

std::vector<Proposal> propose_recompute(const Problem& problem, Scheduler& scheduler) {
  Search search(problem, scheduler, false);
  search.run();
  return {search.best()};
}

std::vector<Proposal> propose_default(const Problem& problem, Scheduler& scheduler) {
  Search search(problem, scheduler, true);
  // The rules' decisions, timed with an eye on the budget, and the rules themselves, as they are.
  search.consider(layerwise_decisions(problem));
  search.consider(paper_decisions(problem));
  std::vector<Proposal> proposals = propose_recompute(problem, scheduler);
  if (proposals.front().feasible) search.consider(proposals.front().decisions);
  search.run();
  proposals.push_back(search.best());
  for (const Propose rule : {&propose_none, &propose_layerwise, &propose_paper}) {
    std::vector<Proposal> more = rule(problem, scheduler);
    proposals.push_back(std::move(more.front()));
  }
  std::erase_if(proposals, [](const Proposal& proposal) { return !proposal.feasible; });
  std::ranges::stable_sort(proposals, {}, &Proposal::step_us);
  return proposals;
}

Proposal least_recompute(const Problem& problem, Scheduler& scheduler) {
  return Search(problem, scheduler, false).find_least();
}
Proposal least_default(const Problem& problem, Scheduler& scheduler) {
  return Search(problem, scheduler, true).find_least();
}

}  // namespace splitkern::memory
