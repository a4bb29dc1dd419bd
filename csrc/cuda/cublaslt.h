#pragma once

// The real Lt and Stopwatch of plans.h: cuBLASLt, and CUDA events.

#include "common.h"
#include "plans.h"

namespace halfstep::cuda {

/// cuBLASLt as torch has loaded it, or null where it cannot be found. One for the process.
Lt* cublaslt();

/// Times on `stream` with events. The host asks them until they are done, so this is for a
/// problem's first use only.
Stopwatch stopwatch(Stream stream);

/// Whether work on `stream` is being recorded into a graph.
bool captures(Stream stream);

}  // namespace halfstep::cuda
