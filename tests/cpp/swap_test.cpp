// halfstep::swap_layers_: the layers that a Sequential holds become ours in place; what is left
// says why; nothing else changes.

#include <sstream>

#include "api.h"

namespace {

using namespace torch::nn;
namespace hn = halfstep::nn;

/// One of every kind, in Sequentials of a module, with options that are not the defaults.
struct NetImpl : torch::nn::Module {
  NetImpl() {
    features->push_back("conv", Conv2d(Conv2dOptions(2, 4, 3).padding(torch::kSame).groups(2)));
    features->push_back("act", GELU(GELUOptions().approximate("tanh")));
    features->push_back(
        "circular", Conv2d(Conv2dOptions(4, 4, 3).padding(1).dilation(1).bias(false).padding_mode(
                        torch::kCircular)));
    features->push_back(
        "up", ConvTranspose2d(ConvTranspose2dOptions(4, 2, 3).stride(2).output_padding(1)));
    register_module("features", features);
    head->push_back(Linear(LinearOptions(36, 8).bias(false)));
    head->push_back(LayerNorm(LayerNormOptions({8}).eps(0.5)));
    head->push_back(SiLU());
    head->push_back(LayerNorm(LayerNormOptions({8}).elementwise_affine(false)));
    head->push_back(Linear(8, 6));
    head->push_back(Softmax(0));
    register_module("head", head);
  }
  at::Tensor forward(const at::Tensor& x) {
    return head->forward(features->forward(x).flatten(1).narrow(1, 0, 36));
  }
  Sequential features, head;
};
TORCH_MODULE(Net);

using Named = torch::OrderedDict<std::string, at::Tensor>;

/// The same names in the same order, and the same tensors, not copies.
void check_same_tensors(const Named& a, const Named& b) {
  REQUIRE(a.keys() == b.keys());
  for (const auto& item : a) CHECK(item.value().is_same(b[item.key()]));
}

std::vector<at::Tensor> results(Net& net, const at::Tensor& x, const at::Tensor& factors) {
  net->zero_grad();
  const auto input = x.detach().clone().requires_grad_();
  const auto y = net->forward(input);
  (y * factors).sum().backward();
  std::vector<at::Tensor> all{y.detach(), input.grad()};
  for (const auto& p : net->parameters()) all.push_back(p.grad().clone());
  return all;
}

template <class Ours>
bool is(const torch::nn::Module& model, const std::string& path) {
  return std::dynamic_pointer_cast<Ours>(model.named_modules()[path]) != nullptr;
}

std::vector<std::string> keys(const torch::OrderedDict<std::string, std::string>& entries) {
  return entries.keys();
}

}  // namespace

TEST_CASE("every layer of a Sequential is swapped and computes the same", "[swap]") {
  torch::manual_seed(0);
  Net net;
  const auto x = torch::randn({3, 2, 6, 6}), factors = torch::randn({3, 6});
  const auto parameters = net->named_parameters(), buffers = net->named_buffers();
  const auto expected = results(net, x, factors);
  const auto random = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const auto report = halfstep::swap_layers_(*net);
  CHECK(torch::equal(random, at::globalContext().defaultGenerator(at::kCPU).get_state()));
  CHECK(report.left.is_empty());
  CHECK(keys(report.swapped) == std::vector<std::string>{"features.conv", "features.act",
                                                         "features.circular", "features.up",
                                                         "head.0", "head.1", "head.2", "head.3",
                                                         "head.4", "head.5"});
  CHECK(report.swapped["features.circular"] == "Conv2d");
  CHECK(report.text() ==
        "swapped 10 layers: 2 Conv2d, 1 ConvTranspose2d, 1 GELU, 2 LayerNorm, 2 Linear, 1 SiLU, "
        "1 Softmax");
  CHECK(is<hn::Conv2dImpl>(*net, "features.conv"));
  CHECK(is<hn::GELUImpl>(*net, "features.act"));
  CHECK(is<hn::ConvTranspose2dImpl>(*net, "features.up"));
  CHECK(is<hn::LinearImpl>(*net, "head.0"));
  CHECK(is<hn::LayerNormImpl>(*net, "head.1"));
  CHECK(is<hn::SiLUImpl>(*net, "head.2"));
  CHECK(is<hn::SoftmaxImpl>(*net, "head.5"));
  check_same_tensors(parameters, net->named_parameters());
  check_same_tensors(buffers, net->named_buffers());
  // What forward() calls is what is registered.
  const auto children = net->head->children();
  REQUIRE(children.size() == net->head->size());
  for (size_t i = 0; i < children.size(); ++i) CHECK(children[i] == net->head->ptr(i));
  const auto got = results(net, x, factors);
  REQUIRE(got.size() == expected.size());
  for (size_t i = 0; i < got.size(); ++i) CHECK(torch::allclose(got[i], expected[i], 2e-5, 2e-6));

  const auto again = halfstep::swap_layers_(*net);
  CHECK((again.swapped.is_empty() && again.left.is_empty()));
  CHECK(again.text() == "swapped 0 layers");
  CHECK(children[0] == net->head->ptr(0));
}

