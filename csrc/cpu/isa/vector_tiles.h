#pragma once

// The kernels of tiles/tiles.h in FP32 vector instructions. No torch here.

#include "../../math/platform.h"
#include "../tiles/tiles.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

/// With AVX2.
extern const TileKernels kVectorTiles;

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
