#pragma once

#include <string>
#include <vector>

#include "optim.h"
#include "state_dict.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

/// Writes the file that torch.save would: torch.load(path, weights_only=True) reads it. Written
/// beside `path`, synced and renamed, so that `path` always holds a whole file: the old or the new.
HALFSTEP_API void save(const StateDict& state, const std::string& path);
/// Reads a file of halfstep::save, or of torch.save in Python; all tensors on the CPU. Nothing but
/// data is read: a file that asks for other Python objects is refused, naming them.
HALFSTEP_API StateDict load(const std::string& path);

/// Parameters and buffers by name, as they are (copies); Python's model.load_state_dict takes them.
HALFSTEP_API StateDict state_dict(const torch::nn::Module& model);
/// Sets parameters and buffers, converted to the dtypes of `model`. Everything is checked first.
/// Make the optimizer afterwards (its masters begin at the exact values), or pass it.
HALFSTEP_API void load_state_dict(torch::nn::Module& model, const StateDict& state);
/// Sets weights and masters exactly, as hs.load_state_dict in Python.
HALFSTEP_API void load_state_dict(torch::nn::Module& model,
                                  const std::vector<optim::Optimizer*>& optimizers,
                                  const StateDict& state);

/// Reads the weights in a file of torch::save(module, path), of save(state_dict(module), path) or
/// of Python's torch.save(module.state_dict(), path), and converts them to the dtypes of `model`,
/// where torch::load would reinterpret bytes. Everything is checked first; a refused file changes
/// nothing. Make the optimizer afterwards: its masters begin at the file's exact values.
HALFSTEP_API void load(torch::nn::Module& model, const std::string& path);

}  // namespace halfstep
