// Softmax KL divergence of a student from a teacher, mixed with hard-label cross-entropy: the loss of
// every row and its gradient by the student's logits, on CPU cores.
//   x = z - max z      e = 2^(x log2(e) / T)      S = sum e      p = e_t / S_t      q = e_s / S_s
//   forward  KL(p|q) = sum p (x_t - x_s) / T + ln(S_s / S_t)     dKL/dz_s = (q - p) / T
//   reverse  KL(q|p) = sum q gap + ln(S_t / S_s)                 dKL/dz_s = q (gap - sum q gap) / T
//                      gap = (x_s - x_t) / T
//   loss = kl_weight T^2 KL + ce_weight CE          CE = ln S - z_label at T = 1, dCE/dz_s = q - onehot
// Source: Hinton et al., arXiv 1503.02531 (T^2). The Bregman form, sum p d + q - p, is exact to second
//   order in the rounding of S_s and S_t; so is this one, which takes S_s - S_t from a sum of its own.
// Tensors: launch.h. One task draws rows; a row is read once, in blocks of kBlock elements that stay
//   in L1, each with a maximum of its own. Its e_s and e_t (reverse: gap) wait in L2 until the row's
//   sums are known. Sums: compute type in a lane of a block, float64 beyond. Masked logits (-inf) are
//   floored at the most negative number: 2^u is 0 there, and 0 times a gap to one is 0.
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/kernels.h"
#include "cpu/kl_div_block.h"

namespace xlstm::XLSTM_ISA {
namespace {

// Blocks are asked of memory this many elements early: two streams of one core at full bandwidth.
constexpr int kAhead = 2048;
// Rows of one draw: enough elements that short rows do not contend for the counter, and a run of rows
// where there are plenty, since a row asks memory for the one after it.
constexpr std::int64_t kDrawElements = 1 << 15, kDrawRows = 8, kDrawsPerThread = 8;

// The sums of a row over its blocks, relative to the row's own largest logit.
struct RowSums {
  double shift_s = -kInfinity, shift_t = -kInfinity, shift_hard = -kInfinity;
  double sum_s = 0, sum_t = 0, excess = 0, gap = 0, sum_hard = 0, stray = -kInfinity;
};

template <class C, Divergence kDivergence>
class Row {
 public:
  Row(const KlDiv& args, std::int64_t blocks)
      : args_(args),
        hard_(second_softmax(args)),
        scale_(static_cast<C>(kLog2E / args.temperature)),
        scratch_(blocks * (sizeof(Block<C>) + (hard_ ? 3 : 2) * kBlock * sizeof(C)) +
                     2 * kBlock * sizeof(C),
                 6),
        blocks_(scratch_.take<Block<C>>(blocks)),
        keep_s_(scratch_.take<C>(blocks * kBlock)),
        keep_t_(scratch_.take<C>(blocks * kBlock)),
        keep_hard_(hard_ ? scratch_.take<C>(blocks * kBlock) : nullptr),
        stage_s_(scratch_.take<C>(kBlock)),
        stage_t_(scratch_.take<C>(kBlock)) {}

  // The unweighted loss of a row; where g is given, `scale` times its gradient goes there.
  double run(const Logits& s, const Logits& t, char* g, std::int64_t label, double scale,
             const Logits& next_s, const Logits& next_t) {
    if (g) {
      read<true>(s, t, next_s, next_t);
    } else {
      read<false>(s, t, next_s, next_t);
    }
    const RowSums sums = total();
    constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
    if (std::isnan(sums.sum_s) || std::isnan(sums.sum_t) || std::isnan(scale)) {
      if (g) fill(s, g, kNaN);
      return kNaN;
    }
    if (!(sums.sum_s > 0 && sums.sum_t > 0)) {  // wholly masked
      if (g) fill(s, g, 0.0);
      return 0;
    }
    const double kl = divergence(sums);
    const double row_loss = loss(s, label, sums, kl);  // before g overwrites s
    if (g == nullptr) return row_loss;
    if (!kForward && std::isinf(kl) && args_.kl_weight != 0) {
      fill(s, g, kNaN);
    } else {
      write(sums, s, g, label, scale);
    }
    return row_loss;
  }

 private:
  static constexpr bool kForward = kDivergence == Divergence::kForward;
  // 2^kLeast is the smallest positive number: below it there is no mass.
  static constexpr double kLeast = std::is_same_v<C, float> ? -150 : -1075;

