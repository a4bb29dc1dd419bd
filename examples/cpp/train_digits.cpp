// The digits job without Python: the same network, data order and numbers as
// examples/python/train_digits.py.
//
//   python examples/python/train_digits.py --dump out/digits.pt      # data, initial weights, order
//   of rows train_digits out/digits.pt [out/weights.pt]
//
// On the CPU the exact weights after any number of steps are bit for bit those of the Python
// program (same libtorch, same number of threads): tests/python/test_digits.py.

#include <halfstep/halfstep.h>
#include <torch/serialize.h>
#include <torch/torch.h>

#include <cstdio>
#include <fstream>
#include <iterator>

namespace {

std::vector<char> read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

torch::nn::Sequential make_net() {
  using namespace torch::nn;
  return Sequential(Conv2d(Conv2dOptions(1, 32, 3).padding(1)), ReLU(),
                    Conv2d(Conv2dOptions(32, 64, 3).padding(1)), ReLU(), MaxPool2d(2), Flatten(),
                    Linear(1024, 128), ReLU(), Linear(128, 10));
}

double accuracy(torch::nn::Sequential& net, const torch::Tensor& x, const torch::Tensor& y) {
  const torch::NoGradGuard no_grad;
  const halfstep::AutocastGuard guard(torch::kCPU);
  return 100 * (net->forward(x).argmax(1) == y).to(torch::kFloat).mean().item<double>();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s digits.pt [weights.pt]\n", argv[0]);
    return 1;
  }
  const auto dump = torch::pickle_load(read_file(argv[1])).toGenericDict();
  const auto tensor = [&](const std::string& key) { return dump.at(key).toTensor(); };

  auto net = make_net();
  {
    const torch::NoGradGuard no_grad;
    for (auto& item : net->named_parameters()) item.value().copy_(tensor("weight." + item.key()));
  }
  halfstep::cast_model(*net);
  halfstep::optim::AdamW opt(net->named_parameters(), halfstep::optim::AdamWOptions(2e-3));
  halfstep::GradScaler scaler;

  const auto x = tensor("x"), y = tensor("y"), order = tensor("order");
  double loss_value = 0;
  for (int64_t step = 0; step < order.size(0); ++step) {
    const auto rows = order[step];
    opt.zero_grad();
    torch::Tensor output;
    {
      const halfstep::AutocastGuard guard(torch::kCPU);
      output = net->forward(x.index_select(0, rows));
    }
    const auto loss =
        torch::nn::functional::cross_entropy(output.to(torch::kFloat), y.index_select(0, rows));
    scaler.scale(loss).backward();
    scaler.step(opt);
    scaler.update();
    loss_value = loss.item<double>();
  }
  const auto stats = scaler.stats();
  std::printf("%lld steps, loss %.4f, accuracy %.2f %%, loss scale %g, skipped %lld\n",
              static_cast<long long>(order.size(0)), loss_value,
              accuracy(net, tensor("test_x"), tensor("test_y")), stats.scale,
              static_cast<long long>(stats.steps_skipped));

  if (argc > 2) {
    // Tuples of (name, tensor): Python's torch.load(weights_only=True) refuses the type tag of a
    // dict.
    std::vector<c10::IValue> weights;
    const auto exported = halfstep::export_state_dict(*net, opt);
    for (const auto& item : exported)
      weights.emplace_back(c10::ivalue::Tuple::create({item.key(), item.value()}));
    const auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(weights));
    std::ofstream(argv[2], std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  }
  return 0;
}
