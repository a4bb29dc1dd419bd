#pragma once

#include <string>

#include "export.h"

namespace halfstep {

/// Whether FP16 (and, without a BF16 unit, BF16) linear, matmul and convolution on the CPU take
/// halfstep's kernels. On from the start unless HALFSTEP_OVERRIDES=0. docs/overrides.md lists them.
HALFSTEP_API bool overrides_enabled();
HALFSTEP_API void set_overrides(bool enabled);

/// One line: which path FP16 and BF16 products take on this CPU now.
HALFSTEP_API std::string cpu_path();

}  // namespace halfstep
