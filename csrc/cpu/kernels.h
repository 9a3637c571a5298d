// What each instruction set provides; cpu/dispatch.cpp picks one table at run time.
#pragma once

#include "launch.h"

namespace xlstm {

struct Kernels {
  void (*recurrence_forward)(const RecurrenceForward&);
  void (*recurrence_backward)(const RecurrenceBackward&);
  void (*mlstm_forward)(const MLSTMForward&);
  void (*mlstm_backward)(const MLSTMBackward&);
  void (*mlstm_step)(const MLSTMStep&);
  void (*kl_div)(const KlDiv&);
  void (*topk_kl_div)(const TopkKlDiv&);
  void (*scale_rows)(const ScaleRows&);
};

#define XLSTM_DECLARE_KERNELS(ISA)                     \
  namespace ISA {                                      \
  void recurrence_forward(const RecurrenceForward&);   \
  void recurrence_backward(const RecurrenceBackward&); \
  void mlstm_forward(const MLSTMForward&);             \
  void mlstm_backward(const MLSTMBackward&);           \
  void mlstm_step(const MLSTMStep&);                   \
  void kl_div(const KlDiv&);                           \
  void topk_kl_div(const TopkKlDiv&);                  \
  void scale_rows(const ScaleRows&);                   \
  }

XLSTM_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
XLSTM_DECLARE_KERNELS(avx2)
XLSTM_DECLARE_KERNELS(avx512)
XLSTM_DECLARE_KERNELS(amx)  // defined: the mLSTM of sequences, for bfloat16
#endif

}  // namespace xlstm
