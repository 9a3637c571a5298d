// Softmax KL divergence of a student from a teacher, mixed with hard-label cross-entropy: the loss of
// every row and its gradient by the student's logits, on CPU cores.
//   u = (z - max z) log2(e) / T      e = 2^u      S = sum e      p = e_t / S_t      q = e_s / S_s
//   forward  KL(p|q) = ln2 sum p (u_t - u_s) + ln(S_s / S_t)     dKL/dz_s = (q - p) / T
//   reverse  KL(q|p) = ln2 sum q (u_s - u_t) + ln(S_t / S_s)     dKL/dz_s = q (gap - sum q gap) / T
//   loss = kl_weight T^2 KL + ce_weight CE          CE = ln S - z_label at T = 1, dCE/dz_s = q - onehot
// Source: Hinton et al., arXiv 1503.02531 (T^2). The usual Bregman form, sum p d + q - p, equals this
//   one when the logarithms see the very sums that normalise p and q; here both are float64.
// Tensors: launch.h. One task draws rows; a row is read once, in blocks of kBlock elements that stay
//   in L1, each with a maximum of its own. Its e_s and e_t (reverse: gap) wait in L2 until the row's
//   sums are known. Sums: compute type in a block, float64 across blocks. Masked logits (-inf) are
//   floored at the most negative number: 2^u is 0 there, and a gap to one is finite but huge.
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/simd.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/kernels.h"

namespace xlstm::XLSTM_ISA {
namespace {

constexpr int kBlock = 1024;
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Elements that one draw of rows covers, so that short rows do not contend for the counter.
constexpr std::int64_t kDrawElements = 1 << 15;

// One unrolled step: this many elements are a block's granularity.
template <class C>
constexpr int kStep = 4 * kLanes<C>;
// A gap above this touched a masked logit. A teacher mass below 1e-23 on it passes for zero.
template <class C>
constexpr double kMaskedGap = sizeof(C) == 4 ? 1e15 : 1e200;
// Fused, z * scale - shift rounds once; otherwise z - max is taken first, which is exact nearby.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// What u subtracts: `max` is the largest logit, 0 where all are masked.
template <class C>
struct Shift {
  C scale, max, shift;
  Shift() = default;
  Shift(C scale, C largest)
      : scale(scale),
        max(std::isinf(largest) && largest < 0 ? C(0) : largest),
        shift(max * scale) {}
  double value() const { return kFused ? shift : static_cast<double>(max) * scale; }
  XLSTM_HD Vec<C> operator()(Vec<C> z) const {
    const Vec<C> u = kFused ? z * scale - shift : (z - max) * scale;
    return maximum(broadcast<Vec<C>>(std::numeric_limits<C>::lowest()), u);  // NaN stays
  }
};

template <class C>
struct Block {
  Shift<C> student, teacher, hard;
  bool student_masked, teacher_masked;
  double sum_s, sum_t, gap, sum_hard;
};

template <class T, class C>
C scalar(const T* p) {
  return static_cast<C>(load(p, 1, T{})[0]);
}

// Elements [begin, begin + padded) of a row in the compute type, -inf beyond its end; the row itself
// where it is that already.
template <class T, class C>
const C* stage(const T* row, std::int64_t V, std::int64_t begin, int padded, C* buffer) {
  const std::int64_t left = V - begin;
  const int count = left < 0 ? 0 : left < padded ? static_cast<int>(left) : padded;
  int j = 0;
  if constexpr (std::is_same_v<T, C>) {
    if (count == padded) return row + begin;
  }
  if constexpr (std::is_same_v<compute_t<T>, C>) {
    for (; j + kLanes<C> <= count; j += kLanes<C>) store(buffer + j, load(row + begin + j));
  }
  for (; j < count; ++j) buffer[j] = scalar<T, C>(row + begin + j);
  for (; j < padded; ++j) buffer[j] = -std::numeric_limits<C>::infinity();
  return buffer;
}

// NaN is passed over: it shows in the sums.
template <class C>
C largest(const C* z, int count) {
  Vec<C> most[4];
  for (int i = 0; i < 4; ++i) most[i] = broadcast<Vec<C>>(-std::numeric_limits<C>::infinity());
  for (int j = 0; j < count; j += kStep<C>) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) most[i] = maximum(load(z + j + i * kLanes<C>), most[i]);
  }
  const Vec<C> all = maximum(maximum(most[0], most[1]), maximum(most[2], most[3]));
  C result = all[0];
  for (int lane = 1; lane < kLanes<C>; ++lane) result = all[lane] > result ? all[lane] : result;
  return result;
}

