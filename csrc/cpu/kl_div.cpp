// Divergence of a student's softmax from a teacher's, mixed with hard-label cross-entropy: the loss of
// every row and its gradient by the student's logits, on CPU cores.
//   x = z - max z      e = 2^(x log2(e) / T)      S = sum e      p = e_t / S_t      q = e_s / S_s
//   forward  KL(p|q) = sum p (x_t - x_s) / T + ln(S_s / S_t)     dKL/dz_s = (q - p) / T
//   reverse  KL(q|p) = sum q gap + ln(S_t / S_s)                 dKL/dz_s = q (gap - sum q gap) / T
//                      gap = (x_s - x_t) / T
//   the others: cpu/kl_div_mixture.h                             D' = (q h - q sum q h) / T
//   loss = kl_weight T^2 D + ce_weight CE          CE: cpu/kl_div_student.h
// Source: Hinton et al., arXiv 1503.02531 (T^2). The Bregman form, sum p d + q - p, is exact to second
//   order in the rounding of S_s and S_t; so is this one, which takes S_s - S_t from a sum of its own.
// Tensors: launch.h. One task draws rows; a row is read once, in blocks of kBlock elements that stay
//   in L1, each with a maximum of its own. Its e_s and e_t (reverse: gap) wait in L2 until the row's
//   sums are known. Sums: compute type in a lane of a block, float64 beyond. Masked logits (-inf) are
//   floored at the most negative number: 2^u is 0 there, and 0 times a gap to one is 0.
#include <cmath>
#include <limits>

#include "common/integers.h"
#include "cpu/kernels.h"
#include "cpu/kl_div_mixture.h"
#include "cpu/kl_div_rows.h"
#include "cpu/kl_div_student.h"

namespace xlstm::XLSTM_ISA {
namespace {

// Blocks are asked of memory this many elements early: two streams of one core at full bandwidth.
constexpr int kAhead = 2048;

template <class C, Divergence kDivergence>
class Row {
 public:
  Row(const KlDiv& args, std::int64_t blocks)
      : args_(args),
        scale_(static_cast<C>(kLog2E / args.temperature)),
        by_{static_cast<C>(args.mix), static_cast<C>(1 - args.mix),
            static_cast<C>(std::log(1 - args.mix)), false},
        student_(args, blocks),
        scratch_(blocks * (sizeof(Block<C>) + 2 * kBlock * sizeof(C)) + 2 * kBlock * sizeof(C), 5),
        blocks_(scratch_.take<Block<C>>(blocks)),
        keep_s_(scratch_.take<C>(blocks * kBlock)),
        keep_t_(scratch_.take<C>(blocks * kBlock)),
        stage_s_(scratch_.take<C>(kBlock)),
        stage_t_(scratch_.take<C>(kBlock)) {}

  double run(std::int64_t n, std::int64_t next, char* g, double scale) {
    const Logits s = student_at(args_, n), t = teacher_at(n);
    const Phase phase = args_.phase;
    const bool given = phase == Phase::kMixed || phase == Phase::kLoss;
    const std::int64_t label = args_.labels ? args_.labels[n] : 0;
    if (g || (kMixed && phase != Phase::kSums && phase != Phase::kLoss)) {
      read<true>(s, t, student_at(args_, next), teacher_at(next));
    } else if (!given) {  // the loss itself is in the sums
      read<false>(s, t, student_at(args_, next), teacher_at(next));
    }
    RowSums sums = given ? args_.sums[n] : total(s, label);
    if (phase == Phase::kSums) {
      args_.sums[n] = sums;
      return 0;
    }
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    if (std::isnan(sums.sum_s) || std::isnan(sums.sum_t) || !std::isfinite(scale)) {
      if (g) fill(args_.grad_dtype, s.V, g, kNaN);
      return kNaN;
    }
    if (!(sums.sum_s > 0 && sums.sum_t > 0)) {  // wholly masked
      if (g) fill(args_.grad_dtype, s.V, g, 0.0);
      return 0;
    }
    student_.total(sums, sums.shift_s, sums.sum_s);
    if constexpr (kMixed) {
      mix(sums, g != nullptr);
      if (phase == Phase::kMixed) {
        args_.sums[n] = sums;
        return 0;
      }
    }
    const double D = divergence(sums), row_loss = loss(D);
    if (g == nullptr) return row_loss;
    if (kReverse && std::isinf(D) && args_.kl_weight != 0) {
      fill(args_.grad_dtype, s.V, g, kNaN);
    } else {
      write(sums, s, g, label, scale);
    }
    return row_loss;
  }

