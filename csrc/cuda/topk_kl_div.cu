// Divergence of a student's softmax from a teacher that is known by K of its words, mixed with
// hard-label cross-entropy: the loss of every row and its gradient by the student's logits.
//   the equations of cpu/topk_kl_div.cpp; cells/outcome.h
// Source: arXiv 2603.15590, Eq. 13; arXiv 2503.16870.
// Tensors: launch.h. A row is read once and kept in shared memory, what does not fit is read again. A
//   bit for each logit says whether its word is inside, so that what is outside is summed by itself.
// Grid: a block, or a cluster of blocks, a row (row_shape()); every block has all words inside, in
//   float64; sums of a thread over the others in the compute type. Nothing saved.
#include "cells/outcome.h"
#include "cuda/row_loss.h"
#include "cuda/row_words.h"

namespace xlstm {
namespace {

using XLSTM_ISA::kInfinity;
using XLSTM_ISA::kLn2;
using XLSTM_ISA::kMasked;
using XLSTM_ISA::Outcome;

constexpr int kThreads = 256;  // of a block, at most: words take registers

// The largest of a row: logits outside and inside, logarithms of masses; whether an id is wrong.
struct Tops {
  double outside, inside, log_p, wrong, z_label;
  __device__ __forceinline__ double largest() const { return outside > inside ? outside : inside; }
};

// What the sums of a row leave to do.
template <class C>
struct Plan {
  Fate fate;
  double p_shift, q_shift;     // of logarithms, to those of p and q
  double part, outside, tail;  // of a row what is compared; e outside to the row's and the tail's
  Outcome rest;                // all words outside
  HardPart<C> hard;
};
struct Slopes {
  Fate fate;
  double divergence, sum, outside;  // sum of all; b of gradient() outside
};

template <class E>
class TopkRow {
 public:
  using C = typename Row<E>::C;
  static constexpr int kN = Row<E>::kN;

  __device__ __forceinline__ TopkRow(const TopkKlDiv& args, const RowShape& shape, RowGroup& group,
                                     const Words& words, Vector* kept, std::int64_t n)
      : args_(args),
        group_(group),
        words_(words),
        n_(n),
        begin_(group.block() * shape.slice * kN),
        student_({args.student, args.student_dtype, args.V_student, args.student_stride, args, n},
                 begin_, args.softcap, kept, shape.kept),
        grad_(args, n),
        hard_(args),
        scale_(static_cast<C>(XLSTM_ISA::kLog2E / args.temperature)),
        p_temperature_(args.support == Support::kSampled ? 1 : args.temperature),
        vectors_(slice_vectors(args.V_student, begin_, kN, shape.slice)) {}

  __device__ __forceinline__ void run(const RowScale& by) {
    const RowTask task(args_, by, n_, C(1));
    Fate fate = Fate::kZero;
    double loss = 0;
    if (!task.skipped) {
      const bool wrong = gather();
      Tops tops = read(task, wrong);
      if (sums_given(args_)) tops.outside = args_.sums[n_].shift_s / scale_;
      const Plan<C> plan = total(task, tops);
      if (sums_asked(args_)) return;
      fate = plan.fate;
      loss = plan.hard.loss;
      if (fate == Fate::kComputed) {
        const Slopes slopes = compare(task, plan);
        fate = slopes.fate;
        const double T = args_.temperature;
        if (args_.kl_weight != 0) loss += args_.kl_weight * T * T * slopes.divergence;
        if (fate == Fate::kComputed && args_.grad) write(task, plan, slopes);
      }
    }
    if (fate != Fate::kComputed && args_.grad) fill_slice(grad_, fate, group_, begin_, vectors_);
    if (group_.leads()) static_cast<C*>(args_.row_loss)[n_] = static_cast<C>(task.weight * loss);
  }

 private:
  __device__ __forceinline__ bool with_tail() const {
    return args_.support == Support::kTail || args_.support == Support::kTruncated;
  }

  // Whether the student's softmax goes over the words inside alone.
  __device__ __forceinline__ bool closed() const { return args_.support == Support::kBoth; }

  template <class F>
  __device__ __forceinline__ void each_word(F f) const {
    for (int k = group_.thread(); k < words_.K; k += group_.threads()) {
      if (words_.ids[k] >= 0) f(k);
    }
  }
  // Vectors with words inside masked.
  template <class F>
  __device__ __forceinline__ void each_vector(F f) const {
    for (int v = group_.thread(); v < vectors_; v += group_.threads()) {
      C z[kN];
      student_.fetch(v, z);
      const unsigned inside = inside_bits(v);
#pragma unroll
      for (int k = 0; k < kN; ++k) z[k] = inside >> k & 1 ? kMasked<C> : z[k];
      f(v, z, inside);
    }
  }
  __device__ __forceinline__ unsigned inside_bits(int v) const {
    return words_.bits[v * kN / 32] >> v * kN % 32 & ((1u << kN) - 1);
  }

