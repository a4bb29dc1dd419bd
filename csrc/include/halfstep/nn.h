#pragma once

// Layers under torch::nn's names: the same options, parameters and state dict, computed by
// halfstep's ops.

#include "nn/activation.h"
#include "nn/conv.h"
#include "nn/linear.h"
#include "nn/loss.h"
#include "nn/norm.h"
#include "nn/rope.h"
#include "nn/softmax.h"
