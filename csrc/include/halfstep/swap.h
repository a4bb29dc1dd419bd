#pragma once

#include <torch/ordered_dict.h>

#include <iosfwd>
#include <string>
#include <vector>

#include "export.h"

namespace torch::nn {
class Module;
}

namespace halfstep {

/// What swap_layers_ did. `swapped`: {module path: class name, as "Linear"}; `left`: {module path:
/// why} for layers of a kind that could have been.
struct HALFSTEP_API SwapReport {
  torch::OrderedDict<std::string, std::string> swapped{"Module"}, left{"Module"};

  /// "swapped 3 layers: 2 Linear, 1 GELU", and a line for each that was left.
  std::string text() const;
};
HALFSTEP_API std::ostream& operator<<(std::ostream& stream, const SwapReport& report);

/// Turns the torch::nn layers of `model` that halfstep::nn has into halfstep::nn's, in place:
/// Linear, LayerNorm, GELU, SiLU, Softmax, CrossEntropyLoss and the convolutions. The new layer has
/// the options and the mode of the old one and the same tensors, so optimizers, tied weights, names
/// and the state dict stay right; it is another object, and a pointer to the old one is not ours.
///
/// The forward() of a torch::nn layer is not virtual: a program calls the one of the type that it
/// was compiled with. Only torch::nn::Sequential, and classes derived from it, call a child
/// whatever its type, so theirs are swapped, at any depth of the model. A layer that a member or a
/// ModuleList holds is left, with what to write instead; so are classes that derive from torch's,
/// and layers with an option or a dtype that ours does not have.
///
/// `exclude`: paths and globs ("head", "blocks.0.*") of modules that stay stock, with all that is
/// in them; one that matches no module throws ValueError before anything is changed. Swapping twice
/// changes nothing.
HALFSTEP_API SwapReport swap_layers_(torch::nn::Module& model,
                                     const std::vector<std::string>& exclude = {});

}  // namespace halfstep
