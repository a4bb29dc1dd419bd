// adam, sgd:  unscale x clip x update x 16-bit write in one pass; formulas in csrc/math/optim.h.
//   Bytes an FP16 parameter with split16 and FP32 states: gradient 2, weight 2+2, remainder 2+2,
//   m 4+4, v 4+4 = 26 (and 2 of grad_stats).
//   An element whose 16-bit weight would leave its range keeps weight, master and states, and
//   counts. Safe when the parameter is also its own master or gradient: each group is read before
//   it is written.
// write_masters, read_masters, refresh_masters:  conversions between exact values and what is held.
// Tests: tests/cpp/optim_test.cpp, tests/python/test_optim.py.

#include "slots.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

/// Puts back the old value in the lanes of `mask`.
template <class V, class M>
HALFSTEP_FN void keep(const M& mask, V& value, const V& old) {
  value = select(mask, old, value);
}

template <class V>
HALFSTEP_FN V load_state(const char* state, int64_t i) {
  return load_lanes(reinterpret_cast<const typename Traits<V>::Scalar*>(state) + i);
}
template <class V>
HALFSTEP_FN void store_state(char* state, int64_t i, const V& x) {
  store_lanes(reinterpret_cast<typename Traits<V>::Scalar*>(state) + i, x);
}

template <class S, bool kAmsgrad>
int64_t adam_pass(const StepTensor& t, const AdamStep& step, int64_t begin, int64_t end) {
  using V = typename S::Value;
  constexpr int64_t kState = sizeof(typename S::T);
  const Arrays<6> arrays = {
      {static_cast<char*>(t.param), static_cast<char*>(t.master),
       static_cast<char*>(const_cast<void*>(t.grad)), static_cast<char*>(t.state1),
       static_cast<char*>(t.state2), static_cast<char*>(t.state3)},
      {S::kParamSize, S::kMasterSize, dtype_size(t.grad_dtype), kState, kState,
       kAmsgrad ? kState : 0},
      {true, true, false, true, true, true}};
  const AdamStep c = step;
  const Dtype grad_dtype = t.grad_dtype;
  return walk(
      arrays, begin, end, [&](char* const* data, int64_t i) __attribute__((always_inline)) {
        V p = S::load(data[0], data[1], i);
        V m = load_state<V>(data[3], i), v = load_state<V>(data[4], i), v_max = v;
        if constexpr (kAmsgrad) v_max = load_state<V>(data[5], i);
        const V old_p = p, old_m = m, old_v = v, old_max = v_max;
        adam_update(c, load_any<V>(data[2], grad_dtype, i), p, m, v, v_max);
        int64_t kept = 0;
        if constexpr (S::kSixteen) {
          const auto leaves = S::leaves_range(p);
          if (__builtin_expect(any(leaves), 0)) {
            kept = count(leaves);
            keep(leaves, p, old_p);
            keep(leaves, m, old_m);
            keep(leaves, v, old_v);
            keep(leaves, v_max, old_max);
          }
        }
        S::store(data[0], data[1], i, p);
        store_state(data[3], i, m);
        store_state(data[4], i, v);
        if constexpr (kAmsgrad) store_state(data[5], i, v_max);
        return kept;
      });
}

template <class S, bool kMomentum>
int64_t sgd_pass(const StepTensor& t, const SgdStep& step, int64_t begin, int64_t end) {
  using V = typename S::Value;
  constexpr int64_t kState = sizeof(typename S::T);
  const Arrays<4> arrays = {
      {static_cast<char*>(t.param), static_cast<char*>(t.master),
       static_cast<char*>(const_cast<void*>(t.grad)), static_cast<char*>(t.state1)},
      {S::kParamSize, S::kMasterSize, dtype_size(t.grad_dtype), kMomentum ? kState : 0},
      {true, true, false, true}};
  const SgdStep c = step;
  const Dtype grad_dtype = t.grad_dtype;
  return walk(
      arrays, begin, end, [&](char* const* data, int64_t i) __attribute__((always_inline)) {
        V p = S::load(data[0], data[1], i), buffer = broadcast<V>(0);
        if constexpr (kMomentum) buffer = load_state<V>(data[3], i);
        const V old_p = p, old_buffer = buffer;
        sgd_update(c, load_any<V>(data[2], grad_dtype, i), p, buffer);
        int64_t kept = 0;
        if constexpr (S::kSixteen) {
          const auto leaves = S::leaves_range(p);
          if (__builtin_expect(any(leaves), 0)) {
            kept = count(leaves);
            keep(leaves, p, old_p);
            keep(leaves, buffer, old_buffer);
          }
        }
        S::store(data[0], data[1], i, p);
        if constexpr (kMomentum) store_state(data[3], i, buffer);
        return kept;
      });
}

}  // namespace

