#pragma once

// Layer functions, with the names and conventions of torch::nn::functional. Each is one registered
// op, with one rounding.

#include "functional/linear.h"
#include "functional/scale_gradient.h"