  static bool second_softmax(const KlDiv& args) {
    return args.ce_weight != 0 && args.temperature != 1;
  }
  std::int64_t width() const {
    return args_.V_student > args_.V_teacher ? args_.V_student : args_.V_teacher;
  }

  template <bool kKeep>
  void read(const Logits& s, const Logits& t, const Logits& next_s, const Logits& next_t) {
    const std::int64_t V = width();
    const int bytes_s = size_of(s.dtype), bytes_t = size_of(t.dtype);
    count_ = (V + kBlock - 1) / kBlock;
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t begin = i * kBlock, left = V - begin;
      const int count = padded(left < kBlock ? static_cast<int>(left) : kBlock);
      const Staged<C> z_s = stage(s, begin, count, stage_s_);
      const Staged<C> z_t = stage(t, begin, count, stage_t_);
      const std::int64_t ahead = begin + kAhead;
      const Ahead next{ahead < V ? s.data + ahead * bytes_s : next_s.data + (ahead - V) * bytes_s,
                       ahead < V ? t.data + ahead * bytes_t : next_t.data + (ahead - V) * bytes_t,
                       bytes_s * kLanes<C>, bytes_t * kLanes<C>};
      add<kKeep>(z_s, z_t, begin, count, next);
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
      add_block<C, kDivergence, kKeep, true>(s.z, t.z, count, block, keep_s_ + begin,
                                             keep_t_ + begin, next);
    } else {
      add_block<C, kDivergence, kKeep, false>(s.z, t.z, count, block, keep_s_ + begin,
                                              keep_t_ + begin, next);
    }
    block.gap *= scale_;
    block.stray = -kInfinity;
    if (kForward && s.least == -kInfinity) block.stray = largest_stray(t, scale_, s, count);
    if (!kForward && t.least == -kInfinity) block.stray = largest_stray(s, scale_, t, count);
    if (hard_) {
      block.hard = Shift<C>(static_cast<C>(kLog2E), s.most);
      add_hard_block<C, kKeep>(s.z, count, block, keep_hard_ + begin);
    }
  }

  RowSums total() const {
    RowSums row;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      row.stray = std::fmax(row.stray, block.stray);
      if (!block.teacher_masked) row.shift_t = std::fmax(row.shift_t, block.teacher.octaves);
      if (block.student_masked) continue;
      row.shift_s = std::fmax(row.shift_s, block.student.octaves);
      if (hard_) row.shift_hard = std::fmax(row.shift_hard, block.hard.octaves);
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      const double drop_s = drop(block.student, block.student_masked, row.shift_s);
      const double drop_t = drop(block.teacher, block.teacher_masked, row.shift_t);
      const double w_s = std::exp2(drop_s), w_t = std::exp2(drop_t);
      row.sum_s += w_s * block.sum_s;
      row.sum_t += w_t * block.sum_t;
      row.excess += w_s * block.excess + (w_s - w_t) * block.sum_t;
      if (kForward && w_t > 0) row.gap += w_t * (block.gap + (drop_t - drop_s) * block.sum_t);
      if (!kForward && w_s > 0) row.gap += w_s * (block.gap + (drop_s - drop_t) * block.sum_s);
      if (hard_) row.sum_hard += block.sum_hard * hard_weight(block, row);
    }
    return row;
  }

  // How far, in octaves, a block's largest logit is below its row's. The sums of a masked block are
  // 0, or NaN where it holds one, whatever the drop.
  static double drop(const Shift<C>& block, bool masked, double row_shift) {
    return masked ? 0 : block.octaves - row_shift;
  }
  static double hard_weight(const Block<C>& block, const RowSums& row) {
    return std::exp2(drop(block.hard, block.student_masked, row.shift_hard));
  }

  double divergence(const RowSums& sums) const {
    if (sums.stray - (kForward ? sums.shift_t : sums.shift_s) > kLeast) return kInfinity;
    const double mean_gap = sums.gap / (kForward ? sums.sum_t : sums.sum_s);
    const double more = kForward ? sums.excess / sums.sum_t : -sums.excess / sums.sum_s;
    const double ratio = kForward ? sums.sum_s / sums.sum_t : sums.sum_t / sums.sum_s;
    const double kl =
        kLn2 * mean_gap + (std::fabs(more) < 0.5 ? std::log1p(more) : std::log(ratio));
    return kl < 0 ? 0 : kl;
  }

