#include "cuda/plans.h"

#include <set>
#include <string>

#include "catch.h"

using namespace halfstep::cuda;

namespace {

/// Keeps count of what exists, and of what was done with what did not.
class FakeLt : public Lt {
 public:
  int created = 0, algorithm_count = 3, asked = 0;
  bool refuses = false, fails_to_create = false;
  std::set<Handle> products, layouts;
  std::vector<std::string> errors;
  std::vector<uint64_t> multiplied;  ///< the algorithms that ran
  Pointers last;

  Handle create_product(const Problem&) override { return create(products); }
  Handle create_layout(Dtype, int64_t rows, int64_t columns, int64_t stride) override {
    if (stride < rows) errors.push_back("a stride below " + std::to_string(rows));
    if (columns < 1) errors.push_back("no columns");
    return fails_to_create ? nullptr : create(layouts);
  }
  void destroy_product(Handle h) override { destroy(products, h); }
  void destroy_layout(Handle h) override { destroy(layouts, h); }
  std::vector<Algorithm> algorithms(const Operands& o, const Problem&, int64_t most,
                                    int count) override {
    check(o);
    ++asked;
    std::vector<Algorithm> all;
    for (int i = 0; i < std::min(count, algorithm_count); ++i)
      all.push_back({{uint64_t(i)}, std::min<int64_t>(most, 100 * (i + 1))});
    return all;
  }
  bool multiply(const Operands& o, const Problem&, const Pointers& pointers,
                const Algorithm& algorithm, void* workspace, Stream) override {
    check(o);
    if (algorithm.workspace > 0 && !workspace) errors.push_back("no workspace");
    last = pointers;
    multiplied.push_back(algorithm.opaque[0]);
    return !refuses;
  }

 private:
  Handle create(std::set<Handle>& all) {
    const auto handle = reinterpret_cast<Handle>(uintptr_t(++created));
    all.insert(handle);
    return handle;
  }
  void destroy(std::set<Handle>& all, Handle handle) {
    if (all.erase(handle) != 1) errors.push_back("destroyed twice, or never made");
  }
  void check(const Operands& o) {
    if (!products.count(o.product) || !layouts.count(o.a) || !layouts.count(o.b) ||
        !layouts.count(o.d))
      errors.push_back("a descriptor that does not exist");
  }
};

Problem problem() {
  Problem p;
  p.rows = 64;
  p.columns = 32;
  p.inner = 16;
  p.a_stride = p.b_stride = 16;
  p.d_stride = 64;
  p.aux_stride = 128;
  p.transposes_a = 1;
  p.epilogue = Epilogue::kGeluAuxBias;
  p.alignment = 16;
  return p;
}

/// Times in the order in which they are asked for; the work is done once.
struct Clock {
  std::vector<double> times;
  size_t next = 0;
  Stopwatch stopwatch() {
    return [this](const std::function<void()>& work) {
      work();
      return times.at(next++);
    };
  }
};

struct Fixture {
  FakeLt lt;
  Clock clock;
  int unfused = 0;
  std::vector<int64_t> allocated;
  char memory[512];

  Plans::Call call(bool may_measure = true) {
    Plans::Call c;
    c.may_measure = may_measure;
    c.allocate = [this](int64_t bytes) {
      allocated.push_back(bytes);
      return static_cast<void*>(memory);
    };
    c.unfused = [this] { ++unfused; };
    c.stopwatch = clock.stopwatch();
    return c;
  }
};

}  // namespace

