// The launchers of losses over rows of logits on CUDA, and how they cut a row.
#pragma once

#include <cstdint>

#include "launch.h"

namespace xlstm {

struct RowLimits {
  int shared_bytes, threads;  // of a block
  bool clusters;              // blocks can share a row: sm_90 and later
};

// A row is cut into slices, one for each block of a cluster; the first vectors of a slice stay in
// shared memory between passes, those beyond are read again.
struct RowShape {
  int blocks, threads;
  int slice, kept;  // vectors of 16 bytes
  int shared_bytes;
};

// What shared memory is for: rows that are looked at together; beside each of their vectors, kept or
// not; and whatever the row's length.
struct RowBytes {
  int rows, beside, other;
};

// Of rows of `columns`, `per_vector` in a vector. The one place that knows.
RowShape row_shape(const RowLimits& limits, std::int64_t columns, int per_vector, RowBytes bytes);

// `counted`: a float64 on the device, for the launcher's own use. A label out of range makes the loss
// and the gradient of its row NaN.
void kl_div_cuda(const KlDiv& args, void* counted, void* stream);
// The same of an id that is out of range.
void topk_kl_div_cuda(const TopkKlDiv& args, void* counted, void* stream);

}  // namespace xlstm