  // The words inside, each once. Returns whether this thread saw an id that is none.
  __device__ __forceinline__ bool gather() const {
    bool wrong = false;
    __syncthreads();  // threads may still be at the row before
    for (int k = group_.thread(); k < words_.K; k += group_.threads()) {
      const std::int64_t at = n_ * args_.K + k, id = args_.ids[at];
      const bool none = id < 0 || id >= args_.V;
      wrong = wrong || (none && id != -1);
      words_.given[k] = none ? -1 : static_cast<std::int32_t>(id);
      words_.q[k] = static_cast<double>(static_cast<const C*>(args_.logprobs)[at]);
    }
    for (int i = group_.thread(); i < words_.bit_words; i += group_.threads()) words_.bits[i] = 0;
    __syncthreads();
    for (int k = group_.thread(); k < words_.K; k += group_.threads()) {
      const int id = words_.given[k];
      bool first = id >= 0;
      for (int other = 0; other < k && first; ++other) first = words_.given[other] != id;
      words_.ids[k] = first ? id : -1;
      if (!first) continue;
      double log_p = words_.q[k];
      for (int other = k + 1; other < words_.K; ++other) {
        if (words_.given[other] == id) log_p = XLSTM_ISA::log_add(log_p, words_.q[other]);
      }
      words_.log_p[k] = log_p;
      const int column = id - static_cast<int>(args_.first), at = column - begin_;
      words_.z[k] = logit(column, n_ * args_.K + k);
      if (at >= 0 && at < vectors_ * kN) atomicOr(words_.bits + at / 32, 1u << at % 32);
    }
    __syncthreads();
    return wrong;
  }

  // Of a word inside, which is the row's `at`-th and may be another process's.
  __device__ __forceinline__ double logit(int column, std::int64_t at) const {
    if (sums_given(args_)) return args_.z_words[at];
    if (column < 0 || column >= args_.V_student) return kMasked<double>;
    const double z = static_cast<double>(student_[column]);
    if (sums_asked(args_) && group_.block() == 0) args_.z_words[at] = z;
    return z;
  }

  // Reads the row, keeps it, and finds its largest.
  __device__ __forceinline__ Tops read(const RowTask& task, bool wrong) const {
    C outside = kMasked<C>;
    read_slices<E>(group_, vectors_, {&student_}, [&](int v, const C(&z)[1][kN]) {
      const unsigned inside = inside_bits(v);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        if (z[0][k] > outside && !(inside >> k & 1)) outside = z[0][k];
      }
    });
    double all[4] = {outside, -kInfinity, -kInfinity, wrong ? 1.0 : 0.0};
    each_word([&](int k) {
      all[1] = words_.z[k] > all[1] ? words_.z[k] : all[1];
      all[2] = words_.log_p[k] > all[2] ? words_.log_p[k] : all[2];
    });
    return group_.reduce(all, Largest{}, [&](const double (&of)[4]) {
      const double z_label = task.label < 0 ? C(0) : student_[static_cast<int>(task.label)];
      return Tops{of[0], of[1], of[2], of[3], z_label};
    });
  }

  static __device__ __forceinline__ double finite(double most) {
    return most == kMasked<double> ? 0 : most;
  }

  // The row's sums, and what they leave to do.
  __device__ __forceinline__ Plan<C> total(const RowTask& task, const Tops& tops) {
    most_ = static_cast<C>(finite(tops.largest()));
    outside_ = static_cast<C>(finite(tops.outside));
    const bool apart = closed() && tops.inside != kMasked<double>;
    most_inside_ = apart ? static_cast<C>(tops.inside) : most_;
    most_log_p_ = finite(tops.log_p / p_temperature_);
    constexpr int kSums = 5 + HardLabel<C>::kSums;
    double all[kSums] = {sums_given(args_) ? C(0) : sum_outside()};
    each_word([&](int k) {
      if (group_.block() != 0) return;  // every block has these
      hard_.add(static_cast<C>(words_.z[k]) - most_);
      all[1] += ::exp(log_e(words_.z[k], most_inside_));
      all[2] += ::exp(words_.log_p[k]);
      all[3] += ::exp(words_.log_p[k] / p_temperature_ - most_log_p_);
      all[4] += 1;
    });
    hard_.get(all + 5);
    return group_.reduce(all, Sum{}, [&](const double (&of)[kSums]) {
      if (sums_given(args_)) return plan(task, tops, args_.sums[n_], of);
      RowSums row;
      row.shift_s = tops.outside * scale_, row.sum_s = of[0];
      HardLabel<C>::put(of + 5, tops.largest(), tops.z_label, row);
      if (sums_asked(args_) && group_.leads()) args_.sums[n_] = row;
      return plan(task, tops, row, of);
    });
  }

