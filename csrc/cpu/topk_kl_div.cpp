// Divergence of a student's softmax from a teacher that is known by K of its words, mixed with
// hard-label cross-entropy: the loss of every row and its gradient by the student's logits, on CPU cores.
//   inside: the words that came, their masses added up    outside: all the others, with the mass r
//   a = mass^(1/T), A = n (r / n)^(1/T) for n words outside, total = sum a + A
//   p = a / total inside, A / total for the outside as one outcome; q likewise from the student
//   D(p, q) over these outcomes, its slopes q h: cpu/kl_div_mixture.h
//   dD/dz = (slope - q sum slopes) / T inside; outside the same of that outcome, times a word's part of it
//   supports without a tail leave A, or the student outside, out of it; launch.h
// Source: arXiv 2603.15590, Eq. 13; arXiv 2503.16870.
// Tensors: launch.h. One task draws rows. A row is read once, in blocks; in a copy of a block in L1 the
//   words inside are masked, so that what is outside is summed by itself and never as a difference. The
//   outcomes inside are few, and in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/kl_div_rows.h"
#include "cpu/kl_div_student.h"
#include "cells/outcome.h"

namespace xlstm::XLSTM_ISA {
namespace {

constexpr int kAhead = 2048;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A word inside.
struct Word : Outcome {
  std::int64_t id;
  double z;
};

// A block of what is outside.
template <class C>
struct Outside {
  Shift<C> shift;
  bool masked;
  double sum;
};

template <class C, bool kFloor>
double sum_block(const C* z, int count, const Shift<C>& shift, C* keep, const char* ahead,
                 int ahead_step) {
  Vec<C> sum[2] = {};
  for (int j = 0; j < count; j += 2 * kLanes<C>) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int k = j + i * kLanes<C>;
      prefetch(ahead += ahead_step);
      const Vec<C> e = shift.template exp<kFloor>(shift.template x<kFloor>(load(z + k)));
      sum[i] += e;
      store(keep + k, e);
    }
  }
  return sum_in_double(sum[0], sum[1]);
}

template <class C>
class Row {
 public:
  Row(const TopkKlDiv& args, std::int64_t blocks)
      : args_(args),
        scale_(static_cast<C>(kLog2E / args.temperature)),
        student_(args, blocks),
        scratch_(blocks * (sizeof(Outside<C>) + kBlock * sizeof(C)) + 2 * kBlock * sizeof(C), 4),
        blocks_(scratch_.take<Outside<C>>(blocks)),
        keep_(scratch_.take<C>(blocks * kBlock)),
        stage_(scratch_.take<C>(kBlock)),
        masked_(scratch_.take<C>(kBlock)) {
    inside_.reserve(args.K);
    order_.reserve(args.K);
  }

  double run(std::int64_t n, std::int64_t next, char* g, double scale) {
    const Logits s = student_at(args_, n);
    const bool given = args_.phase == Phase::kLoss;
    const std::int64_t label = args_.labels ? args_.labels[n] : 0;
    gather(n, given);
    if (g || !given) read(s, student_at(args_, next));
    const RowSums sums = given ? args_.sums[n] : add_blocks(s, label);
    if (args_.phase == Phase::kSums) {
      args_.sums[n] = sums;
      tell_words(n);
      return 0;
    }
    total(sums);
    const bool known = teacher(n);
    if (std::isnan(sum_) || !std::isfinite(scale) || std::isnan(tail_.p)) {
      if (g) fill(args_.grad_dtype, s.V, g, kNaN);
      return kNaN;
    }
    if (!(sum_ > 0) || !known) {  // wholly masked, or no mass to compare with
      if (g) fill(args_.grad_dtype, s.V, g, 0.0);
      return 0;
    }
    student_.total(sums, shift_, sum_);
    const double D = divergence(), T = args_.temperature;
    double loss = args_.kl_weight == 0 ? 0 : args_.kl_weight * T * T * D;
    if (args_.ce_weight != 0) loss += args_.ce_weight * student_.cross_entropy();
    if (g == nullptr) return loss;
    if (args_.divergence == Divergence::kReverse && std::isinf(D) && args_.kl_weight != 0) {
      fill(args_.grad_dtype, s.V, g, kNaN);
    } else {
      write(s, g, label, scale);
    }
    return loss;
  }

