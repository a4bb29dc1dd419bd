#pragma once

// The whole C++ API: AMP for LibTorch programs, without Python in the process.

#include "autocast.h"
#include "cast.h"
#include "checkpoint.h"
#include "cuda.h"
#include "functional.h"
#include "grad_scaler.h"
#include "monitor.h"
#include "nn.h"
#include "nonfinite.h"
#include "optim.h"
#include "overrides.h"
#include "policies.h"
#include "record.h"
#include "shares.h"
#include "state_dict.h"
#include "swap.h"
#include "tensorboard.h"
#include "version.h"
