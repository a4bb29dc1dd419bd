#pragma once

#include <string>

#include "export.h"

namespace halfstep {

/// "ready", or why tensors on a GPU have no halfstep kernels here: "not built", "no device",
/// "not loaded (…)". The CUDA library is loaded with this one where the process has a CUDA torch.
HALFSTEP_API std::string cuda_status();

}  // namespace halfstep
