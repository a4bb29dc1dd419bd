// steps:  unscale x clip x update x 16-bit write (x EMA x zeroed gradient) in one pass over a
//   parameter; rules in csrc/math/optim.h, states and masters in csrc/math/states.h. The common
//   combinations are compiled apart, the others share one loop that chooses at run time.
//   Bytes an FP16 parameter with split16 and FP32 states: gradient 2, weight 2+2, remainder 2+2,
//   m 4+4, v 4+4 = 26 (and 2 of grad_stats).
//   An element whose 16-bit weight would leave its range keeps weight, master and states, and
//   counts. Safe when the parameter is also its own master or gradient: each group is read before
//   it is written.
// write_masters, read_masters, refresh_masters:  conversions between exact values and what is held.
// Tests: tests/cpp/optim_test.cpp, tests/python/test_optim.py.

#include <algorithm>
#include <type_traits>

#include "states.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

namespace {

/// Puts back the old value in the lanes of `mask`.
template <class V, class M>
HALFSTEP_FN void keep(const M& mask, V& value, const V& old) {
  value = select(mask, old, value);
}

/// The arrays of a step in the order of walk(): parameter, master, gradient, EMA, states.
enum { kParam, kMaster, kGrad, kEma, kState };

template <class R, int kStates, StateKind kHeld, class S>
Arrays<kState + kStates> arrays_of(const StepTensor& t, const typename R::Constants& c,
                                   const S& slot, bool writes) {
  constexpr int64_t kWide = sizeof(typename S::T);
  Arrays<kState + kStates> a = {};
  a.set(kParam, t.param, slot.param_size(), writes);
  a.set(kMaster, t.master, slot.master_size(), writes);
  a.set(kGrad, t.grad, dtype_size(t.grad_dtype), writes && c.zero_grads);
  a.set(kEma, t.ema, writes && t.ema ? kWide : 0, writes);
  for (int s = 0; s < kStates; ++s) a.set(kState + s, t.state[s], state_size(kHeld, kWide), writes);
  return a;
}

HALFSTEP_FN void zero_lanes(char* grad, Dtype dtype, int64_t i) {
  const int64_t size = dtype_size(dtype);
  const F32 zero = broadcast<F32>(0);
  for (int64_t byte = 0; byte < size * kLanes; byte += 32)
    __builtin_memcpy(grad + i * size + byte, &zero, 32);
}

template <class C, class V>
HALFSTEP_FN void move_ema(const StepTensor& t, const C& c, char* const* data, int64_t i,
                          const V& p) {
  if (t.ema) {
    const V ema = load_wide<V>(data[kEma], i);
    store_wide(data[kEma], i, fma(constant<V>(c.ema_blend), p - ema, ema));
  }
}

/// The new weight p of sixteen elements is written, and what goes with it. `take_back(lanes, p)`
/// puts the old weight and states into the lanes that would leave the range of 16 bits.
template <class C, class S, class TakeBack>
HALFSTEP_FN int64_t store_step(const StepTensor& t, const C& c, const S& slot, char* const* data,
                               int64_t i, int64_t element, typename S::Value p,
                               const TakeBack& take_back) {
  using V = typename S::Value;
  int64_t kept = 0;
  const bool stays = slot.sixteen() && all_below(p, slot.limit());
  if (slot.sixteen() && __builtin_expect(!stays, 0)) {
    const auto leaves = abs(p) >= broadcast<V>(slot.limit());
    kept = count(leaves);
    take_back(leaves, p);
  }
  if (c.zero_grads) zero_lanes(data[kGrad], t.grad_dtype, i);
  if (__builtin_expect(stays, 1))
    slot.template store<true>(data[kParam], data[kMaster], i, p, element);
  else
    slot.store(data[kParam], data[kMaster], i, p, element);
  move_ema(t, c, data, i, p);
  return kept;
}

/// body(whether the step is as most are, for which a loop is compiled without branches): the
/// gradient has the parameter's dtype and stays, there is no EMA, and the rule has no rarer term.
template <class R, int kStates, class S, class Body>
int64_t if_common(const StepTensor& t, const typename R::Constants& c, const Body& body) {
  if constexpr (!S::kAny && kStates == R::kCommonStates && requires { R::is_common(c); })
    if (t.grad_dtype == S::kDtype && !t.ema && !c.zero_grads && R::is_common(c))
      return body(std::true_type());
  return body(std::false_type());
}
/// Tells the compiler what if_common() has found.
template <class R, class S>
HALFSTEP_FN void assume_common(StepTensor& t, typename R::Constants& c) {
  t.grad_dtype = S::kDtype;
  t.ema = nullptr;
  c.zero_grads = false;
  R::assume_common(c);
}

template <class R, int kStates, StateKind kHeld, class S>
int64_t step_pass(const StepTensor& tensor, const typename R::Constants& constants, const S& slot,
                  int64_t begin, int64_t end) {
  using V = typename S::Value;
  const StepTensor t = tensor;  // copies, which no store of the loop can touch
  const typename R::Constants c = constants;
  uint32_t base[2] = {};
  if constexpr (kHeld == StateKind::kBF16)
    for (int k = 0; k < 2; ++k) base[k] = random_base(c.random, state_stream(2 * k), begin);
  return walk(
      arrays_of<R, kStates, kHeld>(t, c, slot, true), begin,
      end, [&](char* const* data, int64_t i, int64_t element) __attribute__((always_inline)) {
        V s[R::kStates];
        for (V& unused : s) unused = constant<V>(0);
        for (int k = 0; k < kStates; ++k)
          s[k] = load_state<kHeld, true, V>(data[kState + k], i, nullptr, element);
        V p = slot.load(data[kParam], data[kMaster], i), old[kStates + 1];
        for (int k = 0; k < kStates; ++k) old[k] = s[k];
        old[kStates] = p;
        R::template update<V, kStates>(c, load_any<V>(data[kGrad], t.grad_dtype, i), p, s);
        const int64_t kept =
            store_step(t, c, slot, data, i, element, p, [&](const auto& leaves, V& weight) {
              keep(leaves, weight, old[kStates]);
              for (int k = 0; k < kStates; ++k) keep(leaves, s[k], old[k]);
            });
        if constexpr (kHeld == StateKind::kBF16)
          unrolled<(kStates + 1) / 2>([&](auto pair) __attribute__((always_inline)) {
            const U32 bits = random_bits<U32>(base[pair], element);
            unrolled<2>([&](auto half) __attribute__((always_inline)) {
              constexpr int k = 2 * pair + half;
              if constexpr (k < kStates) store_bfloat_at_random<k>(data[kState + k], i, s[k], bits);
            });
          });
        else
          for (int k = 0; k < kStates; ++k) store_wide(data[kState + k], i, s[k]);
        return kept;
      });
}

/// body(j) for j = 0, kStride, … in an int8 block; kUnrolled: of constants.
template <bool kUnrolled, int64_t kStride, class Body>
HALFSTEP_FN void each_group(const Body& body) {
  if constexpr (kUnrolled)
    unrolled<kStateBlock / kStride>([&](auto group) __attribute__((always_inline)) {
      body(std::integral_constant<int64_t, group * kStride>());
    });
  else
    for (int64_t j = 0; j < kStateBlock; j += kStride) body(j);
}

/// A block of int8 states on its way: what was read of it and what is to be stored.
template <int kStates>
struct StateBlock {
  char* data[kState + kStates];  ///< of its arrays
  int64_t element;               ///< its first, in the tensor
  int64_t count;                 ///< elements that exist
  int8_t* exponents[kStates];
  alignas(64) float weights[kStateBlock];
  alignas(64) float states[kStates][kStateBlock];  ///< coded_value()
  Block scale[kStates];
};

/// kClean: no code stands for a non-finite value.
template <class R, int kStates, bool kCommon, bool kClean, class S>
HALFSTEP_FN void update_block(const StepTensor& t, const typename R::Constants& c, const S& slot,
                              StateBlock<kStates>& b) {
  int exponents[kStates];
  for (int k = 0; k < kStates; ++k) exponents[k] = *b.exponents[k];
  each_group<kCommon, kLanes>([&](auto j) __attribute__((always_inline)) {
    F32 p = slot.load(b.data[kParam], b.data[kMaster], j), s[R::kStates];
    for (F32& unused : s) unused = constant<F32>(0);
    unrolled<kStates>([&](auto k) __attribute__((always_inline)) {
      s[k] = load_coded<R::is_signed(k), kClean>(b.data[kState + k], j, exponents[k]);
    });
    R::template update<F32, kStates>(c, load_any<F32>(b.data[kGrad], t.grad_dtype, j), p, s);
    store_lanes(b.weights + j, p);
    unrolled<kStates>([&](auto k) __attribute__((always_inline)) {
      store_lanes(b.states[k] + j, coded_value<R::is_signed(k)>(s[k]));
    });
  });
}

/// The scales of an updated block, and whether it is plain: all states are finite, and no weight is
/// NaN in 16 bits or leaves their range.
template <class R, int kStates, class S>
HALFSTEP_FN bool scale_block(const S& slot, StateBlock<kStates>& b) {
  bool plain = !slot.sixteen() || all_below(b.weights, kStateBlock, slot.limit());
  unrolled<kStates>([&](auto k) __attribute__((always_inline)) {
    b.scale[k] = scale_of<R::is_signed(k)>(b.states[k]);
    plain &= b.scale[k].finite;
  });
  return plain;
}

/// Codes and scales of a block's states; `base[k]`: random_base of state k.
template <class R, int kStates, bool kFinite>
HALFSTEP_FN void store_states(const uint32_t* base, const StateBlock<kStates>& b) {
  BlockBits bits;
  unrolled<kStates>([&](auto k) __attribute__((always_inline)) {
    if constexpr (k % 2 == 0) fill_bits(bits, base[k], b.element);
    *b.exponents[k] = int8_t(b.scale[k].exponent);
    encode_block<R::is_signed(k), k, kFinite>(b.states[k], bits, b.scale[k],
                                              reinterpret_cast<int8_t*>(b.data[kState + k]));
  });
}

/// Stores any updated block; returns how many of its weights were kept from leaving their range.
template <class R, int kStates, class S>
[[gnu::noinline]] int64_t store_any_block(const StepTensor& t, const typename R::Constants& c,
                                          const S& slot, const uint32_t* base,
                                          StateBlock<kStates>& b) {
  int64_t kept = 0;
  for (int64_t j = 0; j < kStateBlock; j += kLanes)
    kept += store_step(t, c, slot, b.data, j, b.element + j, load_lanes(b.weights + j),
                       [&](const auto& leaves, F32& weight) {
                         keep(leaves, weight, slot.load(b.data[kParam], b.data[kMaster], j));
                         unrolled<kStates>([&](auto k) {
                           constexpr bool kSigned = R::is_signed(k);
                           F32 coded = load_lanes(b.states[k] + j);
                           const F32 old =
                               load_coded<kSigned>(b.data[kState + k], j, *b.exponents[k]);
                           keep(leaves, coded, coded_value<kSigned>(old));
                           store_lanes(b.states[k] + j, coded);
                         });
                       });
  for (auto& values : b.states)
    for (int64_t j = b.count; j < kStateBlock; ++j) values[j] = 0;
  scale_block<R>(slot, b);  // anew: states were taken back
  store_states<R, kStates, false>(base, b);
  return kept;
}

template <class R, int kStates, class S>
[[gnu::noinline]] int64_t any_block(const StepTensor& t, const typename R::Constants& c,
                                    const S& slot, const uint32_t* base, StateBlock<kStates>& b) {
  update_block<R, kStates, false, false>(t, c, slot, b);
  return store_any_block<R>(t, c, slot, base, b);
}

/// int8 states: a block's scale is known only once all of it is updated. One loop after the other
/// updates a block, writes its weights and codes its states; what they hand on stays in the first
/// cache. kCommon: see if_common(). What is rare goes to functions of their own, which get the
/// originals: a copy that they had the address of would be read anew after each store.
template <class R, int kStates, bool kCommon, class S>
int64_t int8_pass(const StepTensor& tensor, const typename R::Constants& constants, const S& slot,
                  int64_t begin, int64_t end) {
  StepTensor t = tensor;  // copies, which no store of the loop can touch
  typename R::Constants c = constants;
  if constexpr (kCommon) assume_common<R, S>(t, c);
  const auto arrays = arrays_of<R, kStates, StateKind::kInt8>(t, c, slot, true);
  uint32_t base[kStates];
  for (int k = 0; k < kStates; ++k) base[k] = random_base(c.random, state_stream(k), begin);
  int64_t kept = 0;
  for (int64_t i = begin; i < end; i += kStateBlock) {
    StateBlock<kStates> b;
    b.element = i;
    b.count = std::min(end - i, kStateBlock);
    for (int k = 0; k < kStates; ++k) b.exponents[k] = t.exponent[k] + i / kStateBlock;
    if (__builtin_expect(b.count < kStateBlock, 0)) {
      kept += walk<kState + kStates, kStateBlock>(
          arrays, i, end, [&](char* const* copies, int64_t, int64_t) {
            for (int a = 0; a < kState + kStates; ++a) b.data[a] = copies[a];
            return any_block<R>(tensor, constants, slot, base, b);
          });
      break;
    }
    for (int a = 0; a < kState + kStates; ++a) b.data[a] = arrays.data[a] + i * arrays.size[a];
    // While a block is coded nothing asks for memory; so it is asked for eight blocks before. An
    // absent array has size 0.
    unrolled<kState + kStates>([&](auto a) __attribute__((always_inline)) {
      const int64_t size = arrays.size[a];
      for (int64_t byte = 0; byte < kStateBlock * size; byte += 64)
        __builtin_prefetch(b.data[a] + 8 * kStateBlock * size + byte);
    });
    bool clean = true;
    unrolled<kStates>([&](auto k) __attribute__((always_inline)) {
      clean &= !holds_nonfinite<R::is_signed(k)>(b.data[kState + k]);
    });
    if (__builtin_expect(!clean, 0)) {
      kept += any_block<R>(tensor, constants, slot, base, b);
      continue;
    }
    update_block<R, kStates, kCommon, true>(t, c, slot, b);
    if (__builtin_expect(!scale_block<R>(slot, b), 0)) {
      kept += store_any_block<R>(tensor, constants, slot, base, b);
      continue;
    }
    each_group<kCommon, 2 * kLanes>([&](auto j) __attribute__((always_inline)) {
      const F32 x = load_lanes(b.weights + j), y = load_lanes(b.weights + j + kLanes);
      for (int64_t k = j; c.zero_grads && k < j + 2 * kLanes; k += kLanes)
        zero_lanes(b.data[kGrad], t.grad_dtype, k);
      slot.store_two(b.data[kParam], b.data[kMaster], j, x, y, i + j);
      move_ema(t, c, b.data, j, x);
      move_ema(t, c, b.data, j + kLanes, y);
    });
    store_states<R, kStates, true>(base, b);
  }
  return kept;
}

/// body(States<n>) with the number of elementwise states that the step keeps.
template <int kStates>
struct States {
  static constexpr int kCount = kStates;
};
template <class R, class Body>
auto with_states(const StepTensor& t, const Body& body) {
  int count = 0;
  while (count < R::kStates && t.state[count]) ++count;
  if constexpr (R::kFewestStates < R::kStates)
    if (count < R::kStates) return body(States<R::kFewestStates>{});
  return body(States<R::kStates>{});
}

template <class R, StateKind kHeld, class S>
int64_t step_in(const StepTensor& t, const typename R::Constants& c, const S& slot, int64_t begin,
                int64_t end) {
  return with_states<R>(t, [&](auto states) {
    constexpr int kStates = decltype(states)::kCount;
    constexpr StateKind kKept = kStates == 0 ? StateKind::kWide : kHeld;
    if constexpr (kKept == StateKind::kInt8)
      return if_common<R, kStates, S>(t, c, [&](auto common) {
        return int8_pass<R, kStates, common.value>(t, c, slot, begin, end);
      });
    else
      return step_pass<R, kStates, kKept>(t, c, slot, begin, end);
  });
}

template <class R>
int64_t step(const StepTensor& t, const typename R::Constants& c, int64_t begin, int64_t end) {
  return with_state_kind<F32>(t, [&](auto held) {
    constexpr StateKind kHeld = held.value;
    int64_t kept = 0;
    const auto run = [&](const auto& slot) { kept = step_in<R, kHeld>(t, c, slot, begin, end); };
    if (with_common_slot<kHeld>(t, run)) return kept;
    if constexpr (kHeld == StateKind::kWide)
      with_any_slot(t, c.random, run);
    else
      run(AnySlot<F32>(t, c.random));
    return kept;
  });
}

/// Sums of the squares of what R::norms gives.
template <class R>
Norms norms(const StepTensor& t, const typename R::Constants& c, int64_t begin, int64_t end) {
  return with_any_slot(t, 0, [&](const auto& slot) {
    using S = std::decay_t<decltype(slot)>;
    using V = typename S::Value;
    F64 a2 = broadcast<F64>(0), b2 = a2;
    const auto wide = [](const V& x) {
      if constexpr (sizeof(V) == sizeof(F64))
        return x;
      else
        return to_double(x);
    };
    with_state_kind<V>(t, [&](auto held) {
      walk(arrays_of<R, R::kStates, held.value>(t, c, slot, false), begin, end,
           [&](char* const* data, int64_t i, int64_t element) {
             V s[R::kStates], a, b;
             for (int k = 0; k < R::kStates; ++k)
               s[k] = load_signed_state<held.value, V>(R::is_signed(k), data[kState + k], i,
                                                       t.exponent[k], element);
             R::norms(c, load_any<V>(data[kGrad], t.grad_dtype, i),
                      slot.load(data[kParam], data[kMaster], i), s, a, b);
             if (element + kLanes > end) {  // eps = 0 makes 0 / 0 of the padding
               a = first_lanes(a, end - element);
               b = first_lanes(b, end - element);
             }
             a2 = fma(wide(a), wide(a), a2);
             b2 = fma(wide(b), wide(b), b2);
             return int64_t{0};
           });
    });
    return Norms{sum_lanes(a2), sum_lanes(b2)};
  });
}

}  // namespace