 private:
  bool with_tail() const {
    return args_.support == Support::kTail || args_.support == Support::kTruncated;
  }

  // The words inside, each once, by id; log_p is the logarithm of their mass, z given for all or none.
  void gather(std::int64_t n, bool given) {
    const std::int64_t* ids = args_.ids + n * args_.K;
    const C* logprobs = static_cast<const C*>(args_.logprobs) + n * args_.K;
    order_.clear(), inside_.clear();
    for (std::int64_t k = 0; k < args_.K; ++k) {
      if (ids[k] >= 0) order_.push_back(static_cast<std::uint64_t>(ids[k]) << 32 | k);
    }
    std::sort(order_.begin(), order_.end());
    for (const std::uint64_t word : order_) {
      const std::int64_t id = static_cast<std::int64_t>(word >> 32);
      const std::int64_t k = word & 0xffffffff;
      const double log_p = static_cast<double>(logprobs[k]);
      if (inside_.empty() || inside_.back().id != id) {
        inside_.push_back({{log_p, 0, 0, 0, 0}, id, given ? args_.z_words[n * args_.K + k] : 0});
      } else {
        inside_.back().log_p = log_add(inside_.back().log_p, log_p);
      }
    }
  }

  void tell_words(std::int64_t n) const {
    std::size_t i = 0;
    for (const std::uint64_t word : order_) {
      if (inside_[i].id != static_cast<std::int64_t>(word >> 32)) ++i;
      args_.z_words[n * args_.K + (word & 0xffffffff)] = inside_[i].z;
    }
  }

  // Whether an id's logit is among these columns.
  bool held(std::int64_t id) const {
    return id >= args_.first && id < args_.first + args_.V_student;
  }

  void read(const Logits& s, const Logits& next) {
    const int bytes = size_of(s.dtype);
    count_ = (s.V + kBlock - 1) / kBlock;
    std::size_t word = 0;
    while (word < inside_.size() && inside_[word].id < args_.first) ++word;
    for (std::int64_t i = 0; i < count_; ++i) {
      const std::int64_t begin = i * kBlock, ahead = begin + kAhead;
      const int count = padded<C>(size_of_block(s.V - begin));
      const Staged<C> all = stage(s, begin, count, stage_);
      student_.template add<true>(all, begin, count);
      const Staged<C> rest = mask(all, begin, count, word);
      Outside<C>& block = blocks_[i];
      block.shift = Shift<C>(scale_, rest.most);
      block.masked = rest.most == kMasked<C>;
      const char* prefetched =
          ahead < s.V ? s.data + ahead * bytes : next.data + (ahead - s.V) * bytes;
      const auto sum =
          block.shift.needs_floor(rest.least) ? sum_block<C, true> : sum_block<C, false>;
      block.sum = sum(rest.z, count, block.shift, keep_ + begin, prefetched, bytes * kLanes<C>);
    }
  }

  // Takes the words inside out of a block, from the `word`-th on.
  Staged<C> mask(const Staged<C>& all, std::int64_t begin, int count, std::size_t& word) {
    const std::int64_t end = args_.first + std::min(begin + kBlock, args_.V_student);
    const auto here = [&] { return word < inside_.size() && inside_[word].id < end; };
    if (!here()) return all;
    std::memcpy(masked_, all.z, count * sizeof(C));
    for (; here(); ++word) {
      C& z = masked_[inside_[word].id - args_.first - begin];
      inside_[word].z = static_cast<double>(z);
      z = kMasked<C>;
    }
    return restage(static_cast<const C*>(masked_), count, masked_, [](Vec<C> z) { return z; });
  }