int64_t adam(const StepTensor& tensor, const AdamStep& step, int64_t begin, int64_t end) {
  int64_t kept = 0;
  with_slot(tensor, [&](auto slot) {
    using S = decltype(slot);
    kept = step.amsgrad ? adam_pass<S, true>(tensor, step, begin, end)
                        : adam_pass<S, false>(tensor, step, begin, end);
  });
  return kept;
}

int64_t sgd(const StepTensor& tensor, const SgdStep& step, int64_t begin, int64_t end) {
  int64_t kept = 0;
  with_slot(tensor, [&](auto slot) {
    using S = decltype(slot);
    kept = step.momentum != 0 ? sgd_pass<S, true>(tensor, step, begin, end)
                              : sgd_pass<S, false>(tensor, step, begin, end);
  });
  return kept;
}

int64_t write_masters(const StepTensor& tensor, const void* values, int64_t begin, int64_t end) {
  int64_t kept = 0;
  with_slot(tensor, [&](auto slot) {
    using S = decltype(slot);
    using V = typename S::Value;
    const Arrays<3> arrays = {{static_cast<char*>(tensor.param), static_cast<char*>(tensor.master),
                               static_cast<char*>(const_cast<void*>(values))},
                              {S::kParamSize, S::kMasterSize, sizeof(typename S::T)},
                              {true, true, false}};
    kept = walk(arrays, begin, end, [](char* const* data, int64_t i) {
      V x = load_state<V>(data[2], i);
      int64_t leaving = 0;
      if constexpr (S::kSixteen) {
        const auto leaves = S::leaves_range(x);
        leaving = count(leaves);
        if (leaving > 0) keep(leaves, x, S::load(data[0], data[1], i));
      }
      S::store(data[0], data[1], i, x);
      return leaving;
    });
  });
  return kept;
}

void read_masters(const StepTensor& tensor, void* values, int64_t begin, int64_t end) {
  with_slot(tensor, [&](auto slot) {
    using S = decltype(slot);
    using V = typename S::Value;
    const Arrays<3> arrays = {{static_cast<char*>(tensor.param), static_cast<char*>(tensor.master),
                               static_cast<char*>(values)},
                              {S::kParamSize, S::kMasterSize, sizeof(typename S::T)},
                              {false, false, true}};
    walk(arrays, begin, end, [](char* const* data, int64_t i) {
      store_state<V>(data[2], i, S::load(data[0], data[1], i));
      return int64_t{0};
    });
  });
}

namespace {

/// Masters whose rounding is not the weight. Values are compared, so -0 equals +0; NaN equals NaN.
template <class S>
int64_t refresh_pass(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end) {
  using V = typename S::Value;
  const Arrays<2> arrays = {{static_cast<char*>(tensor.param), static_cast<char*>(tensor.master)},
                            {S::kParamSize, S::kMasterSize},
                            {false, true}};
  return walk(arrays, begin, end, [&](char* const* data, int64_t i) {
    const V weight = load_any<V>(data[0], S::kParamDtype, i);
    const V master = S::load(data[0], data[1], i);
    alignas(64) char rounded_param[kLanes * 8], scratch[kLanes * 8] = {};
    S::store(rounded_param, scratch, 0, master);
    const V rounded = load_any<V>(rounded_param, S::kParamDtype, 0);
    const auto differs = (rounded != weight) & ((rounded == rounded) | (weight == weight));
    const int64_t changed = count(differs);
    if (changed > 0 && !dry_run) {
      V fresh = master;
      keep(differs, fresh, weight);
      S::store(rounded_param, data[1] + i * S::kMasterSize, 0, fresh);
    }
    return changed;
  });
}

}  // namespace

int64_t refresh_masters(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end) {
  int64_t changed = 0;
  with_slot(tensor, [&](auto slot) {
    using S = decltype(slot);
    if constexpr (S::kMasterKind != MasterKind::kNone)
      changed = refresh_pass<S>(tensor, dry_run, begin, end);
  });
  return changed;
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