TEST_CASE("the quickest of the algorithms is measured once and kept", "[plans]") {
  Fixture f;
  f.clock.times = {5.0, 4.0, 2.0, 3.0};
  {
    Plans plans(f.lt, 1000);
    Pointers pointers;
    pointers.d = f.memory;
    CHECK(plans.run(problem(), pointers, f.call()));
    CHECK((f.lt.multiplied == std::vector<uint64_t>{0, 1, 2, 1}));
    CHECK(f.unfused == 1);
    pointers.bias = f.memory + 1;
    CHECK(plans.run(problem(), pointers, f.call()));
    CHECK(plans.run(problem(), pointers, f.call(false)));  // as in a capture
    CHECK(f.lt.last.bias == f.memory + 1);
    CHECK((f.lt.multiplied == std::vector<uint64_t>{0, 1, 2, 1, 1, 1}));
    CHECK((f.allocated == std::vector<int64_t>{300, 200, 200}));
    CHECK(f.lt.asked == 1);
    CHECK(plans.size() == 1);
  }
  CHECK(f.lt.products.empty());
  CHECK(f.lt.layouts.empty());
  CHECK(f.lt.errors.empty());
  CHECK(f.lt.created == 4);
}

TEST_CASE("fused is never chosen where it is not quicker", "[plans]") {
  for (const double fused : {2.0, 3.0, double(NAN)}) {
    Fixture f;
    f.clock.times = {2.0, fused, fused, fused};
    Plans plans(f.lt, 1000);
    CHECK_FALSE(plans.run(problem(), {}, f.call()));
    CHECK_FALSE(plans.run(problem(), {}, f.call()));
    CHECK(f.lt.multiplied.size() == 3);
    CHECK(f.unfused == 1);
  }
}

TEST_CASE("inside a capture nothing is made or measured", "[plans]") {
  Fixture f;
  Plans plans(f.lt, 1000);
  CHECK_FALSE(plans.run(problem(), {}, f.call(false)));
  CHECK(f.lt.created == 0);
  CHECK(plans.size() == 0);
  f.clock.times = {2.0, 1.0, 1.0, 1.0};
  CHECK(plans.run(problem(), {}, f.call()));
  CHECK(f.lt.multiplied.back() == 0);
}

TEST_CASE("what cuBLASLt refuses is computed unfused", "[plans]") {
  Fixture none, refusing, broken;
  none.lt.algorithm_count = 0;
  CHECK_FALSE(Plans(none.lt, 1000).run(problem(), {}, none.call()));
  CHECK(none.unfused == 0);
  refusing.lt.refuses = true;
  refusing.clock.times = {2.0, 1.0, 1.0, 1.0};
  CHECK_FALSE(Plans(refusing.lt, 1000).run(problem(), {}, refusing.call()));
  broken.lt.fails_to_create = true;
  CHECK_FALSE(Plans(broken.lt, 1000).run(problem(), {}, broken.call()));
  for (const Fixture* f : {&none, &refusing, &broken}) {
    CHECK(f->lt.errors.empty());
    CHECK(f->lt.products.empty());
    CHECK(f->lt.layouts.empty());
  }
}

TEST_CASE("every part of a problem tells plans apart", "[plans]") {
  Fixture f;
  f.clock.times.assign(200, 1.0);
  Plans plans(f.lt, 1000);
  std::vector<Problem> problems(14, problem());
  problems[1].rows = 63;
  problems[2].columns = 31;
  problems[3].inner = 8;
  problems[4].a_stride = 32;
  problems[5].b_stride = 32;
  problems[6].d_stride = 128;
  problems[7].aux_stride = 256;
  problems[8].dtype = Dtype::kBF16;
  problems[9].epilogue = Epilogue::kReluAuxBias;
  problems[10].alignment = 2;
  problems[11].device = 1;
  problems[12].transposes_a = 0;
  problems[12].a_stride = 64;
  problems[13].transposes_b = 1;
  problems[13].b_stride = 64;
  for (int round = 0; round < 2; ++round)
    for (const Problem& p : problems) plans.run(p, {}, f.call());
  CHECK(plans.size() == problems.size());
  CHECK(f.lt.asked == int(problems.size()));
  CHECK(f.lt.errors.empty());
}

TEST_CASE("alignment is what all pointers share", "[plans]") {
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  CHECK(common_alignment({at(4096), at(512)}) == 256);
  CHECK(common_alignment({at(4096), at(528)}) == 16);
  CHECK(common_alignment({at(4098), at(528)}) == 2);
}
