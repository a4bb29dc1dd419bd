#pragma once

#include <c10/core/ScalarType.h>

#include <halfstep/overrides.h>

namespace halfstep::ops {

/// Whether this CPU has a unit for products of `type`, as oneDNN sees it; FP32 and FP64: true.
bool has_unit(c10::ScalarType type);
/// Whether FP16 products can go to a matrix unit for BF16 (csrc/cpu/tiles/tiles.h).
/// ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and HALFSTEP_TILES=0 hide it.
bool has_matrix_unit();
/// Whether FP16 products are computed in FP32 by csrc/cpu/isa/vector_tiles.cpp: on AMD's CPUs with
/// AVX2 and without an FP16 unit. On Zen 4 that is quicker than torch's FP32 products of widened
/// copies. HALFSTEP_TILES=1: on every CPU with AVX2 and neither unit; 0: never.
bool has_vector_tiles();
/// Whether the CPU has a matrix unit for FP16 itself, which oneDNN uses.
bool has_half_matrix_unit();
/// Whether torch's own products of `type` go there: FP16, unless the CPU has a matrix unit for FP16
/// too, which torch uses. False while the overrides are off.
bool prefers_matrix_unit(c10::ScalarType type);
/// True where `type` products are to be computed in FP32 and rounded once: this CPU has no unit for
/// it (as oneDNN sees it, ONEDNN_MAX_CPU_ISA included), and the overrides are on.
bool widens_products(c10::ScalarType type);
/// The same for convolution: FP16 always, since the stock backward is slow with the unit too.
bool widens_convolution(c10::ScalarType type);
/// The backward of attention: FP16 always, for the same reason.
bool widens_attention_backward(c10::ScalarType type);
/// Layers and functions whose stock FP16 kernel is slow with the unit too (docs/audit.md): FP16.
bool widens_layers(c10::ScalarType type);

}  // namespace halfstep::ops
