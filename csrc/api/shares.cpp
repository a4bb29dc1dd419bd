#include <halfstep/shares.h>

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/max.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <mutex>

namespace halfstep {

namespace {

constexpr double kZero = 0x1p-25;              // up to here FP16 is 0
constexpr double kNormal = 0x1p-14 - 0x1p-25;  // from here the nearest FP16 number is normal
constexpr double kInfinite = 65520.0;          // from here it is inf
constexpr double kSaturated = 32752.0;         // half of the largest

/// Magnitudes of FP32 numbers are in the order of their bits.
constexpr int32_t bits(double value) { return std::bit_cast<int32_t>(float(value)); }
constexpr int32_t kInf = bits(std::numeric_limits<double>::infinity());

struct Counts {
  int32_t zeros = 0, small = 0, below = 0, over = 0, saturated = 0, nonfinite = 0, lost = 0;
  int32_t largest = 0;  // of the finite ones
};

/// One piece: int32 counts, which the compiler keeps in vectors. inf and NaN count as over.
Counts count(const float* x, const bool* there, int64_t n) {
  Counts c;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t m = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
    c.zeros += m == 0;
    c.small += m <= bits(kZero);
    c.below += m < bits(kNormal);
    c.over += m >= bits(kInfinite);
    c.saturated += m > bits(kSaturated);
    c.nonfinite += m >= kInf;
    const int32_t finite = m < kInf ? m : 0;
    c.largest = finite > c.largest ? finite : c.largest;
  }
  if (there)
    for (int64_t i = 0; i < n; ++i) {
      const int32_t m = std::bit_cast<int32_t>(x[i]) & 0x7fffffff;
      c.lost += int32_t(m != 0) & int32_t(m < kInf) & int32_t(!there[i]);
    }
  return c;
}

Shares of(const Counts& c, int64_t n) {
  Shares s;
  s.count = n;
  s.nonzero = n - c.zeros - c.nonfinite;
  s.underflow = c.small - c.zeros;
  s.subnormal = c.below - c.small;
  s.overflow = c.over;
  s.saturated = c.saturated;
  s.lost = c.lost;
  s.amax = std::bit_cast<float>(c.largest);
  return s;
}

Shares on_cpu(const at::Tensor& x, const at::Tensor& there) {
  constexpr int64_t kPiece = 1 << 14;
  const float* data = x.const_data_ptr<float>();
  const bool* kept = there.defined() ? there.const_data_ptr<bool>() : nullptr;
  const int64_t n = x.numel();
  Shares all;
  std::mutex mutex;
  at::parallel_for(0, (n + kPiece - 1) / kPiece, 8, [&](int64_t begin, int64_t end) {
    Shares mine;
    for (int64_t at = begin * kPiece; at < std::min(end * kPiece, n); at += kPiece) {
      const int64_t size = std::min(kPiece, n - at);
      mine += of(count(data + at, kept ? kept + at : nullptr, size), size);
    }
    const std::lock_guard lock(mutex);
    all += mine;
  });
  return all;
}

int64_t total(const at::Tensor& mask) { return mask.sum().item<int64_t>(); }

/// Any device, any scale: in FP64.
Shares in_double(const at::Tensor& reference, double scale, const at::Tensor& there) {
  const at::Tensor x = reference.to(at::kDouble).mul(scale).abs();
  const at::Tensor finite = x.lt(std::numeric_limits<double>::infinity()), some = x.gt(0);
  const at::Tensor nonzero = some.logical_and(finite);
  Shares s;
  s.count = x.numel();
  s.nonzero = total(nonzero);
  s.underflow = total(some.logical_and(x.le(kZero)));
  s.subnormal = total(x.gt(kZero).logical_and(x.lt(kNormal)));
  s.overflow = total(x.lt(kInfinite).logical_not());
  s.saturated = total(x.le(kSaturated).logical_not());
  if (there.defined()) s.lost = total(nonzero.logical_and(there.logical_not()));
  if (x.numel() > 0) s.amax = at::where(finite, x, 0.0).max().item<double>();
  return s;
}

}  // namespace

Shares& Shares::operator+=(const Shares& other) {
  count += other.count;
  nonzero += other.nonzero;
  underflow += other.underflow;
  subnormal += other.subnormal;
  overflow += other.overflow;
  saturated += other.saturated;
  lost += other.lost;
  amax = std::max(amax, other.amax);
  return *this;
}

std::optional<double> Shares::headroom() const {
  if (!(amax > 0) || !std::isfinite(amax)) return std::nullopt;
  return std::log2(65504.0 / amax);
}

Shares shares(const at::Tensor& reference, double scale, const at::Tensor& stored) {
  TORCH_CHECK(
      reference.defined() && reference.is_floating_point() && reference.layout() == at::kStrided,
      "shares: reference is ",
      reference.defined() ? reference.toString() : std::string("undefined"),
      "; expected a dense floating tensor");
  TORCH_CHECK(!stored.defined() || stored.sizes() == reference.sizes(), "shares: stored is ",
              stored.sizes(), " but reference is ", reference.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor x = reference.detach();
  at::Tensor there = stored.defined() ? stored.detach() : stored;
  if (there.defined() && there.scalar_type() != at::kBool) there = there.ne(0);
  const bool plain = x.is_cpu() && x.scalar_type() == at::kFloat && scale == 1.0;
  return plain ? on_cpu(x.contiguous(), there.defined() ? there.contiguous() : there)
               : in_double(x, scale, there);
}

}  // namespace halfstep