// Adds the block's sums; keeps e_s and e_t, or e_s and u_s - u_t for the reverse divergence.
template <class C, Divergence kDivergence, bool kKeep>
void add_block(const C* s, const C* t, int count, Block<C>& block, C* keep_s, C* keep_t) {
  const Shift<C> student = block.student, teacher = block.teacher;
  constexpr int kUnroll = 2;
  Vec<C> sum_s[kUnroll] = {}, sum_t[kUnroll] = {}, gap[kUnroll] = {};
  for (int j = 0; j < count; j += kUnroll * kLanes<C>) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) {
      const int k = j + i * kLanes<C>;
      const Vec<C> u_s = student(load(s + k)), u_t = teacher(load(t + k));
      const Vec<C> e_s = exp2_nonpositive(u_s), e_t = exp2_nonpositive(u_t);
      sum_s[i] += e_s;
      sum_t[i] += e_t;
      if constexpr (kDivergence == Divergence::kForward) {
        gap[i] += e_t * (u_t - u_s);
        if constexpr (kKeep) store(keep_t + k, e_t);
      } else {
        const Vec<C> difference = u_s - u_t;
        gap[i] += e_s * difference;
        if constexpr (kKeep) store(keep_t + k, difference);
      }
      if constexpr (kKeep) store(keep_s + k, e_s);
    }
  }
  block.sum_s = horizontal_sum(sum_s[0] + sum_s[1]);
  block.sum_t = horizontal_sum(sum_t[0] + sum_t[1]);
  block.gap = horizontal_sum(gap[0] + gap[1]);
}

// The student's softmax at temperature 1, when the divergence has another one.
template <class C, bool kKeep>
void add_hard_block(const C* s, int count, Block<C>& block, C* keep) {
  const Shift<C> hard = block.hard;
  Vec<C> sum[4] = {};
  for (int j = 0; j < count; j += kStep<C>) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Vec<C> e = exp2_nonpositive(hard(load(s + j + i * kLanes<C>)));
      sum[i] += e;
      if constexpr (kKeep) store(keep + j + i * kLanes<C>, e);
    }
  }
  block.sum_hard = horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Gradient of one block from what add_block kept.
//   forward  g = (e_s - e_t) a + e_s b      reverse  g = e_s (gap a + b)
template <class C, Divergence kDivergence>
XLSTM_HD Vec<C> gradient(Vec<C> e_s, Vec<C> kept, C a, C b) {
  if constexpr (kDivergence == Divergence::kForward) {
    return (e_s - kept) * a + e_s * b;  // exactly 0 where student and teacher agree: then b is 0
  } else {
    return e_s * (kept * a + b);
  }
}

template <class T, Divergence kDivergence, class C>
void write_block(const C* keep_s, const C* keep_t, int count, C a, C b, T* g) {
  for (int j = 0; j < count; j += kStep<C>) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int k = j + i * kLanes<C>;
      store(g + k, gradient<C, kDivergence>(load(keep_s + k), load(keep_t + k), a, b));
    }
  }
}

template <class T, class C>
void fill(T* row, std::int64_t V, C value) {
  std::int64_t j = 0;
  const Vec<C> values = broadcast<Vec<C>>(value);
  for (; j + kLanes<C> <= V; j += kLanes<C>) store(row + j, values);
  store(row + j, values, static_cast<int>(V - j));
}

// The sums of a row over its blocks, each relative to the row's own largest logit.
struct RowSums {
  double shift_s = -kInfinity, shift_t = -kInfinity, shift_hard = -kInfinity;
  double sum_s = 0, sum_t = 0, gap = 0, sum_hard = 0;
};