 private:
  static constexpr Form kForm = form_of(kDivergence);
  static constexpr bool kForward = kDivergence == Divergence::kForward;
  static constexpr bool kReverse = kDivergence == Divergence::kReverse;
  static constexpr bool kMixed = !kForward && !kReverse;
  // 2^kLeast is the smallest positive number: below it there is no mass.
  static constexpr double kLeast = std::is_same_v<C, float> ? -150 : -1075;

  Logits teacher_at(std::int64_t n) const {
    return {args_.teacher_dtype, args_.V_teacher,
            row_at(args_.teacher, args_.teacher_stride, args_.teacher_dtype, args_, n),
            args_.teacher_softcap};
  }

  template <bool kKeep>
  void read(const Logits& s, const Logits& t, const Logits& next_s, const Logits& next_t) {
    const std::int64_t V = s.V > t.V ? s.V : t.V;
    const int bytes_s = size_of(s.dtype), bytes_t = size_of(t.dtype);
    count_ = ceil_div(V, kBlock);
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t begin = i * kBlock;
      const int count = padded<C>(size_of_block(V - begin));
      const Staged<C> z_s = stage(s, begin, count, stage_s_);
      const Staged<C> z_t = stage(t, begin, count, stage_t_);
      const std::int64_t ahead = begin + kAhead;
      const Ahead next{ahead < V ? s.data + ahead * bytes_s : next_s.data + (ahead - V) * bytes_s,
                       ahead < V ? t.data + ahead * bytes_t : next_t.data + (ahead - V) * bytes_t,
                       bytes_s * kLanes<C>, bytes_t * kLanes<C>};
      add<kKeep>(z_s, z_t, begin, count, next);
      student_.template add<kKeep>(z_s, begin, count);
    }
  }

  template <bool kKeep>
  void add(const Staged<C>& s, const Staged<C>& t, std::int64_t begin, int count, Ahead next) {
    Block<C>& block = blocks_[begin / kBlock];
    block.student = Shift<C>(scale_, s.most);
    block.teacher = Shift<C>(scale_, t.most);
    block.student_masked = s.most == -kInfinity;
    block.teacher_masked = t.most == -kInfinity;
    if (block.student.needs_floor(s.least) || block.teacher.needs_floor(t.least)) {
      add_block<C, kForm, kKeep, true>(s.z, t.z, count, block, keep_s_ + begin, keep_t_ + begin,
                                       next);
    } else {
      add_block<C, kForm, kKeep, false>(s.z, t.z, count, block, keep_s_ + begin, keep_t_ + begin,
                                        next);
    }
    block.gap *= scale_;
    block.stray = -kInfinity;
    if (kForward && s.least == -kInfinity) block.stray = largest_stray(t, scale_, s, count);
    if (kReverse && t.least == -kInfinity) block.stray = largest_stray(s, scale_, t, count);
  }

  RowSums total(const Logits& s, std::int64_t label) const {
    RowSums row;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      row.stray = std::fmax(row.stray, block.stray);
      if (!block.teacher_masked) row.shift_t = std::fmax(row.shift_t, block.teacher.octaves);
      if (!block.student_masked) row.shift_s = std::fmax(row.shift_s, block.student.octaves);
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      const double drop_s = drop(block.student, block.student_masked, row.shift_s);
      const double drop_t = drop(block.teacher, block.teacher_masked, row.shift_t);
      const double w_s = std::exp2(drop_s), w_t = std::exp2(drop_t);
      row.sum_s += w_s * block.sum_s;
      row.sum_t += w_t * block.sum_t;
      row.excess += w_s * block.excess + (w_s - w_t) * block.sum_t;
      if (!kReverse && w_t > 0) row.gap += w_t * (block.gap + (drop_t - drop_s) * block.sum_t);
      if (kReverse && w_s > 0) row.gap += w_s * (block.gap + (drop_s - drop_t) * block.sum_s);
    }
    student_.add_to(row, s, count_, label);
    return row;
  }

