// Divergence of a student's softmax from a teacher's, mixed with hard-label cross-entropy: the loss of
// every row and its gradient by the student's logits.
//   the equations of cpu/kl_div.cpp, a row being one block there; cells/kl_div.h, cells/mixture.h
// Source: Hinton et al., arXiv 1503.02531 (T^2).
// Tensors: launch.h. A row pair is read once and kept in shared memory: passes find its largest logits,
//   its sums, for mixtures the divergence, and write the gradient. What does not fit is read again.
// Grid: a block, or a cluster of blocks, a row (row_shape()); sums of a thread in the compute type, of
//   all threads float64; nothing saved.
#include "cells/mixture.h"
#include "cuda/row_loss.h"

namespace xlstm {
namespace {

using XLSTM_ISA::Form;
using XLSTM_ISA::kInfinity;
using XLSTM_ISA::kMasked;

// The largest logits of a row.
struct Tops {
  double student, teacher, z_label;
};

// What sums of a row leave to do.
template <class C>
struct Plan {
  Fate fate;
  bool far;
  double w_s, w_t, apart;  // e to p and q
  double log_rest, divergence;
  HardPart<C> hard;
  C a, b;  // of gradient()
};

__host__ __device__ __forceinline__ std::int64_t widest(const KlDiv& args) {
  return args.V_student > args.V_teacher ? args.V_student : args.V_teacher;
}

template <class E>
class KlDivRow {
 public:
  using C = typename Row<E>::C;
  static constexpr int kN = Row<E>::kN;

  __device__ __forceinline__ KlDivRow(const KlDiv& args, const RowShape& shape, RowGroup& group,
                                      Vector* kept, std::int64_t n)
      : args_(args),
        group_(group),
        n_(n),
        begin_(group.block() * shape.slice * kN),
        student_({args.student, args.student_dtype, args.V_student, args.student_stride, args, n},
                 begin_, args.softcap, kept, shape.kept),
        teacher_({args.teacher, args.teacher_dtype, args.V_teacher, args.teacher_stride, args, n},
                 begin_, args.teacher_softcap, kept + shape.kept, shape.kept),
        grad_(args, n),
        hard_(args),
        scale_(static_cast<C>(XLSTM_ISA::kLog2E / args.temperature)),
        vectors_(slice_vectors(widest(args), begin_, kN, shape.slice)) {}

  __device__ __forceinline__ void run(const RowScale& by) {
    const RowTask task(args_, by, n_, C(1));
    Fate fate = Fate::kZero;
    double loss = 0;
    if (!task.skipped) {
      Tops tops = read(task);
      if (sums_given(args_)) {
        const RowSums& row = args_.sums[n_];
        tops = {row.shift_s / scale_, row.shift_t / scale_, row.z_label};
      }
      most_s_ = finite(tops.student), most_t_ = finite(tops.teacher);
      Plan<C> plan = total(task, tops);
      if (sums_asked(args_)) return;
      if (plan.fate == Fate::kComputed && mixed()) plan = mix(task, plan);
      fate = plan.fate;
      const double T = args_.temperature;
      loss = plan.hard.loss;
      if (args_.kl_weight != 0) loss += args_.kl_weight * T * T * plan.divergence;
      if (fate == Fate::kComputed && args_.grad) write(task, plan);
    }
    if (fate != Fate::kComputed && args_.grad) fill_slice(grad_, fate, group_, begin_, vectors_);
    if (group_.leads()) static_cast<C*>(args_.row_loss)[n_] = static_cast<C>(task.weight * loss);
  }

 private:
  __device__ __forceinline__ bool mixed() const {
    return args_.divergence != Divergence::kForward && args_.divergence != Divergence::kReverse;
  }
  static __device__ __forceinline__ C finite(double most) {
    return most == kMasked<double> ? C(0) : static_cast<C>(most);
  }

  template <class F>
  __device__ __forceinline__ void each_vector(F f) const {
    for (int v = group_.thread(); v < vectors_; v += group_.threads()) {
      C s[kN], t[kN];
      student_.fetch(v, s), teacher_.fetch(v, t);
      f(v, s, t);
    }
  }

  // Reads the row pair, keeps it, and finds its largest logits.
  __device__ __forceinline__ Tops read(const RowTask& task) {
    C most[2] = {kMasked<C>, kMasked<C>};
    read_slices<E>(group_, vectors_, {&student_, &teacher_}, [&](int, const C(&z)[2][kN]) {
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        most[0] = z[0][k] > most[0] ? z[0][k] : most[0];
        most[1] = z[1][k] > most[1] ? z[1][k] : most[1];
      }
    });
    double all[2] = {most[0], most[1]};
    return group_.reduce(all, Largest{}, [&](const double (&tops)[2]) {
      // The label's logit now: another block may soon write a gradient there.
      const C z_label = task.label < 0 ? C(0) : student_[static_cast<int>(task.label)];
      return Tops{tops[0], tops[1], static_cast<double>(z_label)};
    });
  }

