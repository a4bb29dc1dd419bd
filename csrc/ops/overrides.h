#pragma once

#include <c10/core/ScalarType.h>

#include <halfstep/overrides.h>

namespace halfstep::ops {

/// True where `type` products are to be computed in FP32 and rounded once: this CPU has no unit for
/// it (as oneDNN sees it, ONEDNN_MAX_CPU_ISA included), and the overrides are on.
bool widens_products(c10::ScalarType type);
/// Whether oneDNN has instructions for products of that 16-bit type here; true for other types.
bool has_product_unit(c10::ScalarType type);
/// The same for convolution: FP16 always, since the stock backward is slow with the unit too.
bool widens_convolution(c10::ScalarType type);
/// The backward of attention: FP16 always, for the same reason.
bool widens_attention_backward(c10::ScalarType type);

}  // namespace halfstep::ops