int64_t adam(const StepTensor& t, const AdamConstants& c, int64_t begin, int64_t end) {
  return step<AdamRule>(t, c, begin, end);
}
int64_t sgd(const StepTensor& t, const SgdConstants& c, int64_t begin, int64_t end) {
  return step<SgdRule>(t, c, begin, end);
}
int64_t lion(const StepTensor& t, const LionConstants& c, int64_t begin, int64_t end) {
  return step<LionRule>(t, c, begin, end);
}
int64_t adagrad(const StepTensor& t, const AdagradConstants& c, int64_t begin, int64_t end) {
  return step<AdagradRule>(t, c, begin, end);
}
int64_t lamb(const StepTensor& t, const LambConstants& c, int64_t begin, int64_t end) {
  return step<LambRule>(t, c, begin, end);
}
int64_t novograd(const StepTensor& t, const NovoGradConstants& c, int64_t begin, int64_t end) {
  return step<NovoGradRule>(t, c, begin, end);
}
Norms lamb_norms(const StepTensor& t, const LambConstants& c, int64_t begin, int64_t end) {
  return norms<LambRule>(t, c, begin, end);
}
Norms novograd_norms(const StepTensor& t, const NovoGradConstants& c, int64_t begin, int64_t end) {
  return norms<NovoGradRule>(t, c, begin, end);
}

