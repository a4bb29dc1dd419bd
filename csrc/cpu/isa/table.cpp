#include "activation.h"
#include "group_norm.h"
#include "linear.h"
#include "mv.h"
#include "parts.h"
#include "rope.h"
#include "softmax.h"
#include "vector_tiles.h"

namespace halfstep::cpu {

const Kernels HALFSTEP_TABLE = {HALFSTEP_ISA_NAME,
                                grad_stats,
                                grad_histogram,
                                unscale,
                                adam,
                                sgd,
                                lion,
                                adagrad,
                                lamb,
                                novograd,
                                lamb_norms,
                                novograd_norms,
                                write_masters,
                                read_masters,
                                refresh_masters,
                                read_state,
                                write_state,
                                &kNorm,
                                &kActivation,
                                &kSoftmax,
                                &kRope,
                                &kLossKernels,
                                &kLinear,
                                &kGroupNorm,
                                &kMatrixVector,
                                kExtreme,
                                kVectorTiles};

}  // namespace halfstep::cpu
