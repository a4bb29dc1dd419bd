#pragma once

// Declarations shared by the files that are compiled once per instruction set.

#include "kernels.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

math::BlockStats grad_stats(const void* grad, Dtype dtype, int64_t count);
void grad_histogram(const void* grad, Dtype dtype, double scale, int64_t count,
                    math::Histogram& into);
bool unscale(const void* input, Dtype input_dtype, void* output, Dtype output_dtype,
             double inv_scale, int64_t count);
int64_t adam(const StepTensor& tensor, const math::AdamStep& step, int64_t begin, int64_t end);
int64_t sgd(const StepTensor& tensor, const math::SgdStep& step, int64_t begin, int64_t end);
int64_t write_masters(const StepTensor& tensor, const void* values, int64_t begin, int64_t end);
void read_masters(const StepTensor& tensor, void* values, int64_t begin, int64_t end);
int64_t refresh_masters(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end);

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