int64_t write_masters(const StepTensor& tensor, const void* values, int64_t begin, int64_t end) {
  return with_any_slot(tensor, 0, [&](auto slot) {
    using V = typename decltype(slot)::Value;
    Arrays<3> arrays = {};
    arrays.set(0, tensor.param, slot.param_size(), true);
    arrays.set(1, tensor.master, slot.master_size(), true);
    arrays.set(2, values, sizeof(typename decltype(slot)::T), false);
    return walk(arrays, begin, end, [&](char* const* data, int64_t i, int64_t) {
      V x = load_wide<V>(data[2], i);
      int64_t leaving = 0;
      if (slot.sixteen()) {
        const auto leaves = abs(x) >= broadcast<V>(slot.limit());
        leaving = count(leaves);
        if (leaving > 0) keep(leaves, x, slot.load(data[0], data[1], i));
      }
      slot.store_nearest(data[0], data[1], i, x);
      return leaving;
    });
  });
}

void read_masters(const StepTensor& tensor, void* values, int64_t begin, int64_t end) {
  with_any_slot(tensor, 0, [&](auto slot) {
    Arrays<3> arrays = {};
    arrays.set(0, tensor.param, slot.param_size(), false);
    arrays.set(1, tensor.master, slot.master_size(), false);
    arrays.set(2, values, sizeof(typename decltype(slot)::T), true);
    return walk(arrays, begin, end, [&](char* const* data, int64_t i, int64_t) {
      store_wide(data[2], i, slot.load(data[0], data[1], i));
      return int64_t{0};
    });
  });
}