  // The student's sums of what is outside; shifts are octaves of the largest logit.
  RowSums add_blocks(const Logits& s, std::int64_t label) const {
    RowSums sums;
    for (std::int64_t i = 0; i < count_; ++i) {
      if (!blocks_[i].masked) sums.shift_s = std::fmax(sums.shift_s, blocks_[i].shift.octaves);
    }
    for (std::int64_t i = 0; i < count_; ++i) {
      sums.sum_s += blocks_[i].sum * weight(blocks_[i], sums.shift_s);
    }
    student_.add_to(sums, s, count_, label);
    return sums;
  }

  // Of the whole row, from those of what is outside.
  void total(const RowSums& sums) {
    shift_ = tail_shift_ = sums.shift_s, tail_sum_ = sums.sum_s;
    const double scale = static_cast<double>(scale_);
    double shift_inside = -kInfinity;
    for (const Word& o : inside_) {
      if (o.z != -kInfinity) shift_inside = std::fmax(shift_inside, o.z * scale);
    }
    shift_ = std::fmax(shift_, shift_inside);
    // Of the distribution that is compared: the whole row, or what is inside, however far below.
    const bool closed = args_.support == Support::kBoth;
    const double shift = closed && shift_inside != -kInfinity ? shift_inside : shift_;
    double inside = 0;
    for (Word& o : inside_) {
      o.log_q = o.z == -kInfinity ? -kInfinity : kLn2 * (o.z * scale - shift);
      inside += o.q = std::exp(o.log_q);
    }
    const double inside_of_row = shift == shift_ ? inside : inside * std::exp2(shift - shift_);
    sum_ = tail_sum_ > 0 || std::isnan(tail_sum_)
               ? inside_of_row + tail_sum_ * std::exp2(tail_shift_ - shift_)
               : inside_of_row;
    const double compared = closed ? inside : sum_, log_sum = std::log(compared);
    for (Word& o : inside_) {
      if (o.z == -kInfinity) continue;
      o.log_q -= log_sum;
      o.q /= compared;
    }
    part_ = closed ? inside_of_row / sum_ : 1;
    tail_.log_q = closed || tail_sum_ == 0
                      ? -kInfinity
                      : std::log(tail_sum_) + kLn2 * (tail_shift_ - shift_) - log_sum;
    tail_.q = std::exp(tail_.log_q);
  }

  // The teacher's p; whether it has any mass. NaN is left in tail_.p.
  bool teacher(std::int64_t n) {
    const double T = args_.support == Support::kSampled ? 1 : args_.temperature;
    double mass = 0, most = -kInfinity, sum = 0;
    for (Word& o : inside_) {
      if (with_tail() && args_.tail_logmass == nullptr) mass += std::exp(o.log_p);
      o.log_p /= T;
      if (o.log_p > most) most = o.log_p;
    }
    const C* given = static_cast<const C*>(args_.tail_logmass);
    const double log_mass = given ? static_cast<double>(given[n]) : log_left(mass);
    const double words = static_cast<double>(args_.V - std::int64_t(inside_.size()));
    tail_.log_p = with_tail() ? log_tail(log_mass, words, T) : -kInfinity;
    if (tail_.log_p > most) most = tail_.log_p;
    if (most == -kInfinity) most = 0;
    // Less the largest: powers of 1 / T underflow, and weights of samples may be of any size.
    for (Word& o : inside_) sum += o.p = std::exp(o.log_p -= most);
    sum += tail_.p = std::exp(tail_.log_p -= most);
    if (!(sum > 0)) {
      tail_.p = std::isnan(sum) ? kNaN : 0;
      return false;
    }
    const double log_sum = std::log(sum);
    for (Word& o : inside_) o.log_p -= log_sum, o.p /= sum;
    tail_.p /= sum, tail_.log_p -= log_sum;
    return true;
  }