  double loss(const Logits& s, std::int64_t label, const RowSums& sums, double kl) const {
    const double T = args_.temperature;
    double sum = args_.kl_weight == 0 ? 0 : args_.kl_weight * T * T * kl;
    if (args_.ce_weight != 0) {
      const C scale = hard_ ? static_cast<C>(kLog2E) : scale_;
      const double u = s.at<double>(label) * scale - (hard_ ? sums.shift_hard : sums.shift_s);
      sum += args_.ce_weight * (std::log(hard_ ? sums.sum_hard : sums.sum_s) - kLn2 * u);
    }
    return sum;
  }

  void write(const RowSums& sums, const Logits& s, char* g, std::int64_t label, double scale) {
    const double mean_gap = sums.gap / sums.sum_s;
    const double kl = scale * args_.kl_weight * args_.temperature, ce = scale * args_.ce_weight;
    const double soft = hard_ ? 0 : ce;  // at T = 1 the same softmax serves the hard label
    for (std::int64_t i = 0; i * kBlock < s.V; ++i) {
      const Block<C>& block = blocks_[i];
      const double drop_s = drop(block.student, block.student_masked, sums.shift_s);
      const double drop_t = drop(block.teacher, block.teacher_masked, sums.shift_t);
      const double f_s = std::exp2(drop_s), f_t = std::exp2(drop_t);
      const double w_s = f_s / sums.sum_s, w_t = f_t / sums.sum_t;
      double a, b;
      if (kForward) {
        // w_s - w_t, from what is exact where the two are nearly equal.
        const double apart = (f_s - f_t - w_t * sums.excess) / sums.sum_s;
        a = kl * w_t;
        b = kl * apart + soft * w_s;
      } else {
        a = kl * w_s * kLn2 * scale_;
        b = kl * w_s * kLn2 * (drop_s - drop_t - mean_gap) + soft * w_s;
      }
      const double c = hard_ ? ce * hard_weight(block, sums) / sums.sum_hard : 0;
      write(i * kBlock, s, g, static_cast<C>(a), static_cast<C>(b), static_cast<C>(c),
            args_.ce_weight != 0 ? label : -1, static_cast<C>(ce));
    }
  }

  // One block of the gradient; `ce` comes off the label's element before rounding.
  void write(std::int64_t begin, const Logits& s, char* g, C a, C b, C c, std::int64_t label,
             C ce) {
    const std::int64_t left = s.V - begin;
    const int count = left < kBlock ? static_cast<int>(left) : kBlock;
    const bool labelled = label >= begin && label < begin + count;
    dispatch_dtype(s.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_same_v<compute_t<T>, C>) {
        T* out = reinterpret_cast<T*>(g) + begin;
        const C *e_s = keep_s_ + begin, *e_t = keep_t_ + begin;
        if (count == kBlock && !hard_ && !labelled) {
          if (args_.grad != args_.student && reinterpret_cast<std::uintptr_t>(out) % 64 == 0) {
            write_block<T, kDivergence, true>(e_s, e_t, kBlock, a, b, out);
          } else {
            write_block<T, kDivergence, false>(e_s, e_t, kBlock, a, b, out);
          }
          return;
        }
        write_block<C, kDivergence, false>(e_s, e_t, padded(count), a, b, stage_s_);
        if (hard_) {
          for (int j = 0; j < count; ++j) stage_s_[j] += keep_hard_[begin + j] * c;
        }
        if (labelled) stage_s_[label - begin] -= ce;
        for (int j = 0; j < count; j += kLanes<C>) {
          store(out + j, load(static_cast<const C*>(stage_s_ + j)),
                count - j < kLanes<C> ? count - j : kLanes<C>);
        }
      }
    });
  }

  static int padded(int count) { return (count + kStep<C> - 1) / kStep<C> * kStep<C>; }

  const KlDiv& args_;
  const bool hard_;
  const C scale_;
  Scratch scratch_;
  Block<C>* blocks_;
  C *keep_s_, *keep_t_, *keep_hard_, *stage_s_, *stage_t_;
  std::int64_t count_ = 0;
};

bool ignored(const KlDiv& args, std::int64_t n) {
  return args.labels && args.labels[n] == args.ignore_index;
}

