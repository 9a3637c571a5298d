// What every loss over rows of student logits does with the student alone: the hard-label part, and
// writing the gradient. Of a row's logits z, at temperature 1, with L = ln sum exp(z):
//   CE = L - (1 - s) z_label - s mean z + zeta L^2       mean over what is not masked
//   dCE/dz = (1 + 2 zeta L) softmax(z) - (1 - s) onehot - s / words
// With a softcap these z, and the divergence's, are c tanh(x / c), and dz/dx = 1 - (z / c)^2.
#pragma once

#include "common/scratch.h"
#include "cpu/kl_div_block.h"

namespace xlstm::XLSTM_ISA {

template <class C>
class Student {
 public:
  Student(const RowLoss& args, std::int64_t blocks)
      : args_(args),
        own_(args.ce_weight != 0 && args.temperature != 1),
        smooth_(args.ce_weight != 0 && args.label_smoothing != 0),
        scratch_(blocks * (sizeof(Hard) + (own_ ? kBlock : 0) * sizeof(C)) + 2 * kBlock * sizeof(C),
                 4),
        hard_(scratch_.take<Hard>(blocks)),
        keep_(own_ ? scratch_.take<C>(blocks * kBlock) : nullptr),
        stage_(scratch_.take<C>(kBlock)),
        again_(scratch_.take<C>(kBlock)) {}

  template <bool kKeep>
  void add(const Staged<C>& s, std::int64_t begin, int count) {
    if (own_) add_softmax<kKeep>(s, hard_[begin / kBlock], count, keep_ + begin);
    if (smooth_) add_mean(s, hard_[begin / kBlock], count);
  }

  // What the blocks that were added are to the row's sums. label: negative where they do not have it.
  void add_to(RowSums& sums, const Logits& s, std::int64_t blocks, std::int64_t label) const {
    if (args_.ce_weight == 0) return;
    if (label >= 0) sums.z_label = static_cast<double>(s.at<C>(label));
    for (std::int64_t i = 0; own_ && i < blocks; ++i) {
      if (!hard_[i].masked) sums.shift_hard = std::fmax(sums.shift_hard, hard_[i].shift.octaves);
    }
    for (std::int64_t i = 0; own_ && i < blocks; ++i) {
      sums.sum_hard += hard_[i].sum * weight(hard_[i], sums.shift_hard);
    }
    for (std::int64_t i = 0; smooth_ && i < blocks; ++i) {
      sums.words += hard_[i].words, sums.z_all += hard_[i].total;
    }
  }

  // Once the row's sums are known. At temperature 1 its softmax is the divergence's: `sum` of
  // 2^(u - shift).
  void total(const RowSums& sums, double shift, double sum) {
    if (args_.ce_weight == 0) return;
    shift_ = own_ ? sums.shift_hard : shift, sum_ = own_ ? sums.sum_hard : sum;
    z_label_ = sums.z_label, words_ = sums.words;
    if (smooth_) mean_ = sums.z_all / words_;
    log_sum_ = std::log(sum_) + kLn2 * shift_;
  }

  double cross_entropy() const {
    constexpr C kScale = static_cast<C>(kLog2E);
    // From differences, which are small where logits are large.
    const double log_q = kLn2 * (z_label_ * kScale - shift_) - std::log(sum_);
    return hard_loss(args_, log_q, z_label_ - mean_, log_sum_);
  }

  // Weight of the divergence's own softmax in the gradient of `scale` times the hard-label part.
  double soft(double scale) const { return args_.ce_weight == 0 || own_ ? 0 : scale * slope(); }
  // What comes off the gradient of the label's logit.
  double label_share(double scale) const { return scale * hard_label(args_); }
  // What comes off that of every logit.
  double word_share(double scale) const { return smooth_ ? scale * hard_word(args_, words_) : 0; }
  // Where the hard-label part has a softmax of its own, that part of the gradient of element v.
  double own(double scale, std::int64_t v) const {
    if (!own_) return 0;
    return scale * slope() * weight(hard_[v / kBlock], shift_) / sum_ *
           static_cast<double>(keep_[v]);
  }
  // Whether the gradient of a block needs more than e_s and what was kept.
  bool plain() const { return !own_ && !smooth_ && args_.softcap == 0; }