  // The row's sums, and what they leave to do.
  __device__ __forceinline__ Plan<C> total(const RowTask& task, const Tops& tops) {
    C sums[4] = {};  // e_s, e_t, their difference, the gap
    if (!sums_given(args_)) sum(sums);
    constexpr int kSums = 4 + HardLabel<C>::kSums;
    double all[kSums] = {sums[0], sums[1], sums[2], sums[3]};
    hard_.get(all + 4);
    return group_.reduce(all, Sum{}, [&](const double (&of)[kSums]) {
      if (sums_given(args_)) return plan(task, args_.sums[n_]);
      RowSums row;
      row.shift_s = tops.student * scale_, row.shift_t = tops.teacher * scale_;
      row.sum_s = of[0], row.sum_t = of[1], row.excess = of[2];
      row.gap = of[3] * scale_;
      HardLabel<C>::put(of + 4, tops.student, tops.z_label, row);
      if (sums_asked(args_) && group_.leads()) args_.sums[n_] = row;
      return plan(task, row);
    });
  }

  // And adds to the hard-label part's sums.
  __device__ __forceinline__ void sum(C (&sums)[4]) {
    const bool reverse = args_.divergence == Divergence::kReverse;
    each_vector([&](int, const C(&s)[kN], const C(&t)[kN]) {
      C part[4] = {};
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const C x_s = s[k] - most_s_, x_t = t[k] - most_t_;
        const C e_s = XLSTM_ISA::exp2(x_s * scale_), e_t = XLSTM_ISA::exp2(x_t * scale_);
        const C weight = reverse ? e_s : e_t, gap = reverse ? x_s - x_t : x_t - x_s;
        part[0] += e_s, part[1] += e_t, part[2] += e_s - e_t;
        // Infinite where the other is masked; where there is no mass, nothing.
        part[3] += weight > 0 ? weight * gap : C(0);
        hard_.add(x_s);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] += part[i];
    });
  }

  __device__ __forceinline__ Plan<C> plan(const RowTask& task, const RowSums& row) const {
    const bool reverse = args_.divergence == Divergence::kReverse;
    Plan<C> plan{};
    const bool nan = row.sum_s != row.sum_s || row.sum_t != row.sum_t;
    plan.fate = nan || task.wrong                   ? Fate::kNaN
                : !(row.sum_s > 0 && row.sum_t > 0) ? Fate::kZero  // wholly masked
                                                    : Fate::kComputed;
    if (plan.fate == Fate::kNaN) plan.hard.loss = kNaN;
    if (plan.fate != Fate::kComputed) return plan;
    const XLSTM_ISA::Weights by(row, 0, 0);
    plan.w_s = by.s, plan.w_t = by.t, plan.apart = by.apart;
    plan.hard = HardPart<C>(args_, row, row.sum_s, most_s_, task.scale);
    plan.divergence = XLSTM_ISA::plain_divergence(row, reverse);
    plan.far = !(plan.divergence < 1);  // about where most of q has little of p
    plan.log_rest = ::log(1 - args_.mix);
    if (mixed()) return plan;
    if (reverse && plan.divergence == kInfinity && args_.kl_weight != 0) plan.fate = Fate::kNaN;
    const double kl = task.scale * args_.kl_weight * args_.temperature;
    const XLSTM_ISA::Coefficients to(XLSTM_ISA::form_of(args_.divergence), row, by, kl, scale_);
    plan.a = static_cast<C>(to.a), plan.b = static_cast<C>(to.b + plan.hard.soft * by.s);
    return plan;
  }

  // An element's part of the divergence that needs p and q, and its slope q h.
  template <Divergence kDivergence>
  __device__ __forceinline__ XLSTM_ISA::Terms<C> mixture(const Plan<C>& plan, C e_s, C e_t) const {
    const C w_s = static_cast<C>(plan.w_s), w_t = static_cast<C>(plan.w_t);
    const C d = (e_t - e_s) * w_t - e_s * static_cast<C>(plan.apart);
    const C mix = static_cast<C>(args_.mix), rest = static_cast<C>(1 - args_.mix);
    return XLSTM_ISA::terms<kDivergence>(e_t * w_t, e_s * w_s, d,
                                         {mix, rest, static_cast<C>(plan.log_rest), plan.far});
  }

  template <class F>
  __device__ __forceinline__ void with_mixture(F f) const {
    switch (args_.divergence) {
      case Divergence::kJs:
        return f(std::integral_constant<Divergence, Divergence::kJs>{});
      case Divergence::kSkew:
        return f(std::integral_constant<Divergence, Divergence::kSkew>{});
      case Divergence::kSkewReverse:
        return f(std::integral_constant<Divergence, Divergence::kSkewReverse>{});
      default:
        return f(std::integral_constant<Divergence, Divergence::kTv>{});
    }
  }

