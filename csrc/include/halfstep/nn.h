#pragma once

// Layers under torch::nn's names: the same options, parameters and state dict, computed by
// halfstep's ops.

#include "nn/linear.h"
