#include "../../cuda/rope.cu"

#include "../cpp/catch.h"
#include "csrc/cpu/isa/rope.h"
#include "tensors.h"

using namespace halfstep;
using emulation::Array;
using math::Dtype;
using math::RopeRows;

namespace {

/// x: [2, heads, seq, width] with gaps of `gap` elements between its rows; tables: [seq, half].
struct Case {
  Dtype dtype, table;
  int64_t heads, seq, half, width;
  bool interleaved = false, inverse = false, in_place = false;
  int64_t gap = 0;
};

struct Data {
  Array x, cos, sin;
  RopeRows all;

  explicit Data(const Case& c)
      : x(c.dtype, 2 * c.heads * c.seq * (c.width + c.gap), c.gap),
        cos(c.table, c.seq * c.half),
        sin(c.table, c.seq * c.half) {
    emulation::fill_normal(x, 3, uint64_t(c.width));
    emulation::fill_normal(cos, 1, 5);
    emulation::fill_normal(sin, 1, 6);
    all.dtype = c.dtype;
    all.table_dtype = c.table;
    all.interleaved = c.interleaved;
    all.inverse = c.inverse;
    all.rows = 2 * c.heads * c.seq;
    all.half = c.half;
    all.width = c.width;
    all.cos = cos.data();
    all.sin = sin.data();
    all.layout.dims = 2;
    all.layout.size[0] = math::Divisor(2 * c.heads);
    all.layout.size[1] = math::Divisor(c.seq);
    const int64_t pitch = c.width + c.gap, out = c.in_place ? pitch : c.width;
    const int64_t strides[4][2] = {
        {c.seq * pitch, pitch}, {c.seq * out, out}, {0, c.half}, {0, c.half}};
    for (int t = 0; t < 4; ++t)
      for (int d = 0; d < 2; ++d) all.layout.stride[t][d] = strides[t][d];
  }
};

void gives_the_cpus_bits(const Case& c, emulation::Orders orders = emulation::Orders::kThree) {
  const Data data(c);
  const int64_t count = c.in_place ? data.x.count() : data.all.rows * c.width;
  Array out(c.dtype, count), x(c.dtype, data.x.count(), c.gap);
  const auto prepare = [&](RopeRows& all, Array& result) {
    x.assign(data.x);
    if (c.in_place) result.assign(data.x);
    all.x = c.in_place ? result.data() : x.data();
    all.out = result.data();
  };
  const auto problems = emulation::in_all_orders(
      [&] {
        RopeRows all = data.all;
        prepare(all, out);
        cuda::rope(all, nullptr);
        return out.bytes();
      },
      orders);
  CHECK(problems.empty());
  Array expected(c.dtype, count);
  RopeRows all = data.all;
  prepare(all, expected);
  cpu::kKernelsDefault.rope->rotate(all, 0, all.rows);
  CHECK((out.bytes() == expected.bytes()));
}

}  // namespace

TEST_CASE("rope gives the CPU's bits in every order, in place or not", "[rope]") {
  for (const bool interleaved : {false, true})
    for (const bool in_place : {false, true}) {
      for (const auto dtype : {Dtype::kF16, Dtype::kBF16, Dtype::kF32, Dtype::kF64})
        for (const auto table : {Dtype::kF32, dtype})
          gives_the_cpus_bits({dtype, table, 2, 5, 16, 32, interleaved, true, in_place});
      for (const int64_t half : {1, 3, 8, 9, 20, 31, 33})
        for (const int64_t rest : {0, 1, 19})
          gives_the_cpus_bits({Dtype::kF16, Dtype::kF32, 1, 7, half, 2 * half + rest, interleaved,
                               false, in_place, rest % 2});
      gives_the_cpus_bits({Dtype::kF16, Dtype::kF32, 4, 33, 32, 64, interleaved, false, in_place},
                          emulation::Orders::kAll);
    }
}

TEST_CASE("bytes moved by rope", "[rope]") {
  for (const bool interleaved : {false, true}) {
    const Case c = {Dtype::kF16, Dtype::kF32, 2, 8, 32, 64, interleaved};
    Data data(c);
    Array out(c.dtype, data.x.count());
    data.all.x = data.x.data();
    data.all.out = out.data();
    emulation::reset();
    cuda::rope(data.all, nullptr);
    // Each row asks for its tables, 4 bytes an element; memory gives each of them once.
    CHECK(emulation::state().bytes_read == data.x.count() * (2 + 4));
    CHECK(emulation::state().bytes_written == data.x.count() * 2);
  }
  emulation::reset();
}