double weight(double shift, double row_shift) { return std::exp2(shift - row_shift); }

template <class C>
class Row {
 public:
  Row(const KlDiv& args, bool hard, Scratch& scratch, std::int64_t blocks)
      : args_(args),
        hard_(hard),
        scale_(static_cast<C>(kLog2E / args.temperature)),
        blocks_(scratch.take<Block<C>>(blocks)),
        keep_s_(scratch.take<C>(blocks * kBlock)),
        keep_t_(scratch.take<C>(blocks * kBlock)),
        keep_hard_(hard ? scratch.take<C>(blocks * kBlock) : nullptr),
        stage_s_(scratch.take<C>(kBlock)),
        stage_t_(scratch.take<C>(kBlock)) {}

  static std::size_t scratch_bytes(bool hard, std::int64_t blocks) {
    const std::size_t kept = (hard ? 3 : 2) * blocks * kBlock * sizeof(C);
    return kept + blocks * sizeof(Block<C>) + 2 * kBlock * sizeof(C);
  }

  // The unweighted loss of row n; where args.grad is set, `scale` times its gradient.
  template <class S, class T, Divergence kDivergence>
  double run(const S* s, const T* t, S* g, std::int64_t label, double scale) {
    const bool grad = g != nullptr;
    if (grad) {
      read<S, T, kDivergence, true>(s, t);
    } else {
      read<S, T, kDivergence, false>(s, t);
    }
    const RowSums sums = total<kDivergence>();
    if (std::isnan(sums.sum_s) || std::isnan(sums.sum_t)) {
      if (grad) fill<S, C>(g, args_.V_student, std::numeric_limits<C>::quiet_NaN());
      return std::numeric_limits<double>::quiet_NaN();
    }
    if (!(sums.sum_s > 0 && sums.sum_t > 0)) {  // wholly masked
      if (grad) fill<S, C>(g, args_.V_student, 0);
      return 0;
    }
    const double kl = divergence<kDivergence>(sums);
    const double row_loss = loss(s, label, sums, kl);  // before g overwrites s
    if (grad) {
      if (kDivergence == Divergence::kReverse && std::isinf(kl) && args_.kl_weight != 0) {
        fill<S, C>(g, args_.V_student, std::numeric_limits<C>::quiet_NaN());
      } else {
        write<S, kDivergence>(sums, g, label, scale);
      }
    }
    return row_loss;
  }

 private:
  std::int64_t width() const {
    return args_.V_student > args_.V_teacher ? args_.V_student : args_.V_teacher;
  }

  template <class S, class T, Divergence kDivergence, bool kKeep>
  void read(const S* s, const T* t) {
    const std::int64_t V = width();
    Block<C>* block = blocks_;
    for (std::int64_t begin = 0; begin < V; begin += kBlock, ++block) {
      const std::int64_t left = V - begin;
      const int count =
          left >= kBlock ? kBlock : static_cast<int>((left + kStep<C> - 1) / kStep<C>) * kStep<C>;
      const C* z_s = stage<S, C>(s, args_.V_student, begin, count, stage_s_);
      const C* z_t = stage<T, C>(t, args_.V_teacher, begin, count, stage_t_);
      const C most_s = largest(z_s, count), most_t = largest(z_t, count);
      block->student = Shift<C>(scale_, most_s);
      block->teacher = Shift<C>(scale_, most_t);
      block->student_masked = most_s == -std::numeric_limits<C>::infinity();
      block->teacher_masked = most_t == -std::numeric_limits<C>::infinity();
      add_block<C, kDivergence, kKeep>(z_s, z_t, count, *block, keep_s_ + begin, keep_t_ + begin);
      if (hard_) {
        block->hard = Shift<C>(static_cast<C>(kLog2E), most_s);
        add_hard_block<C, kKeep>(z_s, count, *block, keep_hard_ + begin);
      }
    }
    count_ = block - blocks_;
  }