  double divergence() {
    double loss = 0, slopes = 0, mass = 0;
    if (args_.support == Support::kTruncated) {
      for (const Word& o : inside_) loss += product(o.p, o.log_p - o.log_q), mass += o.p;
      for (Word& o : inside_) o.slope = mass * o.q - o.p;
      tail_.slope = mass * tail_.q;
      return loss;
    }
    for (Word& o : inside_) {
      loss += add_terms(o, args_.divergence, args_.mix);
      slopes += o.slope;
    }
    if (args_.support == Support::kBoth) {
      tail_.slope = 0;
    } else {
      loss += add_terms(tail_, args_.divergence, args_.mix);
      slopes += tail_.slope;
      tail_.slope -= tail_.q * slopes;
    }
    for (Word& o : inside_) o.slope -= o.q * slopes;
    return loss < 0 ? 0 : loss;
  }

  void write(const Logits& s, char* g, std::int64_t label, double scale) {
    const double kl = scale * args_.kl_weight * args_.temperature, soft = student_.soft(scale);
    const double tail = tail_sum_ > 0 ? kl * tail_.slope / tail_sum_ : 0;
    const double hard = soft * std::exp2(tail_shift_ - shift_) / sum_;
    for (std::int64_t begin = 0; begin < s.V; begin += kBlock) {
      const Outside<C>& block = blocks_[begin / kBlock];
      const C b = static_cast<C>(block.masked ? 0 : (tail + hard) * weight(block, tail_shift_));
      const C* e = keep_ + begin;
      student_.template write<Form::kAlone>(begin, s, g, e, e, C(0), b, scale, label);
    }
    for (const Word& o : inside_) {
      if (!held(o.id)) continue;
      const std::int64_t column = o.id - args_.first;
      double part = kl * o.slope + student_.own(scale, column);
      if (o.z == -kInfinity) {
        part = 0;
      } else {
        part += soft * o.q * part_ - student_.word_share(scale);
        if (column == label && args_.ce_weight != 0) part -= student_.label_share(scale);
        const double t = args_.softcap == 0 ? 0 : o.z / args_.softcap;
        part *= 1 - t * t;
      }
      store_one(g, column, part);
    }
  }

  void store_one(char* g, std::int64_t index, double value) const {
    dispatch_dtype(args_.grad_dtype, [&](auto element) {
      using T = decltype(element);
      const auto v = broadcast<Vec<compute_t<T>>>(static_cast<compute_t<T>>(value));
      store(reinterpret_cast<T*>(g) + index, v, 1);
    });
  }

  static double weight(const Outside<C>& block, double shift) {
    return block.masked ? 1 : std::exp2(block.shift.octaves - shift);
  }

  const TopkKlDiv& args_;
  const C scale_;
  Student<C> student_;
  Scratch scratch_;
  Outside<C>* blocks_;
  C *keep_, *stage_, *masked_;
  std::vector<std::uint64_t> order_;  // id, and its place in the row
  std::vector<Word> inside_;
  Outcome tail_{};
  double shift_ = 0, sum_ = 0, tail_shift_ = 0, tail_sum_ = 0;
  double part_ = 1;  // of the row, what is compared
  std::int64_t count_ = 0;
};

void check_ids(const TopkKlDiv& args) {
  const std::int64_t N = args.rows[0] * args.rows[1];
  for (std::int64_t n = 0; n < N; ++n) {
    for (std::int64_t k = 0; k < args.K; ++k) {
      const std::int64_t id = args.ids[n * args.K + k];
      if (id >= -1 && id < args.V) continue;
      throw std::invalid_argument("topk_kl_div: topk_ids must be in [0, " + std::to_string(args.V) +
                                  ") or -1 for none, got " + std::to_string(id) + " at row " +
                                  std::to_string(n));
    }
  }
}

}  // namespace

void topk_kl_div(const TopkKlDiv& args) {
  check_ids(args);
  if (args.student_dtype == DType::kFloat64) {
    Rows<double, Row<double>, TopkKlDiv>(args, args.V_student, "topk_kl_div").run();
  } else {
    Rows<float, Row<float>, TopkKlDiv>(args, args.V_student, "topk_kl_div").run();
  }
}

}  // namespace xlstm::XLSTM_ISA