TEST_CASE("convolutions of every dimension are swapped", "[swap]") {
  torch::manual_seed(0);
  const auto check = [](Sequential net, const at::Tensor& x, const char* kind) {
    const auto expected = net->forward(x);
    CHECK(halfstep::swap_layers_(*net).swapped["0"] == kind);
    CHECK(torch::allclose(net->forward(x), expected, 2e-5, 2e-6));
  };
  const auto line = torch::randn({2, 3, 7}), cube = torch::randn({2, 3, 4, 5, 4});
  check(Sequential(Conv1d(Conv1dOptions(3, 4, 2).stride(2).padding(1))), line, "Conv1d");
  check(Sequential(Conv3d(Conv3dOptions(3, 2, 2).dilation(2))), cube, "Conv3d");
  check(Sequential(ConvTranspose1d(ConvTranspose1dOptions(3, 2, 2).padding(1))), line,
        "ConvTranspose1d");
  check(Sequential(ConvTranspose3d(ConvTranspose3dOptions(3, 2, 2).bias(false))), cube,
        "ConvTranspose3d");
}

TEST_CASE("options, mode, dtype and frozen weights are carried", "[swap]") {
  Sequential net(Linear(LinearOptions(4, 4).bias(false)),
                 LayerNorm(LayerNormOptions({4}).eps(0.25).elementwise_affine(false)),
                 GELU(GELUOptions().approximate("tanh")), Softmax(1), SiLU());
  net->to(torch::kDouble);
  net->ptr(0)->parameters()[0].set_requires_grad(false);
  net->eval();
  net->ptr(4)->train();
  REQUIRE(halfstep::swap_layers_(*net).swapped.size() == 5);
  const auto linear = net->ptr<hn::LinearImpl>(0);
  CHECK((!linear->options.bias() && !linear->bias.defined() && !linear->activation));
  CHECK((linear->weight.scalar_type() == torch::kDouble && !linear->weight.requires_grad()));
  const auto norm = net->ptr<hn::LayerNormImpl>(1);
  CHECK((norm->options.eps() == 0.25 && !norm->options.elementwise_affine()));
  CHECK(net->ptr<hn::GELUImpl>(2)->options.approximate() == "tanh");
  const auto softmax = net->ptr<hn::SoftmaxImpl>(3);
  CHECK((softmax->options.dim() == 1 && softmax->scale == 1 && !softmax->causal));
  for (size_t i = 0; i < 4; ++i) CHECK_FALSE(net->ptr(i)->is_training());
  CHECK(net->ptr(4)->is_training());
}

TEST_CASE("a cross entropy keeps its options, for indices and for probabilities", "[swap]") {
  torch::manual_seed(0);
  const auto x = torch::randn({6, 5}), probabilities = torch::rand({6, 5}).softmax(-1);
  const auto weight = torch::rand({5}) + 0.5, target = torch::tensor({0, 4, 2, 3, 2, 1});
  using Options = CrossEntropyLossOptions;
  for (const auto& options :
       {Options(), Options().label_smoothing(0.2).weight(weight).ignore_index(2),
        Options().reduction(torch::kSum), Options().reduction(torch::kNone).weight(weight)}) {
    CrossEntropyLoss stock(options);
    Sequential net{stock};
    REQUIRE(halfstep::swap_layers_(*net).swapped["0"] == "CrossEntropyLoss");
    CHECK(torch::allclose(net->forward(x, target), stock(x, target), 1e-5, 1e-6));
    if (options.ignore_index() == -100)
      CHECK(torch::equal(net->forward(x, probabilities), stock(x, probabilities)));
    else
      CHECK(has(message_of([&] { net->forward(x, probabilities); }), "ignore_index is not"));
    if (options.weight().defined()) CHECK(net->buffers()[0].is_same(weight));
  }
  hn::CrossEntropyLoss ours(halfstep::functional::CrossEntropyOptions().z_loss(0.1));
  CHECK(has(message_of([&] { ours(x, probabilities); }), "cross_entropy: target is"));
}