  template <Divergence kDivergence>
  RowSums total() const {
    RowSums row;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      if (!block.student_masked) row.shift_s = std::fmax(row.shift_s, block.student.value());
      if (!block.teacher_masked) row.shift_t = std::fmax(row.shift_t, block.teacher.value());
      if (hard_ && !block.student_masked)
        row.shift_hard = std::fmax(row.shift_hard, block.hard.value());
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      const double drop_s = block.student.value() - row.shift_s;
      const double drop_t = block.teacher.value() - row.shift_t;
      // A masked block's sums are 0, or NaN when it holds one.
      const double w_s = block.student_masked ? 1 : std::exp2(drop_s);
      const double w_t = block.teacher_masked ? 1 : std::exp2(drop_t);
      row.sum_s += w_s * block.sum_s;
      row.sum_t += w_t * block.sum_t;
      if (hard_) row.sum_hard += weight(block.hard.value(), row.shift_hard) * block.sum_hard;
      const double apart = block.student_masked || block.teacher_masked ? 0 : drop_t - drop_s;
      if constexpr (kDivergence == Divergence::kForward) {
        row.gap += w_t * (block.gap + apart * block.sum_t);
      } else {
        row.gap += w_s * (block.gap - apart * block.sum_s);
      }
    }
    return row;
  }

  template <Divergence kDivergence>
  double divergence(const RowSums& sums) const {
    constexpr bool kForward = kDivergence == Divergence::kForward;
    const double mean_gap = sums.gap / (kForward ? sums.sum_t : sums.sum_s);
    if (mean_gap > kMaskedGap<C>) return kInfinity;
    const double ratio = kForward ? sums.sum_s / sums.sum_t : sums.sum_t / sums.sum_s;
    return std::fmax(kLn2 * mean_gap + std::log(ratio), 0.0);
  }

  template <class S>
  double loss(const S* s, std::int64_t label, const RowSums& sums, double kl) const {
    const double T = args_.temperature;
    double sum = args_.kl_weight == 0 ? 0 : args_.kl_weight * T * T * kl;
    if (args_.ce_weight != 0) {
      const C scale = hard_ ? static_cast<C>(kLog2E) : scale_;
      const double u = static_cast<double>(scalar<S, C>(s + label)) * scale -
                       (hard_ ? sums.shift_hard : sums.shift_s);
      sum += args_.ce_weight * (std::log(hard_ ? sums.sum_hard : sums.sum_s) - kLn2 * u);
    }
    return sum;
  }

  template <class S, Divergence kDivergence>
  void write(const RowSums& sums, S* g, std::int64_t label, double scale) {
    const double kl = scale * args_.kl_weight * args_.temperature;
    const double ce = scale * args_.ce_weight;
    const double soft = hard_ ? 0 : ce;  // the same softmax serves the hard label
    const double mean_gap = sums.gap / sums.sum_s;
    for (std::int64_t i = 0; i < count_; ++i) {
      const Block<C>& block = blocks_[i];
      const std::int64_t begin = i * kBlock;
      const std::int64_t left = args_.V_student - begin;
      if (left <= 0) break;
      const double drop_s = block.student_masked ? 0 : block.student.value() - sums.shift_s;
      const double drop_t = block.teacher_masked ? 0 : block.teacher.value() - sums.shift_t;
      const double w_s = std::exp2(drop_s) / sums.sum_s, w_t = std::exp2(drop_t) / sums.sum_t;
      C a, b;
      if constexpr (kDivergence == Divergence::kForward) {
        a = static_cast<C>(kl * w_t);
        b = static_cast<C>((kl + soft) * w_s - kl * w_t);
      } else {
        a = static_cast<C>(kl * w_s * kLn2);
        b = static_cast<C>(kl * w_s * kLn2 * (drop_s - drop_t - mean_gap) + soft * w_s);
      }
      const std::int64_t hit = args_.ce_weight != 0 ? label - begin : -1;
      const bool labelled = hit >= 0 && hit < kBlock;
      if (left >= kBlock && !hard_ && !labelled) {
        write_block<S, kDivergence>(keep_s_ + begin, keep_t_ + begin, kBlock, a, b, g + begin);
        continue;
      }
      const int count = left >= kBlock ? kBlock : static_cast<int>(left);
      const int padded = (count + kStep<C> - 1) / kStep<C> * kStep<C>;
      write_block<C, kDivergence>(keep_s_ + begin, keep_t_ + begin, padded, a, b, stage_s_);
      if (hard_) {
        const C c =
            static_cast<C>(ce * weight(block.hard.value(), sums.shift_hard) / sums.sum_hard);
        for (int j = 0; j < padded; ++j) stage_s_[j] += keep_hard_[begin + j] * c;
      }
      if (labelled) stage_s_[hit] -= static_cast<C>(ce);
      for (int j = 0; j < count; j += kLanes<C>) {
        store(g + begin + j, load(static_cast<const C*>(stage_s_ + j)),
              count - j < kLanes<C> ? count - j : kLanes<C>);
      }
    }
  }

  const KlDiv& args_;
  const bool hard_;
  const C scale_;
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