/// Masters whose rounding is not the weight. Values are compared, so -0 equals +0; NaN equals NaN.
int64_t refresh_masters(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end) {
  return with_any_slot(tensor, 0, [&](auto slot) {
    using V = typename decltype(slot)::Value;
    if (slot.master_size() == 0) return int64_t{0};
    Arrays<2> arrays = {};
    arrays.set(0, tensor.param, slot.param_size(), false);
    arrays.set(1, tensor.master, slot.master_size(), true);
    return walk(arrays, begin, end, [&](char* const* data, int64_t i, int64_t) {
      const V weight = load_any<V>(data[0], slot.dtype, i);
      const V master = slot.load(data[0], data[1], i);
      alignas(64) char rounded_param[kLanes * 8], scratch[kLanes * 8] = {};
      slot.store_nearest(rounded_param, scratch, 0, master);
      const V rounded = load_any<V>(rounded_param, slot.dtype, 0);
      const auto differs = (rounded != weight) & ((rounded == rounded) | (weight == weight));
      const int64_t changed = count(differs);
      if (changed == 0 || dry_run) return changed;
      slot.store_nearest(rounded_param, scratch, 0, weight);
      for (int lane = 0; lane < kLanes; ++lane)  // the others keep their bits
        if (is_set(differs, lane))
          __builtin_memcpy(data[1] + (i + lane) * slot.master_size(),
                           scratch + lane * slot.master_size(), size_t(slot.master_size()));
      return changed;
    });
  });
}

