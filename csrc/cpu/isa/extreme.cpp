// The largest or smallest element of FP16 rows, and where it stands first.
//   The row is read for its extreme, then, from the cache, up to the first element that equals it.
//   Bytes an element: 2.
// Tests: tests/python/test_overrides_layers.py.

#include "extreme.h"

#include "kernels.h"
#include "rows.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

using Half = Elements<Dtype::kF16>;

/// The first element of which `is(pack)` holds; there is one.
template <class Is>
int64_t first_where(const uint16_t* x, int64_t n, const Is& is) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t some = n - i < kLanes ? n - i : kLanes;
    const auto found = is(some == kLanes ? Half::load(x, i) : Half::load(x, i, Part{int(some)}));
    if (!any(found)) continue;
    for (int64_t k = 0; k < some; ++k)
      if (is_set(found, int(k))) return i + k;
  }
  return 0;
}

/// kSmallest works on -x.
template <bool kSmallest>
void rows(const ExtremeRows& work, int64_t begin, int64_t end) {
  const auto signed_load = [](const uint16_t* x, int64_t i, auto lanes) {
    const F32 value = Half::load(x, i, lanes);
    return kSmallest ? broadcast<F32>(-0.0f) - value : value;
  };
  for (int64_t row = begin; row < end; ++row) {
    const uint16_t* x = work.x + row * work.n;
    F32 best = broadcast<F32>(-__builtin_inff());
    I32 nan = broadcast<I32>(0);
    for_each_pack(
        work.n, [&](int64_t i, auto lanes) __attribute__((always_inline)) {
          const F32 value = within(signed_load(x, i, lanes), lanes, -__builtin_inff());
          nan = nan | (value != value);
          best = larger(value, best);
        });
    int64_t at;
    if (__builtin_expect(any(nan), 0)) {
      at = first_where(x, work.n, [](const F32& v) { return v != v; });
    } else {
      const float top = max_lane(best);
      const F32 value = broadcast<F32>(kSmallest ? -top : top);
      at = first_where(x, work.n, [&](const F32& v) { return v == value; });
    }
    work.values[row] = x[at];
    work.indices[row] = at;
  }
}

}  // namespace

void extreme(const ExtremeRows& work, bool smallest, int64_t begin, int64_t end) {
  if (smallest)
    rows<true>(work, begin, end);
  else
    rows<false>(work, begin, end);
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