  // How far, in octaves, a block's largest logit is below its row's. The sums of a masked block are
  // 0, or NaN where it holds one, whatever the drop.
  static double drop(const Shift<C>& block, bool masked, double row_shift) {
    return masked ? 0 : block.octaves - row_shift;
  }

  Weights weights(std::int64_t i, const RowSums& sums) const {
    const Block<C>& block = blocks_[i];
    return {sums, drop(block.student, block.student_masked, sums.shift_s),
            drop(block.teacher, block.teacher_masked, sums.shift_t)};
  }

  // The mixture's part of the sums, unless they have it already, and slopes where e_t was.
  void mix(RowSums& sums, bool keep) {
    const bool known = args_.phase == Phase::kLoss;
    if (known && !keep) return;
    RowSums own = sums;
    keep ? mix_blocks<true>(own) : mix_blocks<false>(own);
    if (!known) sums = own;
  }
  template <bool kKeep>
  void mix_blocks(RowSums& sums) {
    const std::int64_t V = args_.V_student > args_.V_teacher ? args_.V_student : args_.V_teacher;
    by_.far = !(plain_divergence(sums, false) < 1);  // about where most of q has little of p
    for (std::int64_t i = 0; i < count_; ++i) {
      const Weights by = weights(i, sums);
      mix_block<C, kDivergence, kKeep>(keep_s_ + i * kBlock, keep_t_ + i * kBlock,
                                       padded<C>(size_of_block(V - i * kBlock)),
                                       static_cast<C>(by.s), static_cast<C>(by.t),
                                       static_cast<C>(by.apart), by_, sums.mixed, sums.slope);
    }
  }

  double divergence(const RowSums& sums) const {
    if (kMixed) return sums.mixed;
    if (sums.stray - (kForward ? sums.shift_t : sums.shift_s) > kLeast) return kInfinity;
    return plain_divergence(sums, kReverse);
  }

  double loss(double D) const {
    const double T = args_.temperature;
    double sum = args_.kl_weight == 0 ? 0 : args_.kl_weight * T * T * D;
    if (args_.ce_weight != 0) sum += args_.ce_weight * student_.cross_entropy();
    return sum;
  }

  void write(const RowSums& sums, const Logits& s, char* g, std::int64_t label, double scale) {
    const double kl = scale * args_.kl_weight * args_.temperature, soft = student_.soft(scale);
    for (std::int64_t begin = 0; begin < s.V; begin += kBlock) {
      const Weights by = weights(begin / kBlock, sums);
      const Coefficients to(kForm, sums, by, kl, scale_);
      student_.template write<kForm>(begin, s, g, keep_s_ + begin, keep_t_ + begin,
                                     static_cast<C>(to.a), static_cast<C>(to.b + soft * by.s),
                                     scale, label);
    }
  }

  const KlDiv& args_;
  const C scale_;
  Mixture<C> by_;
  Student<C> student_;
  Scratch scratch_;
  Block<C>* blocks_;
  C *keep_s_, *keep_t_, *stage_s_, *stage_t_;
  std::int64_t count_ = 0;
};

template <class C, Divergence kDivergence>
void run_rows(const KlDiv& args) {
  const std::int64_t widest = args.V_student > args.V_teacher ? args.V_student : args.V_teacher;
  Rows<C, Row<C, kDivergence>, KlDiv>(args, widest, "kl_div").run();
}

template <class C>
void run(const KlDiv& args) {
  switch (args.divergence) {
    case Divergence::kForward:
      return run_rows<C, Divergence::kForward>(args);
    case Divergence::kReverse:
      return run_rows<C, Divergence::kReverse>(args);
    case Divergence::kJs:
      return run_rows<C, Divergence::kJs>(args);
    case Divergence::kSkew:
      return run_rows<C, Divergence::kSkew>(args);
    case Divergence::kSkewReverse:
      return run_rows<C, Divergence::kSkewReverse>(args);
    case Divergence::kTv:
      return run_rows<C, Divergence::kTv>(args);
  }
}

}  // namespace

void kl_div(const KlDiv& args) {
  if (args.student_dtype == DType::kFloat64) {
    run<double>(args);
  } else {
    run<float>(args);
  }
}

}  // namespace xlstm::XLSTM_ISA
