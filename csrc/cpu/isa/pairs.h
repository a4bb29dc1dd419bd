#pragma once

// Sums over a row in two halves, taken in turn.

#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

/// Two LaneSums side by side, since one addition waits for the one before.
template <class V>
class PairSum {
 public:
  template <int kWhich>
  HALFSTEP_FN LaneSum<V>& operator[](std::integral_constant<int, kWhich>) {
    return sum_[kWhich];
  }
  HALFSTEP_FN void flush() {
    sum_[0].flush();
    sum_[1].flush();
  }
  HALFSTEP_FN double total() { return sum_lanes(sum_[0].lanes() + sum_[1].lanes()); }

 private:
  LaneSum<V> sum_[2];
};

/// body(i, lanes, which) for the packs of a row, `which` 0 and 1 in turn; what it adds to that half
/// of each of `sums`, one term a pack, is flushed when 64 terms of each half have come.
template <class Body, class... Sums>
HALFSTEP_FN void for_each_pair(int64_t n, const Body& body, Sums&... sums) {
  constexpr std::integral_constant<int, 0> even;
  constexpr std::integral_constant<int, 1> odd;
  constexpr int64_t kPair = 2 * kLanes, kBlock = 64 * kPair;
  int64_t i = 0;
  while (i + kPair <= n) {
    const int64_t end = i + kBlock <= n ? i + kBlock : n;
    for (; i + kPair <= end; i += kPair) {
      body(i, Whole(), even);
      body(i + kLanes, Whole(), odd);
    }
    if (i % kBlock == 0) (sums.flush(), ...);
  }
  if (i + kLanes <= n) {
    body(i, Whole(), even);
    i += kLanes;
  }
  if (i < n) body(i, Part{int(n - i)}, odd);
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