TEST_CASE("an optimizer made before the swap still trains, masters and all", "[swap]") {
  torch::manual_seed(1);
  Sequential net(Linear(16, 32), GELU(), LayerNorm(LayerNormOptions({32})), Linear(32, 2));
  halfstep::cast_model(*net);
  halfstep::optim::AdamW opt(net->named_parameters(), halfstep::optim::AdamWOptions(2e-2));
  halfstep::GradScaler scaler;
  const Task task;
  const double first = iterate(net, opt, scaler, task);
  REQUIRE(halfstep::swap_layers_(*net).swapped.size() == 4);
  CHECK(net->ptr(0)->parameters()[0].scalar_type() == torch::kHalf);
  CHECK(net->ptr(2)->parameters()[0].scalar_type() == torch::kFloat);
  double last = 0;
  for (int step = 0; step < 40; ++step) last = iterate(net, opt, scaler, task);
  CHECK(last < 0.5 * first);
  const auto exact = halfstep::export_state_dict(*net, opt);
  CHECK(torch::equal(exact["0.weight"].to(torch::kHalf), net->ptr(0)->parameters()[0]));
}

namespace {

/// How libtorch nests Sequentials: a class with a forward() that is no template.
struct BlockImpl : SequentialImpl {
  BlockImpl() : SequentialImpl(Linear(4, 4), GELU()) {}
  at::Tensor forward(const at::Tensor& x) { return x + SequentialImpl::forward(x); }
};
TORCH_MODULE(Block);

struct MineImpl : LinearImpl {
  using LinearImpl::LinearImpl;
  at::Tensor forward(const at::Tensor& x) { return LinearImpl::forward(x) + 1; }
};
TORCH_MODULE(Mine);

/// Layers where they cannot be exchanged, and two where they can.
struct HolderImpl : torch::nn::Module {
  HolderImpl() {
    register_module("fc", fc);
    list->push_back(GELU());
    register_module("list", list);
    named->update({{"a", SiLU().ptr()}});
    register_module("named", named);
    register_module("encoder", encoder);
    body->push_back(fc);  // the same layer as the member
    body->push_back(Mine(4, 4));
    body->push_back(Block());
    body->push_back(hn::Linear(4, 4));
    register_module("body", body);
  }
  Linear fc{4, 4};
  ModuleList list;
  ModuleDict named;
  TransformerEncoderLayer encoder{TransformerEncoderLayerOptions(4, 1).dim_feedforward(4)};
  Sequential body;
};
TORCH_MODULE(Holder);

}  // namespace

TEST_CASE("what is called by its type is left, with what to write", "[swap]") {
  Holder net;
  const auto body_before = net->body->forward(torch::ones({2, 4}));
  const auto parameters = net->named_parameters();
  const auto report = halfstep::swap_layers_(*net);
  CHECK(keys(report.swapped) == std::vector<std::string>{"body.0", "body.2.0", "body.2.1"});
  CHECK(has(report.left["fc"],
            "Holder calls it by its type; declare the member as halfstep::nn::Linear"));
  CHECK(report.left["fc"].starts_with("a member of "));
  CHECK(report.left["list.0"] ==
        "what is in a torch::nn::ModuleList is called by its type; put a halfstep::nn::GELU in, "
        "and call it as that");
  CHECK(has(report.left["named.a"], "torch::nn::ModuleDict is called by its type"));
  CHECK(report.left["encoder.linear1"] ==
        "a member of torch::nn::TransformerEncoderLayer calls it by its type");
  CHECK(report.left["body.1"].ends_with("Mine derives from Linear"));
  CHECK_FALSE(report.left.contains("body.3"));  // ours already
  // The member is stock as before, its twin in the Sequential ours, and both have the same weights.
  CHECK_FALSE(is<hn::LinearImpl>(*net, "fc"));
  CHECK(is<hn::LinearImpl>(*net, "body.0"));
  check_same_tensors(parameters, net->named_parameters());
  CHECK(torch::allclose(net->body->forward(torch::ones({2, 4})), body_before, 1e-5, 1e-6));
  std::ostringstream out;
  out << report;
  CHECK(out.str() == report.text());
  CHECK(out.str().starts_with("swapped 3 layers: 1 GELU, 2 Linear\nleft 'fc': a member of "));

  Linear root(2, 2);
  CHECK(halfstep::swap_layers_(*root).left[""] ==
        "it is the model itself, which its owner calls by its type; make it a "
        "halfstep::nn::Linear");
}

TEST_CASE("a member is changed by hand as the report says", "[swap]") {
  Linear stock(4, 3);
  stock->eval();
  hn::Linear ours(*stock);
  check_same_tensors(stock->named_parameters(), ours->named_parameters());
  CHECK_FALSE(ours->is_training());
  const auto x = torch::randn({2, 4});
  CHECK(torch::allclose(ours(x), stock(x), 1e-5, 1e-6));
}

