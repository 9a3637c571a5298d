// The launchers of the recurrence on CUDA, and what only they take.
#pragma once

#include <vector>

#include "launch.h"

namespace xlstm {

// What the backward writes besides, for its own use and for the product that gives dR.
struct RecurrenceScratch {
  void* states;    // (blocks, kCheckpointInterval, S - 1, width, 8) float32
  void* h_prev;    // (B, T, H, D) dtype, contiguous: h before each step; null: dR is not wanted
  void* db_parts;  // (blocks / H, G, H, D) float32; null: db is not wanted
};

// Heads of up to `D` units in blocks of `threads`; fragments of R in all and in registers.
struct RecurrenceLaunchShape {
  bool forward;
  DType operand;  // kBFloat16 for bfloat16 r, else kFloat32
  int D, threads, fragments, held, shared_bytes;
};

std::vector<RecurrenceLaunchShape> recurrence_launch_shapes();

// `r_digits`: the dtype that r had before, which has all the digits there are. `stream` is a
// cudaStream_t of the current device. dr and db of the arguments are not read.
void recurrence_forward_cuda(const RecurrenceForward& args, DType r_digits, void* stream);
void recurrence_backward_cuda(const RecurrenceBackward& args, const RecurrenceScratch& scratch,
                              DType r_digits, void* stream);

}  // namespace xlstm
