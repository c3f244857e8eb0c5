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
#include <limits>
#include <span>
#include <vector>

#include "memory/placement/problem.h"

namespace splitkern::memory::placement {

enum class Outcome : uint8_t { kFound, kRefuted, kLimit };

// Which of the buffers that fit is tried first.
enum class Preference : uint8_t { kWidest, kTightest, kLargest, kArea };

// Where the next decision is looked for: in all niches, or, while a range has many sections, in the one next to the
// last change. That takes more nodes on hard instances and a tenth of the time on easy large ones.
enum class Focus : uint8_t { kAll, kNear };

class Search {
 public:
  // `problem` must outlive the search. `stop` is asked now and then; true ends a run with kLimit.
  Search(const Problem& problem, std::function<bool()> stop);

  // Offsets below `capacity`, written to offsets() when found. kRefuted: there is none. `seed` 0: the plain preference;
  // else preferences are perturbed. Sections that failed in earlier runs are decided earlier in later ones.
  Outcome run(int64_t capacity, Preference preference, uint64_t seed, int64_t node_limit, Focus focus = Focus::kAll);

  void forget_failures();

  std::span<const int64_t> offsets() const { return offsets_; }
  // Of all runs; one that looks at many sections counts as several: about a microsecond each.
  int64_t nodes() const { return nodes_; }

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

  struct Change {  // of the trail: a buffer was placed, or (buffer -1) a section raised
    int32_t buffer;
    int32_t section;
    int64_t floor;
  };
  // A range of sections that is still to be solved, in a list. Those that one decision set apart have it as parent: if
  // one of them fails, so does the decision, whatever was decided in the others meanwhile.
  struct Goal {
    int32_t begin, end;
    int32_t near;    // a section where the last change was
    int32_t parent;  // decision, -1: none
    int32_t next;    // goal, -1: none
    uint64_t hash;
  };
  struct Choice {
    int32_t section = -1;
    int32_t niche_begin = 0, niche_end = 0;
    int64_t raised = 0;  // the floor of the section if nothing lies on it now; kNever: not possible
  };
  struct Decision {
    Goal goal;
    Choice choice;
    size_t trail_before, trail_after;  // around what look() raised
    size_t goals, candidates, candidates_end;
    size_t next;  // candidate; candidates_end: raise; beyond: nothing is left
  };
  enum class Look : uint8_t { kChoose, kDone, kConflict };

  // The states of ranges above this are not remembered.
  static constexpr int32_t kWide = 320;
  static bool wide(int32_t begin, int32_t end) { return end - begin > kWide; }

  bool advance(int32_t decision);
  bool is_twin(const Decision& decision) const;
  void place(const Goal& goal, int32_t buffer, int32_t decision);
  void add_goal(int32_t begin, int32_t end, int32_t near, int32_t decision);
  Look look(Goal& goal, Choice& choice);
  bool look_at_niche(Goal& goal, int32_t a, int32_t b, Choice& choice, double& best, int64_t& best_slack, bool& raised);
  bool raise(Goal& goal, int32_t section, int64_t floor);
  void undo(size_t mark);
  uint64_t hash_of(int32_t begin, int32_t end) const;

  const Problem& problem_;
  std::function<bool()> stop_;
  int64_t capacity_ = 0;
  Focus focus_ = Focus::kAll;
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
  std::vector<Goal> goals_;
  int32_t open_ = -1;  // the first goal of the list
  std::vector<Decision> decisions_;
  std::vector<int32_t> candidates_;  // of all decisions
  std::vector<uint64_t> key_;        // of each buffer, for hashes
  std::vector<uint64_t> refuted_;    // open table of hashes, newest wins

  // Scratch of look().
  std::vector<int32_t> covers_;
  std::vector<int64_t> ends_before_, begins_after_;
};

}  // namespace splitkern::memory::placement