/// Values of an int8 or BF16 state in FP32, and back. A state is positive or signed (`is_signed`).
void read_state(const StepTensor& t, bool is_signed, void* values, int64_t begin, int64_t end) {
  Arrays<2> arrays = {};
  arrays.set(0, t.state[0], state_size(t.state_kind, 4), false);
  arrays.set(1, values, 4, true);
  with_state_kind<F32>(t, [&](auto held) {
    walk(arrays, begin, end, [&](char* const* data, int64_t i, int64_t element) {
      store_wide(data[1], i,
                 load_signed_state<held.value, F32>(is_signed, data[0], i, t.exponent[0], element));
      return int64_t{0};
    });
  });
}

void write_state(const StepTensor& t, bool is_signed, const void* values, uint32_t key,
                 int64_t begin, int64_t end) {
  Arrays<2> arrays = {};
  arrays.set(0, t.state[0], state_size(t.state_kind, 4), true);
  arrays.set(1, values, 4, false);
  const uint32_t base = random_base(key, state_stream(0), begin);
  if (t.state_kind != StateKind::kInt8) {
    walk(arrays, begin, end, [&](char* const* data, int64_t i, int64_t element) {
      store_bfloat_at_random<0>(data[0], i, quiet(load_wide<F32>(data[1], i)),
                                random_bits<U32>(base, element));
      return int64_t{0};
    });
    return;
  }
  walk<2, kStateBlock>(arrays, begin, end, [&](char* const* data, int64_t i, int64_t element) {
    alignas(64) float coded[kStateBlock];
    BlockBits bits;
    for (int64_t j = 0; j < kStateBlock; j += kLanes) {
      const F32 x = load_wide<F32>(data[1], i + j);
      store_lanes(coded + j, is_signed ? coded_value<true>(x) : coded_value<false>(x));
    }
    fill_bits(bits, base, element);
    const Block block = is_signed ? scale_of<true>(coded) : scale_of<false>(coded);
    t.exponent[0][element / kStateBlock] = int8_t(block.exponent);
    const auto encode = is_signed ? encode_block<true, 0, false> : encode_block<false, 0, false>;
    encode(coded, bits, block, reinterpret_cast<int8_t*>(data[0]) + i);
    return int64_t{0};
  });
}

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
