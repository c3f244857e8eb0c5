// Branch and bound for one capacity: is there a placement that stays below it? Called by place() on the independent
// parts of an instance, with several orders, growing node limits and falling capacities. Assumes a connected part of at
// most some thousands of buffers: a node costs time in proportion to the sections.
//
// The state is a skyline: for every section a floor, above which its remaining buffers must go. In a niche (a run of
// equal floors between higher ones) the lowest remaining buffer of a section either lies on the floor, with its whole
// lifetime inside the niche, or everything of that section lies higher and the space is lost. Those are the branches.
// A section has capacity - floor - remaining bytes to lose, and a branch that would lose more is cut. The section with
// the fewest branches is decided first. Where no remaining buffer joins the two sides of a boundary, they are solved
// apart; states that were refuted once are remembered.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "memory/placement/problem.h"

namespace splitkern::memory::placement {

enum class Outcome : uint8_t { kFound, kRefuted, kLimit };

// Which of the buffers that fit is tried first.
enum class Preference : uint8_t { kWidest, kTightest, kLargest, kArea };

class Search {
 public:
  // `problem` must outlive the search. `stop` is asked now and then; true ends a run with kLimit.
  Search(const Problem& problem, std::function<bool()> stop);

  // Offsets below `capacity`, written to offsets() when found. kRefuted: there is none. `seed` 0: the plain preference;
  // else preferences are perturbed. What failed in earlier runs steers later ones: reset() forgets it.
  Outcome run(int64_t capacity, Preference preference, uint64_t seed, int64_t node_limit);
  void reset();

  std::span<const int64_t> offsets() const { return offsets_; }
  int64_t nodes() const { return nodes_; }  // of all runs

 private:
  struct Change {  // of the trail: a buffer was placed, or (buffer -1) a section raised
    int32_t buffer;
    int32_t section;
    int64_t floor;
  };
  struct Choice {
    int32_t section = -1;
    int32_t niche_begin = 0, niche_end = 0;
    int64_t raised = 0;  // the floor of the section if nothing lies on it now; kNever: not possible
  };
  enum class Look : uint8_t { kChoose, kDone, kConflict };

  Outcome solve(int32_t begin, int32_t end, uint64_t hash);
  Outcome descend(int32_t begin, int32_t end, uint64_t hash, int32_t buffer);
  Look look(int32_t begin, int32_t end, uint64_t& hash, Choice& choice);
  bool raise(int32_t section, int64_t floor, uint64_t& hash);
  void undo(size_t mark);
  uint64_t hash_of(int32_t begin, int32_t end) const;
  uint64_t floor_hash(int32_t section, int64_t floor) const;
  void remember(uint64_t hash);
  bool refuted(uint64_t hash) const;

  const Problem& problem_;
  std::function<bool()> stop_;
  int64_t capacity_ = 0;
  int64_t nodes_ = 0;
  int64_t nodes_end_ = 0;

  std::vector<int32_t> starts_;  // buffers [starts_[s], starts_[s+1]) begin at section s
  std::vector<int32_t> reach_;   // per section: buffers that begin there or earlier reach back to this section
  std::vector<int64_t> floor_, remaining_;
  std::vector<int32_t> crossing_;  // remaining buffers that span sections s and s+1
  std::vector<char> placed_;
  std::vector<int64_t> offsets_;
  std::vector<double> rank_;    // candidates in ascending order
  std::vector<double> weight_;  // of a section: how often it was the one that failed
  std::vector<Change> trail_;
  std::vector<int32_t> candidates_;  // a stack
  std::vector<uint64_t> key_;        // of each buffer, for hashes
  std::vector<uint64_t> refuted_;    // open table of hashes, newest wins

  // Scratch of look().
  std::vector<int32_t> covers_;
  std::vector<int64_t> ends_before_, begins_after_;
};

}  // namespace splitkern::memory::placement
