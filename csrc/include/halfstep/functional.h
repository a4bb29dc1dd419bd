#pragma once

// Layer functions, with the names and conventions of torch::nn::functional. Each is one registered
// op, with one rounding.

#include "functional/activation.h"
#include "functional/conv.h"
#include "functional/linear.h"
#include "functional/loss.h"
#include "functional/norm.h"
#include "functional/rope.h"
#include "functional/scale_gradient.h"
#include "functional/softmax.h"