  // And adds to the hard-label part's sums.
  __device__ __forceinline__ C sum_outside() {
    C e = 0;
    each_vector([&](int, const C(&z)[kN], unsigned) {
      C part = 0;
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        part += e_outside(z[k]);
        hard_.add(z[k] - most_);
      }
      e += part;
    });
    return e;
  }
  __device__ __forceinline__ C e_outside(C z) const {
    return XLSTM_ISA::exp2((z - outside_) * scale_);
  }
  // The logarithm of what e is relative to `most`.
  __device__ __forceinline__ double log_e(double z, double most) const {
    return kLn2 * ((z - most) * static_cast<double>(scale_));
  }

  __device__ __forceinline__ Plan<C> plan(const RowTask& task, const Tops& tops, const RowSums& row,
                                          const double (&of)[8]) const {
    const double raise = ::exp(log_e(outside_, most_)), outside = row.sum_s;
    const double inside = of[1] * ::exp(log_e(most_inside_, most_));
    const double sum = inside + (outside > 0 || outside != outside ? outside * raise : 0);
    Plan<C> plan{};
    const bool known = teacher(of[2], of[3], of[4], plan);
    const bool nan = sum != sum || plan.rest.p != plan.rest.p;
    plan.fate = nan || tops.wrong > 0 || task.wrong ? Fate::kNaN
                : !(sum > 0) || !known ? Fate::kZero  // wholly masked, or nothing to compare with
                                       : Fate::kComputed;
    if (plan.fate == Fate::kNaN) plan.hard.loss = kNaN;
    if (plan.fate != Fate::kComputed) return plan;
    // What is inside may be far below the row's largest, and is compared all the same.
    plan.q_shift = ::log(closed() ? of[1] : sum);
    plan.part = closed() ? inside / sum : 1;
    plan.outside = raise / sum;
    plan.tail = outside > 0 ? 1 / outside : 0;
    plan.rest.log_q = closed() || outside == 0
                          ? -kInfinity
                          : ::log(outside) + log_e(outside_, most_) - plan.q_shift;
    plan.rest.q = ::exp(plan.rest.log_q);
    plan.hard = HardPart<C>(args_, row, sum, most_, task.scale);
    return plan;
  }

  // The teacher's part of a plan, from its mass inside, the sum of what the temperature makes of it,
  // and the number of words; whether there is any.
  __device__ __forceinline__ bool teacher(double mass, double inside, double count,
                                          Plan<C>& plan) const {
    const C* given = static_cast<const C*>(args_.tail_logmass);
    const double log_mass = given ? static_cast<double>(given[n_]) : XLSTM_ISA::log_left(mass);
    const double words = static_cast<double>(args_.V) - count;
    const double tail =
        with_tail() ? XLSTM_ISA::log_tail(log_mass, words, p_temperature_) : -kInfinity;
    const double most = tail > most_log_p_ || !(inside > 0) ? finite(tail) : most_log_p_;
    // Where there is nothing inside, what it would be relative to does not count.
    const double sum = (inside > 0 || inside != inside ? inside * ::exp(most_log_p_ - most) : 0) +
                       ::exp(tail - most);
    plan.rest.p = sum;
    if (!(sum > 0)) return false;
    plan.p_shift = most + ::log(sum);
    plan.rest.log_p = tail - plan.p_shift;
    plan.rest.p = ::exp(plan.rest.log_p);
    return true;
  }