template <class S, class T, Divergence kDivergence>
void run(const KlDiv& args) {
  using C = compute_t<S>;
  const std::int64_t widest = args.V_student > args.V_teacher ? args.V_student : args.V_teacher;
  const std::int64_t blocks = (widest + kBlock - 1) / kBlock;
  const std::int64_t N = args.rows[0] * args.rows[1];
  const bool hard = args.ce_weight != 0 && args.temperature != 1;
  const C* row_weight = static_cast<const C*>(args.row_weight);
  const std::int64_t draw = kDrawElements / widest > 1 ? kDrawElements / widest : 1;
  const std::int64_t draws = (N + draw - 1) / draw;
  const double scale = reduction_scale(args);
  std::int64_t next = 0;
  const auto address = [&](const auto* base, const std::int64_t (&stride)[2], std::int64_t n) {
    return base + (n / args.rows[1]) * stride[0] + (n % args.rows[1]) * stride[1];
  };
  const auto worker = [&](std::int64_t) {
    Scratch scratch(Row<C>::scratch_bytes(hard, blocks), 6);
    Row<C> row(args, hard, scratch, blocks);
    for (;;) {
      const std::int64_t begin = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) * draw;
      if (begin >= N) return;
      const std::int64_t end = begin + draw < N ? begin + draw : N;
      for (std::int64_t n = begin; n < end; ++n) {
        const C weight = row_weight ? row_weight[n] : C(1);
        const std::int64_t label = args.labels ? args.labels[n] : 0;
        S* g = args.grad
                   ? const_cast<S*>(address(static_cast<const S*>(args.grad), args.grad_stride, n))
                   : nullptr;
        double loss = 0;
        if (weight == 0 || ignored(args, n)) {
          if (g) std::memset(static_cast<void*>(g), 0, sizeof(S) * args.V_student);
        } else {
          loss = weight * row.template run<S, T, kDivergence>(
                              address(static_cast<const S*>(args.student), args.student_stride, n),
                              address(static_cast<const T*>(args.teacher), args.teacher_stride, n),
                              g, label, weight * scale);
        }
        static_cast<C*>(args.row_loss)[n] = static_cast<C>(loss);
      }
    }
  };
  const std::int64_t threads = num_threads();
  parallel_for(threads < draws ? threads : draws, worker);
  if (args.loss) {
    double sum = 0;  // in the order of rows, whatever the threads did
    for (std::int64_t n = 0; n < N; ++n) sum += static_cast<const C*>(args.row_loss)[n];
    *static_cast<C*>(args.loss) = static_cast<C>(N > 0 ? sum * scale : 0.0);
  }
}

}  // namespace

void kl_div(const KlDiv& args) {
  dispatch_dtype(args.student_dtype, [&](auto student) {
    dispatch_dtype(args.teacher_dtype, [&](auto teacher) {
      using S = decltype(student);
      using T = decltype(teacher);
      if (args.divergence == Divergence::kForward) {
        run<S, T, Divergence::kForward>(args);
      } else {
        run<S, T, Divergence::kReverse>(args);
      }
    });
  });
}

}  // namespace xlstm::XLSTM_ISA