// Factor of the reduction, and a check of the labels on the way.
double reduction_scale(const KlDiv& args) {
  const std::int64_t N = args.rows[0] * args.rows[1];
  std::int64_t valid = 0;
  for (std::int64_t n = 0; n < N; ++n) {
    if (ignored(args, n)) continue;
    ++valid;
    if (args.labels && (args.labels[n] < 0 || args.labels[n] >= args.V_student)) {
      throw std::invalid_argument(
          "kl_div: labels must be in [0, " + std::to_string(args.V_student) +
          ") or ignore_index = " + std::to_string(args.ignore_index) + ", got " +
          std::to_string(args.labels[n]) + " at row " + std::to_string(n));
    }
  }
  if (args.reduction == Reduction::kMean) return valid > 0 ? 1.0 / valid : 0.0;
  if (args.reduction == Reduction::kBatchMean) return N > 0 ? 1.0 / N : 0.0;
  return 1.0;
}

// Rows of one call. Workers draw them from one counter; nothing but row_loss and grad is shared.
template <class C, Divergence kDivergence>
class Rows {
 public:
  explicit Rows(const KlDiv& args)
      : args_(args),
        N_(args.rows[0] * args.rows[1]),
        widest_(args.V_student > args.V_teacher ? args.V_student : args.V_teacher),
        draw_(rows_per_draw()),
        scale_(reduction_scale(args)) {}

  void run() {
    const std::int64_t draws = (N_ + draw_ - 1) / draw_, threads = num_threads();
    parallel_for(threads < draws ? threads : draws, [this](std::int64_t) { work(); });
    if (args_.loss == nullptr) return;
    double sum = 0;  // in the order of rows, whatever the threads did
    for (std::int64_t n = 0; n < N_; ++n) sum += static_cast<const C*>(args_.row_loss)[n];
    *static_cast<C*>(args_.loss) = static_cast<C>(N_ > 0 ? sum * scale_ : 0.0);
  }

 private:
  std::int64_t rows_per_draw() const {
    const std::int64_t share = N_ / (kDrawsPerThread * num_threads());
    const std::int64_t rows = share < kDrawRows ? share : kDrawRows;
    const std::int64_t shortest = (kDrawElements + widest_ - 1) / widest_;
    return rows > shortest ? rows : shortest;
  }

  void work() {
    Row<C, kDivergence> row(args_, (widest_ + kBlock - 1) / kBlock);
    for (;;) {
      const std::int64_t begin = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED) * draw_;
      if (begin >= N_) break;
      const std::int64_t end = begin + draw_ < N_ ? begin + draw_ : N_;
      for (std::int64_t n = begin; n < end; ++n) {
        static_cast<C*>(args_.row_loss)[n] = static_cast<C>(loss(row, n));
      }
    }
    stream_fence();
  }

  double loss(Row<C, kDivergence>& row, std::int64_t n) const {
    const C weight = args_.row_weight ? static_cast<const C*>(args_.row_weight)[n] : C(1);
    char* g = args_.grad ? static_cast<char*>(args_.grad) +
                               offset(args_.grad_stride, args_.student_dtype, n)
                         : nullptr;
    if (weight == 0 || ignored(args_, n)) {
      if (g) fill(student(n), g, 0.0);
      return 0;
    }
    const std::int64_t after = n + 1 < N_ ? n + 1 : n;
    return weight * row.run(student(n), teacher(n), g, args_.labels ? args_.labels[n] : 0,
                            weight * scale_, student(after), teacher(after));
  }

  std::int64_t offset(const std::int64_t (&stride)[2], DType dtype, std::int64_t n) const {
    return (n / args_.rows[1] * stride[0] + n % args_.rows[1] * stride[1]) * size_of(dtype);
  }
  Logits student(std::int64_t n) const {
    return {args_.student_dtype, args_.V_student,
            static_cast<const char*>(args_.student) +
                offset(args_.student_stride, args_.student_dtype, n)};
  }
  Logits teacher(std::int64_t n) const {
    return {args_.teacher_dtype, args_.V_teacher,
            static_cast<const char*>(args_.teacher) +
                offset(args_.teacher_stride, args_.teacher_dtype, n)};
  }

  const KlDiv& args_;
  const std::int64_t N_, widest_, draw_;
  const double scale_;
  std::int64_t next_ = 0;
};

template <class C>
void run(const KlDiv& args) {
  if (args.divergence == Divergence::kForward) {
    Rows<C, Divergence::kForward>(args).run();
  } else {
    Rows<C, Divergence::kReverse>(args).run();
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
