#include "activation.h"
#include "group_norm.h"
#include "linear.h"
#include "mv.h"
#include "parts.h"
#include "rope.h"
#include "softmax.h"
#include "vector_tiles.h"

namespace halfstep::cpu {

// Nothing but constant expressions: what a start-up routine would fill in might take instructions
// that this CPU does not have.
namespace {
#if defined(__AVX2__)
constexpr const TileKernels* kTiles = &kVectorTiles;
#else
constexpr const TileKernels* kTiles = nullptr;
#endif
}  // namespace

constinit const Kernels HALFSTEP_TABLE = {HALFSTEP_ISA_NAME,
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
                                          extreme,
                                          kTiles};

}  // namespace halfstep::cpu