TEST_CASE("options and dtypes that ours does not have are left", "[swap]") {
  Sequential net(GELU(GELUOptions().approximate("fast")), Linear(2, 2));
  net->ptr(1)->to(torch::kComplexFloat);
  const auto report = halfstep::swap_layers_(*net);
  CHECK(report.swapped.is_empty());
  CHECK(report.left["0"] == "approximate is 'fast'; halfstep::nn::GELU has 'none' and 'tanh'");
  CHECK(report.left["1"] ==
        "weight is ComplexFloat, a dtype that halfstep::nn::Linear does not have");
  CHECK(is<GELUImpl>(*net, "0"));
}

TEST_CASE("a layer in two places stays one, tied weights stay tied", "[swap]") {
  Linear shared(4, 4);
  Sequential net(shared, GELU(), shared, Linear(4, 4));
  const auto last = net->ptr<LinearImpl>(3);
  last->weight = last->named_parameters()["weight"] = shared->weight;
  const auto x = torch::randn({2, 4}), expected = net->forward(x);
  REQUIRE(halfstep::swap_layers_(*net).swapped.size() == 4);
  CHECK(net->ptr(0) == net->ptr(2));
  CHECK(net->ptr<hn::LinearImpl>(3)->weight.is_same(shared->weight));
  CHECK(torch::allclose(net->forward(x), expected, 1e-5, 1e-6));
}

TEST_CASE("a Sequential in two places is swapped once", "[swap]") {
  struct TwiceImpl : torch::nn::Module {
    TwiceImpl() {
      register_module("a", list);
      register_module("b", list);
    }
    Sequential list{GELU(), Linear(2, 2)};
  } twice;
  CHECK(halfstep::swap_layers_(twice).swapped.size() == 4);
  CHECK(is<hn::GELUImpl>(*twice.list, "0"));
  CHECK(twice.list->named_children()["1"] == twice.list->ptr(1));
  CHECK(twice.list->forward(torch::ones({1, 2})).numel() == 2);
}

TEST_CASE("excluded layers stay, and an item that matches nothing is refused first", "[swap]") {
  Holder net;
  const auto report = halfstep::swap_layers_(*net, {"body.2.*", "f?"});
  CHECK(keys(report.swapped) == std::vector<std::string>{"body.0"});
  CHECK(report.left["fc"] == "excluded by f?");
  CHECK(report.left["body.2.0"] == "excluded by body.2.*");
  CHECK(is<GELUImpl>(*net, "body.2.1"));
  Holder whole;  // what is in an excluded module stays too
  CHECK(halfstep::swap_layers_(*whole, {"body"}).swapped.is_empty());
  CHECK(halfstep::swap_layers_(*whole, {"body.2"}).left["body.2.1"] == "excluded by body.2");

  Sequential plain(Linear(2, 2), GELU());
  const auto before = plain->ptr(0);
  CHECK(message_of([&] {
          halfstep::swap_layers_(*plain, {"1", "haed"});
        }) == "swap_layers_: exclude 'haed' matches no module; the model has '', '0', '1'");
  CHECK_THROWS_AS(halfstep::swap_layers_(*plain, {"haed"}), c10::ValueError);
  CHECK(plain->ptr(0) == before);
  CHECK(message_of([&] { halfstep::swap_layers_(*net, {"x"}); }).ends_with(", …"));
}

TEST_CASE("a swapped model is cloned, saved and loaded", "[swap]") {
  torch::manual_seed(0);
  const auto make = [] {
    return Sequential(Linear(4, 4), LayerNorm(LayerNormOptions({4}).eps(0.1)), GELU(),
                      Linear(4, 3));
  };
  Sequential net = make(), stock = make();
  halfstep::swap_layers_(*net);
  net->ptr<hn::LinearImpl>(0)->activation = "relu";
  const auto x = torch::randn({5, 4}), y = net->forward(x);
  const auto copy = std::dynamic_pointer_cast<SequentialImpl>(net->clone());
  CHECK(torch::equal(copy->forward(x), y));
  CHECK(copy->ptr<hn::LinearImpl>(0)->activation == "relu");
  CHECK_FALSE(copy->parameters()[0].is_same(net->parameters()[0]));
  {
    torch::NoGradGuard off;
    copy->parameters()[0].zero_();
  }
  CHECK(torch::equal(net->forward(x), y));

  net->ptr<hn::LinearImpl>(0)->activation.reset();
  std::stringstream file;
  torch::save(net, file);
  torch::load(stock, file);  // into a model of torch's layers
  CHECK(torch::allclose(stock->forward(x), net->forward(x), 1e-5, 1e-6));
}
