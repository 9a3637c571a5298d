// The whole C++ surface: one declaration per launcher. Raw pointers, sizes, strides (in elements); no
// torch and no Python here or below. Every argument is checked by the Python side.
#pragma once

#include <cstdint>
#include <limits>

#include "cells/list.h"
#include "common/dtype.h"

namespace xlstm {

#define XLSTM_CELL_ENUMERATOR(name, type, states) name,
enum class Cell : int { XLSTM_CELLS(XLSTM_CELL_ENUMERATOR) };
#undef XLSTM_CELL_ENUMERATOR

// Steps between two saved states; the backward recomputes the states in between.
constexpr int kCheckpointInterval = 16;

// A recurrence with a block-diagonal recurrent matrix. Gates i f z o (G = 4); states h c n m (S = 4)
// or h c (S = 2). "compute" is float32, or float64 for float64 x.
struct Recurrence {
  Cell cell;
  DType dtype;                 // of x, h and their gradients
  std::int64_t B, T, H, D;     // B counts sequences; T is the time axis of x
  const std::int32_t* starts;  // (B + 1) offsets of packed sequences; null: row b is sequence b
  const void* x;               // (B, T, G, H, D) by x_stride; D contiguous
  std::int64_t x_stride[4];    // B, T, G, H
  const void* r;               // (G, H, D, D) compute, contiguous: [gate, head, out, in]
  const void* b;               // (G, H, D) compute, contiguous, or null
  const void* state;           // (S, B, H, D) compute, contiguous, or null for zeros
  double n_floor;              // sLSTM: n is at least this
  double clip_grad;            // bound on the recurrent part of dh; not finite: none
};

struct RecurrenceForward : Recurrence {
  void* h;            // (B, T, H, D) dtype, contiguous
  void* last;         // (S, B, H, D) compute, contiguous
  void* raw;          // (B, T, G, H, D) compute, contiguous: x + R h + b; null: no gradient
  void* checkpoints;  // (N, S, H, D) compute, contiguous; null with raw
};

struct RecurrenceBackward : Recurrence {
  const void* raw;
  const void* checkpoints;
  const void* dh;             // (B, T, H, D) dtype by dh_stride, D contiguous; or null for zeros
  std::int64_t dh_stride[3];  // B, T, H
  const void* dlast;          // (S, B, H, D) compute, contiguous, or null for zeros
  void* dx;                   // (B, T, G, H, D) dtype, contiguous
  void* dr;                   // (G, H, D, D) compute, contiguous, or null when not wanted
  void* db;                   // (G, H, D) compute, contiguous, or null when not wanted
  void* dstate;               // (S, B, H, D) compute, contiguous, or null when not wanted
};

// Steps between two saved states of the mLSTM; the backward recomputes the states in between.
constexpr int kStateInterval = 512;

enum class InputGate : int { kExp = 0, kSigmoid = 1 };
// h = sums / (max(|den|, exp(-m)) + eps), sums / (den + eps), sums * exp(m)
enum class Normalizer : int { kMax = 0, kPlain = 1, kNone = 2 };

// Matrix memory with scalar gates per head. State of a sequence and head: c (K, V), n (K), m.
struct MLSTM {
  DType dtype;  // of q, k, v, h and their gradients; gates and states are compute
  InputGate input_gate;
  Normalizer normalizer;
  std::int64_t B, T, H, K, V;  // B counts sequences; T is the time axis of q
  const std::int32_t* starts;  // (B + 1) offsets of packed sequences; null: row b is sequence b
  const void *q, *k;           // (B, T, H, K); K contiguous
  const void* v;               // (B, T, H, V); V contiguous
  const void *i, *f;           // (B, T, H) pre-activations
  // B, T, H
  std::int64_t q_stride[3], k_stride[3], v_stride[3], i_stride[3], f_stride[3];
  double scale, eps;   // of q; of the normaliser
  std::int64_t chunk;  // tokens of a chunk, at most
  void* row_m;         // (B, T, H), contiguous: m and the signed normaliser of each token
  void* row_den;
  void *c_saved, *n_saved, *m_saved;  // (N, H, ...): states before every kStateInterval-th step
};

struct MLSTMForward : MLSTM {
  const void *c, *n, *m;               // (B, H, ...) contiguous, or null for zeros
  void *h, *c_last, *n_last, *m_last;  // h (B, T, H, V) contiguous
};

// A few tokens of each sequence. The state of sequence b is row from[b] of c, n and m, and goes to row
// to[b * T + t] of c_last, n_last and m_last after token t; rows are strides (of c, n, m) apart, and
// contiguous. from[b] < 0: h and what goes to rows is 0; to[..] < 0: that state is not kept.
// Null: from[b] is b; only the last state is kept, in row b.
struct MLSTMStep : MLSTM {
  DType i_dtype, f_dtype;  // of the gates
  DType c_dtype;           // compute or bfloat16; n and m are compute
  const std::int64_t *from, *to;
  const void *c, *n, *m;
  std::int64_t from_stride[3], to_stride[3];
  void *h, *c_last, *n_last, *m_last;  // h (B, T, H, V) contiguous
};

struct MLSTMBackward : MLSTM {
  const void* dh;             // (B, T, H, V) by dh_stride, V contiguous; null for zeros
  std::int64_t dh_stride[3];  // B, T, H
  const void *dc_last, *dn_last, *dm_last;  // contiguous, or null for zeros
  void *dq, *dk, *dv, *di, *df;             // contiguous; di and df compute
  void *dc, *dn, *dm;                       // of the initial state, or null when not wanted
};

// m = mix p + (1 - mix) q, p the teacher's and q the student's distribution
enum class Divergence : int {
  kForward = 0,      // KL(p|q)
  kReverse = 1,      // KL(q|p)
  kJs = 2,           // mix KL(p|m) + (1 - mix) KL(q|m)
  kSkew = 3,         // KL(p|m)
  kSkewReverse = 4,  // KL(q|m)
  kTv = 5,           // sum |p - q| / 2
};
// Mean is over the rows whose label is not ignored, all rows without labels; batch mean over all rows.
enum class Reduction : int { kNone = 0, kSum = 1, kMean = 2, kBatchMean = 3 };

// What the loss of a row asks of all its logits. Processes that hold some of the columns each find their
// part; a row's shift is the largest of theirs, a sum the sum of theirs, scaled by 2^(theirs - the row's).
struct RowSums {
  static constexpr double kMasked = -std::numeric_limits<double>::infinity();
  double shift_s = kMasked, shift_t = kMasked;  // the largest z log2(e) / T
  double shift_hard = kMasked;  // the largest z log2(e), where the hard label has its own softmax
  double stray = kMasked;       // as a shift: KL(a|b)'s largest a where b is masked
  double sum_s = 0, sum_t = 0;  // of 2^(z log2(e) / T - shift)
  double excess = 0, gap = 0;   // sum_s - sum_t, exactly; what makes the divergence of them
  double sum_hard = 0;          // of 2^(z log2(e) - shift_hard)
  double z_label = 0;           // the label's logit
  double z_all = 0, words = 0;  // the sum and the number of the logits that are not masked
  double mixed = 0, slope = 0;  // mixtures: the divergence, and sum q h
};
// What one call does, where columns are split: every process finds its sums, then, for a mixture of p and
// q, its part of mixed and slope, then the loss and its columns of the gradient.
enum class Phase : int { kWhole = 0, kSums = 1, kMixed = 2, kLoss = 3 };

// Rows of student logits: a divergence from a target, mixed with hard-label cross-entropy, and the
// gradient to the student. Row n is at (n / rows[1], n % rows[1]) by two strides, so a shifted
// (B, T, V) view needs no copy.
struct RowLoss {
  Divergence divergence;
  Reduction reduction;
  DType student_dtype, grad_dtype;
  Phase phase;
  RowSums* sums;         // (N), of the row from kMixed on; null for kWhole
  std::int64_t rows[2];  // N is their product
  std::int64_t V_student;
  const void* student;  // rows of V_student, contiguous
  std::int64_t student_stride[2];
  // (N) or null; in [0, V_student) or ignore_index; another negative number for a split row's label
  // that another process has
  const std::int64_t* labels;
  std::int64_t ignore_index;  // rows with this label give loss 0 and gradient 0
  const void* row_weight;     // (N) compute type of the student, or null for ones
  double temperature, mix, kl_weight, ce_weight, label_smoothing, z_loss;
  double softcap;  // z counts as softcap tanh(z / softcap); 0: as z
  void* row_loss;  // (N) compute type of the student: weighted loss of each row
  void* loss;      // their reduction, one element; null for Reduction::kNone
  // Gradient of that, rows of V_student; null: loss only. It may be `student` in the same dtype, on the
  // CPU in a narrower one too: a row is read before it is written, from its beginning.
  void* grad;
  std::int64_t grad_stride[2];
};

// The target is the softmax of a teacher's logits.
struct KlDiv : RowLoss {
  DType teacher_dtype;
  std::int64_t V_teacher;  // logits beyond the narrower vocabulary count as -inf
  const void* teacher;     // rows of V_teacher, contiguous
  std::int64_t teacher_stride[2];
  double teacher_softcap;
};

// What a teacher of K words says of the words outside.
enum class Support : int {
  kTail = 0,          // they are one outcome, of the rest of the mass
  kRenormalized = 1,  // nothing; the mass inside is scaled to 1
  kBoth = 2,          // nothing, nor does the student
  kTruncated = 3,     // nothing, and sum p (ln p - ln q) is over the words inside as they are
  kSampled = 4,       // as kRenormalized, of weights that the temperature leaves alone
};

// The target is what a teacher says of K words.
struct TopkKlDiv : RowLoss {
  Support support;
  std::int64_t V, first;  // student's columns are [first, first + V_student) of V
  std::int64_t K;
  const void* logprobs;      // (N, K) compute type of the student, contiguous, at temperature 1
  const std::int64_t* ids;   // (N, K) contiguous; in [0, V), or -1 for none; repeated ones add
  const void* tail_logmass;  // (N) compute, or null: what the words inside leave of 1
  double* z_words;           // (N, K) beside sums: the ids' logits, 0 for those of other processes
};

// x[n, v] *= scale[n] in place: a loss's gradient by its rows, times the gradient that reaches the rows.
struct ScaleRows {
  DType dtype;        // of x
  std::int64_t N, V;  // V contiguous
  void* x;            // (N, V), rows x_stride apart
  std::int64_t x_stride;
  const void* scale;  // (N) compute, contiguous
};

void recurrence_forward_cpu(const RecurrenceForward& args);
void recurrence_backward_cpu(const RecurrenceBackward& args);
void mlstm_forward_cpu(const MLSTMForward& args);
void mlstm_backward_cpu(const MLSTMBackward& args);
// chunk, starts and what a gradient needs are not read. A sequence may write rows that it reads.
void mlstm_step_cpu(const MLSTMStep& args);
// Throws std::invalid_argument for a label out of range.
void kl_div_cpu(const KlDiv& args);
// Throws std::invalid_argument for a label or an id out of range.
void topk_kl_div_cpu(const TopkKlDiv& args);
void scale_rows_cpu(const ScaleRows& args);

// `stream` is a cudaStream_t of the current device.
void scale_rows_cuda(const ScaleRows& args, void* stream);

}  // namespace xlstm