  __device__ __forceinline__ Plan<C> mix(const RowTask& task, const Plan<C>& plan) const {
    if (args_.phase == Phase::kLoss) return with_mixture_sums(task, plan, args_.sums[n_]);
    C loss = 0, slope = 0;
    with_mixture([&](auto divergence) {
      each_vector([&](int, const C(&s)[kN], const C(&t)[kN]) {
        C part[2] = {};
#pragma unroll
        for (int k = 0; k < kN; ++k) {
          const C e_s = XLSTM_ISA::exp2((s[k] - most_s_) * scale_);
          const C e_t = XLSTM_ISA::exp2((t[k] - most_t_) * scale_);
          const XLSTM_ISA::Terms<C> term = mixture<decltype(divergence)::value>(plan, e_s, e_t);
          part[0] += term.loss, part[1] += term.slope;
        }
        loss += part[0], slope += part[1];
      });
    });
    double all[2] = {loss, slope};
    return group_.reduce(all, Sum{}, [&](const double (&of)[2]) {
      RowSums row;
      row.mixed = of[0], row.slope = of[1];
      if (args_.phase == Phase::kMixed && group_.leads()) {
        args_.sums[n_].mixed = row.mixed, args_.sums[n_].slope = row.slope;
      }
      return with_mixture_sums(task, plan, row);
    });
  }
  __device__ __forceinline__ Plan<C> with_mixture_sums(const RowTask& task, Plan<C> plan,
                                                       const RowSums& row) const {
    plan.divergence = row.mixed;
    const double kl = task.scale * args_.kl_weight * args_.temperature;
    plan.a = static_cast<C>(kl);
    plan.b = static_cast<C>((plan.hard.soft - kl * row.slope) * plan.w_s);
    return plan;
  }

  __device__ __forceinline__ void write(const RowTask& task, const Plan<C>& plan) const {
    if (args_.divergence == Divergence::kForward) {
      return write_as<Form::kDifference>(task, plan, [](C, C, C, C e_t) { return e_t; });
    }
    if (args_.divergence == Divergence::kReverse) {
      // A masked one as a number: times no mass it is nothing, where -inf would be NaN.
      return write_as<Form::kGap>(task, plan,
                                  [](C x_s, C x_t, C, C) { return floored(x_s) - floored(x_t); });
    }
    with_mixture([&](auto divergence) {
      write_as<Form::kSlope>(task, plan, [&](C, C, C e_s, C e_t) {
        return mixture<decltype(divergence)::value>(plan, e_s, e_t).slope;
      });
    });
  }
  static __device__ __forceinline__ C floored(C x) {
    return x < XLSTM_ISA::kFloor<C> ? XLSTM_ISA::kFloor<C> : x;
  }

  template <Form kForm, class Keep>
  __device__ __forceinline__ void write_as(const RowTask& task, const Plan<C>& plan,
                                           Keep keep) const {
    const int label = args_.ce_weight == 0 ? -1 : static_cast<int>(task.label);
    each_vector([&](int v, const C(&s)[kN], const C(&t)[kN]) {
      const int at = begin_ + v * kN;
      C g[kN];
#pragma unroll
      for (int k = 0; k < kN; ++k) {
        const C x_s = s[k] - most_s_, x_t = t[k] - most_t_;
        const C e_s = XLSTM_ISA::exp2(x_s * scale_), e_t = XLSTM_ISA::exp2(x_t * scale_);
        const C soft = XLSTM_ISA::gradient<kForm>(e_s, keep(x_s, x_t, e_s, e_t), plan.a, plan.b);
        g[k] = plan.hard.finish(soft, s[k], x_s, hard_, at + k == label, student_.cap());
      }
      grad_.write(at, g);
    });
  }

  const KlDiv& args_;
  RowGroup& group_;
  const std::int64_t n_;
  const int begin_;
  const Slice<E> student_, teacher_;
  const Gradient<E> grad_;
  HardLabel<C> hard_;
  const C scale_;
  const int vectors_;
  C most_s_ = 0, most_t_ = 0;
};

template <class E>
__global__ void __launch_bounds__(kMaxThreads<E>, 1)
    kl_div_kernel(const __grid_constant__ KlDiv args, const __grid_constant__ RowShape shape,
                  RowScale scale) {
  Shared shared;
  RowGroup group(shared, shape.blocks);
  Vector* const kept = shared.take<Vector>(2 * shape.kept);
  const std::int64_t N = args.rows[0] * args.rows[1], step = gridDim.x / shape.blocks;
  for (std::int64_t n = blockIdx.x / shape.blocks; n < N; n += step) {
    KlDivRow<E>(args, shape, group, kept, n).run(scale);
  }
}

template <class E>
void run(const KlDiv& args, RowScale scale, void* stream) {
  const RowShape shape = row_shape(row_limits("kl_div", kl_div_kernel<E>), widest(args), kCount<E>,
                                   {2, 0, RowGroup::kSharedBytes});
  launch_rows("kl_div", args, shape, scale, stream, kl_div_kernel<E>);
}

}  // namespace

void kl_div_cuda(const KlDiv& args, void* counted, void* stream) {
  const RowScale scale = row_scale(args, static_cast<double*>(counted), stream);
  if (args.student_dtype != args.teacher_dtype && args.student_dtype != DType::kFloat64) {
    run<Any<float>>(args, scale, stream);
  } else {
    dispatch_rows(args.student_dtype,
                  [&](auto element) { run<decltype(element)>(args, scale, stream); });
  }
  sum_rows(args, scale, stream);
}

}  // namespace xlstm