  // One block of the gradient by its form, `scale` times the hard-label part in it.
  template <Form kForm>
  void write(std::int64_t begin, const Logits& s, char* g, const C* e_s, const C* kept, C a, C b,
             double scale, std::int64_t label) {
    const int count = size_of_block(s.V - begin);
    const bool labelled = args_.ce_weight != 0 && label >= begin && label < begin + count;
    dispatch_dtype(args_.grad_dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (std::is_same_v<compute_t<T>, C>) {
        T* out = reinterpret_cast<T*>(g) + begin;
        if (count == kBlock && plain() && !labelled) {
          if (args_.grad != args_.student && reinterpret_cast<std::uintptr_t>(out) % 64 == 0) {
            write_block<T, kForm, true>(e_s, kept, kBlock, a, b, out);
          } else {
            write_block<T, kForm, false>(e_s, kept, kBlock, a, b, out);
          }
          return;
        }
        write_block<C, kForm, false>(e_s, kept, padded<C>(count), a, b, stage_);
        finish(begin, s, count, scale, labelled ? label - begin : -1);
        for (int j = 0; j < count; j += kLanes<C>) {
          store(out + j, load(static_cast<const C*>(stage_ + j)),
                count - j < kLanes<C> ? count - j : kLanes<C>);
        }
      }
    });
  }

 private:
  struct Hard {
    Shift<C> shift;
    bool masked;
    double sum, total, words;
  };

  double slope() const { return hard_slope(args_, log_sum_); }
  static double weight(const Hard& block, double shift) {
    return block.masked ? 1 : std::exp2(block.shift.octaves - shift);
  }

  template <bool kKeep>
  static void add_softmax(const Staged<C>& s, Hard& hard, int count, C* keep) {
    hard.shift = Shift<C>(static_cast<C>(kLog2E), s.most);
    hard.masked = s.most == kMasked<C>;
    Vec<C> sum[2] = {};
    for (int j = 0; j < count; j += 2 * kLanes<C>) {
      for (int i = 0; i < 2; ++i) {
        const Vec<C> x = hard.shift.template x<true>(load(s.z + j + i * kLanes<C>));
        const Vec<C> e = hard.shift.template exp<true>(x);
        sum[i] += e;
        if constexpr (kKeep) store(keep + j + i * kLanes<C>, e);
      }
    }
    hard.sum = sum_in_double(sum[0], sum[1]);
  }

  static void add_mean(const Staged<C>& s, Hard& hard, int count) {
    const C most = s.most == kMasked<C> ? C(0) : s.most;
    const Vec<C> masked = broadcast<Vec<C>>(kMasked<C>), one = broadcast<Vec<C>>(1);
    Vec<C> total[2] = {}, words[2] = {};
    for (int j = 0; j < count; j += 2 * kLanes<C>) {
      for (int i = 0; i < 2; ++i) {
        const Vec<C> z = load(s.z + j + i * kLanes<C>);
        total[i] += select(z == masked, Vec<C>{}, z - most);
        words[i] += select(z == masked, Vec<C>{}, one);
      }
    }
    hard.words = sum_in_double(words[0], words[1]);
    hard.total = sum_in_double(total[0], total[1]) + hard.words * most;
  }

  // What the hard label and the softcap make of a block of the gradient in stage_.
  void finish(std::int64_t begin, const Logits& s, int count, double scale, std::int64_t label) {
    if (own_) {
      const C c = static_cast<C>(scale * slope() * weight(hard_[begin / kBlock], shift_) / sum_);
      for (int j = 0; j < count; ++j) stage_[j] += keep_[begin + j] * c;
    }
    if (label >= 0) stage_[label] -= static_cast<C>(label_share(scale));
    if (!smooth_ && args_.softcap == 0) return;
    // In place, these logits are still there: a block is overwritten after this.
    const Staged<C> staged = stage(s, begin, padded<C>(count), again_);
    const C share = static_cast<C>(word_share(scale));
    const C cap = args_.softcap == 0 ? static_cast<C>(kInfinity) : static_cast<C>(args_.softcap);
    for (int j = 0; j < count; ++j) {
      const C z = staged.z[j], t = z / cap;  // a rounded 1 / cap would show in 1 - t^2
      stage_[j] = z == kMasked<C> ? C(0) : (stage_[j] - share) * (1 - t * t);
    }
  }

  const RowLoss& args_;
  const bool own_, smooth_;
  Scratch scratch_;
  Hard* hard_;
  C *keep_, *stage_, *again_;
  double shift_ = 0, sum_ = 1, log_sum_ = 0, z_label_ = 0, mean_ = 0, words_ = 1;
};

}  // namespace xlstm::XLSTM_ISA