  // The divergence and its slopes.
  __device__ __forceinline__ Slopes compare(const RowTask& task, const Plan<C>& plan) const {
    const bool truncated = args_.support == Support::kTruncated;
    double all[2] = {};
    each_word([&](int k) {
      Outcome o;
      o.log_p = words_.log_p[k] / p_temperature_ - plan.p_shift;
      o.log_q = words_.z[k] == kMasked<double> ? -kInfinity
                                               : log_e(words_.z[k], most_inside_) - plan.q_shift;
      o.p = ::exp(o.log_p), o.q = ::exp(o.log_q);
      double loss;
      if (truncated) {
        loss = XLSTM_ISA::product(o.p, o.log_p - o.log_q), o.slope = -o.p;
      } else {
        loss = XLSTM_ISA::add_terms(o, args_.divergence, args_.mix);
      }
      words_.log_p[k] = o.slope, words_.q[k] = o.q;
      if (group_.block() == 0) all[0] += loss, all[1] += o.slope;
    });
    return group_.reduce(all, Sum{}, [&](const double (&of)[2]) {
      Slopes slopes{Fate::kComputed, of[0], of[1], 0};
      Outcome rest = plan.rest;
      rest.slope = 0;
      if (!truncated) {
        if (args_.support != Support::kBoth) {
          slopes.divergence += XLSTM_ISA::add_terms(rest, args_.divergence, args_.mix);
        }
        if (slopes.divergence < 0) slopes.divergence = 0;
        slopes.sum += rest.slope;
      }
      const bool infinite = slopes.divergence == kInfinity && args_.kl_weight != 0;
      if (infinite && args_.divergence == Divergence::kReverse) slopes.fate = Fate::kNaN;
      const double kl = task.scale * args_.kl_weight * args_.temperature;
      slopes.outside =
          kl * (rest.slope - rest.q * slopes.sum) * plan.tail + plan.hard.soft * plan.outside;
      return slopes;
    });
  }

  __device__ __forceinline__ void write(const RowTask& task, const Plan<C>& plan,
                                        const Slopes& slopes) const {
    const int label = args_.ce_weight == 0 ? -1 : static_cast<int>(task.label);
    const C b = static_cast<C>(slopes.outside);
    each_vector([&](int v, const C(&z)[kN], unsigned inside) {
      const int at = begin_ + v * kN;
      C g[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        g[k] = plan.hard.finish(e_outside(z[k]) * b, z[k], z[k] - most_, hard_, at + k == label,
                                student_.cap());
      }
      if (inside == 0) return grad_.write(at, g);
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        if (!(inside >> k & 1) && at + k < grad_.V()) grad_.write_one(at + k, g[k]);
      }
    });
    const double kl = task.scale * args_.kl_weight * args_.temperature;
    each_word([&](int k) {
      const int at = words_.ids[k] - static_cast<int>(args_.first);
      if (at < begin_ || at >= begin_ + vectors_ * kN || at >= grad_.V()) return;
      const C z = static_cast<C>(words_.z[k]);
      const double q = words_.q[k], soft = plan.hard.soft * q * plan.part;
      const C g = static_cast<C>(kl * (words_.log_p[k] - q * slopes.sum) + soft);
      const bool masked = z == kMasked<C>;
      grad_.write_one(
          at,
          masked ? C(0) : plan.hard.finish(g, z, z - most_, hard_, at == label, student_.cap()));
    });
  }

  const TopkKlDiv& args_;
  RowGroup& group_;
  const Words& words_;
  const std::int64_t n_;
  const int begin_;
  const Slice<E> student_;
  const Gradient<E> grad_;
  HardLabel<C> hard_;
  const C scale_;
  const double p_temperature_;
  const int vectors_;
  C most_ = 0, outside_ = 0;  // the largest logit of all, and of those outside
  C most_inside_ = 0;         // what is inside is relative to it
  double most_log_p_ = 0;
};

template <class E>
__global__ void __launch_bounds__(kThreads, 1)
    topk_kl_div_kernel(const __grid_constant__ TopkKlDiv args,
                       const __grid_constant__ RowShape shape, RowScale scale) {
  Shared shared;
  RowGroup group(shared, shape.blocks);
  const Words words(shared, args.K, (shape.slice * kCount<E> + 31) / 32);
  Vector* const kept = shared.take<Vector>(shape.kept);
  const std::int64_t N = args.rows[0] * args.rows[1], step = gridDim.x / shape.blocks;
  for (std::int64_t n = blockIdx.x / shape.blocks; n < N; n += step) {
    TopkRow<E>(args, shape, group, words, kept, n).run(scale);
  }
}

template <class E>
void run(const TopkKlDiv& args, RowScale scale, void* stream) {
  const int words = static_cast<int>(args.K) * Words::kBytes + Words::kArrays * 16;
  const RowShape shape = row_shape(row_limits("topk_kl_div", topk_kl_div_kernel<E>), args.V_student,
                                   kCount<E>, {1, 1, RowGroup::kSharedBytes + words});
  launch_rows("topk_kl_div", args, shape, scale, stream, topk_kl_div_kernel<E>);
}

}  // namespace

void topk_kl_div_cuda(const TopkKlDiv& args, void* counted, void* stream) {
  const RowScale scale = row_scale(args, static_cast<double*>(counted), stream);
  dispatch_rows(args.student_dtype,
                [&](auto element) { run<decltype(element)>(args, scale, stream); });
  sum_rows(args, scale, stream);
}

}  // namespace xlstm
