// Which rows of a batch are computed together and when, and the numbers of every evaluation.
// The definitions are in mfd_fast/rollout/plan.py and mfd_fast/rollout/table.py.
// Plain C++17: neither Python nor torch.
#pragma once

#include <cstdint>
#include <vector>

namespace mfd_fast {

// Rows in slots. A slot computes its rows one after the other; slots that run dry fall off the end.
struct Schedule {
  std::vector<std::int64_t> order;  // rows, longest first
  std::vector<std::int64_t> slot;   // of each row
  std::vector<std::int64_t> begin;  // first evaluation of each row
  std::vector<std::int64_t> live;   // slots at work in each evaluation; never more than before
};

// The schedule of `rows` rows of the given lengths (evaluations) in at most `slots` slots.
// Throws std::invalid_argument if a length is negative or slots below one.
Schedule make_schedule(const std::int64_t* lengths, std::int64_t rows, std::int64_t slots);

// A solver as phases: `start` of them for the first step, then `cycle` of them for each step after it. Each has a
// position in time, which memory keeps its velocity, and 2 * (1 + memories) coefficients.
struct Program {
  std::int64_t start;
  std::int64_t cycle;
  std::int64_t memories;
  const double* positions;
  const std::int64_t* stores;
  const double* coefficients;
};

// Rows of an integration: slot, first evaluation, evaluations, start, end, steps planned and steps run of each.
struct Intervals {
  std::int64_t rows;
  const std::int64_t* slot;
  const std::int64_t* begin;
  const std::int64_t* length;
  const double* t;
  const double* r;
  const std::int64_t* steps;
  const std::int64_t* run;
};

// Fill table [count, 3 + 2 * (1 + memories), slots], all zero, for the evaluations first ... first + count - 1.
template <class T>
void tabulate(const Program& program, const Intervals& intervals, std::int64_t first, std::int64_t count,
              std::int64_t slots, T* table);

}  // namespace mfd_fast
