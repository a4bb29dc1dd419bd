#include "parts.h"

namespace halfstep::cpu {

const Kernels HALFSTEP_TABLE = {HALFSTEP_ISA_NAME, grad_stats,   grad_histogram, unscale, adam, sgd,
                                write_masters,     read_masters, refresh_masters};

}  // namespace halfstep::cpu
