#pragma once

// Declarations shared by the files that are compiled once per instruction set.

#include "kernels.h"

namespace halfstep::cpu::inline HALFSTEP_ISA {

math::BlockStats grad_stats(const void* grad, Dtype dtype, int64_t count);
void grad_histogram(const void* grad, Dtype dtype, double scale, int64_t count,
                    math::Histogram& into);
bool unscale(const void* input, Dtype input_dtype, void* output, Dtype output_dtype,
             double inv_scale, int64_t count);
int64_t adam(const StepTensor& t, const math::AdamConstants& c, int64_t begin, int64_t end);
int64_t sgd(const StepTensor& t, const math::SgdConstants& c, int64_t begin, int64_t end);
int64_t lion(const StepTensor& t, const math::LionConstants& c, int64_t begin, int64_t end);
int64_t adagrad(const StepTensor& t, const math::AdagradConstants& c, int64_t begin, int64_t end);
int64_t lamb(const StepTensor& t, const math::LambConstants& c, int64_t begin, int64_t end);
int64_t novograd(const StepTensor& t, const math::NovoGradConstants& c, int64_t begin, int64_t end);
Norms lamb_norms(const StepTensor& t, const math::LambConstants& c, int64_t begin, int64_t end);
Norms novograd_norms(const StepTensor& t, const math::NovoGradConstants& c, int64_t begin,
                     int64_t end);
int64_t write_masters(const StepTensor& tensor, const void* values, int64_t begin, int64_t end);
void read_masters(const StepTensor& tensor, void* values, int64_t begin, int64_t end);
int64_t refresh_masters(const StepTensor& tensor, bool dry_run, int64_t begin, int64_t end);
void read_state(const StepTensor& t, bool is_signed, void* values, int64_t begin, int64_t end);
void write_state(const StepTensor& t, bool is_signed, const void* values, uint32_t key,
                 int64_t begin, int64_t end);
extern const NormKernels kNorm;
extern const ActivationKernels kActivation;
extern const LossKernels kLossKernels;

}  // namespace halfstep::cpu::inline HALFSTEP_ISA
