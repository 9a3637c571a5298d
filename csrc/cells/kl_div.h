// What kernels of losses over rows of logits compute of an element and of a row's sums, host and
// device; V is a scalar or a vector. The mathematics is at the head of cpu/kl_div.cpp.
#pragma once

#include <cmath>
#include <limits>

#include "common/math.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
XLSTM_HD float exp2(float x) { return ::exp2f(x); }
XLSTM_HD double exp2(double x) { return ::exp2(x); }

// A masked logit, and a number in its place.
template <class C>
constexpr C kMasked = -std::numeric_limits<C>::infinity();
template <class C>
constexpr C kFloor = std::numeric_limits<C>::lowest();

template <class V>
XLSTM_HD V softcapped(V z, element_t<V> cap) {
  return select(z == broadcast<V>(kMasked<element_t<V>>), z, tanh(z / cap) * cap);
}

// What a row keeps of its elements beside e_s, and the gradient from both.
enum class Form {
  kDifference,  // e_t           g = (e_s - e_t) a + e_s b
  kGap,         // x_s - x_t     g = e_s (gap a + b)
  kSlope,       // any           g = kept a + e_s b
  kAlone,       // nothing       g = e_s b
};
constexpr XLSTM_HD Form form_of(Divergence divergence) {
  return divergence == Divergence::kForward   ? Form::kDifference
         : divergence == Divergence::kReverse ? Form::kGap
                                              : Form::kSlope;
}

template <Form kForm, class V>
XLSTM_HD V gradient(V e_s, V kept, element_t<V> a, element_t<V> b) {
  if constexpr (kForm == Form::kDifference) {
    return (e_s - kept) * a + e_s * b;  // exactly 0 where student and teacher agree: then b is 0
  } else if constexpr (kForm == Form::kGap) {
    // Of a masked word `kept` may be the largest number there is, and overflow.
    return select(e_s == broadcast<V>(0), broadcast<V>(0), e_s * (kept * a + b));
  } else if constexpr (kForm == Form::kSlope) {
    return kept * a + e_s * b;
  } else {
    return e_s * b;
  }
}

// How e of a block become the row's p and q. A block's largest logit is `drop` octaves below its row's.
struct Weights {
  double drop_s, drop_t, s, t, apart;  // apart: s - t, exact where the two are nearly equal

  XLSTM_HD Weights(const RowSums& sums, double drop_s, double drop_t)
      : drop_s(drop_s), drop_t(drop_t) {
    const double f_s = ::exp2(drop_s), f_t = ::exp2(drop_t);
    s = f_s / sums.sum_s, t = f_t / sums.sum_t;
    apart = (f_s - f_t - t * sums.excess) / sums.sum_s;
  }
};

// KL(p|q), or KL(q|p) where `reverse`.
XLSTM_HD double plain_divergence(const RowSums& sums, bool reverse) {
  const double mean_gap = sums.gap / (reverse ? sums.sum_s : sums.sum_t);
  const double more = reverse ? -sums.excess / sums.sum_s : sums.excess / sums.sum_t;
  const double ratio = reverse ? sums.sum_t / sums.sum_s : sums.sum_s / sums.sum_t;
  const double kl = kLn2 * mean_gap + (::fabs(more) < 0.5 ? ::log1p(more) : ::log(ratio));
  return kl < 0 ? 0 : kl;
}

// a and b of gradient(), for `kl` times the divergence's gradient by z * ln(2) * scale.
struct Coefficients {
  double a, b;

  XLSTM_HD Coefficients(Form form, const RowSums& sums, const Weights& by, double kl,
                        double scale) {
    if (form == Form::kDifference) {
      a = kl * by.t;
      b = kl * by.apart;
    } else if (form == Form::kGap) {
      a = kl * by.s * kLn2 * scale;
      b = kl * by.s * kLn2 * (by.drop_s - by.drop_t - sums.gap / sums.sum_s);
    } else {
      a = kl;
      b = -kl * by.s * sums.slope;
    }
  }
};

// The hard-label part, from the log of the label's softmax, the label's logit less the mean of all,
// and log_sum = ln sum exp(z).
XLSTM_HD double hard_loss(const RowLoss& args, double log_q, double above_mean, double log_sum) {
  double loss = -log_q;
  if (args.label_smoothing != 0) loss += args.label_smoothing * above_mean;
  return args.z_loss == 0 ? loss : loss + args.z_loss * log_sum * log_sum;
}
// Its gradient by z is hard_slope() softmax, less hard_label() for the label, less hard_word() for
// every word.
XLSTM_HD double hard_slope(const RowLoss& args, double log_sum) {
  return args.ce_weight * (1 + 2 * args.z_loss * log_sum);
}
XLSTM_HD double hard_label(const RowLoss& args) {
  return args.ce_weight * (1 - args.label_smoothing);
}
XLSTM_HD double hard_word(const RowLoss& args, double words) {
  return args.ce_weight * args.label_smoothing / words;
}

}  // namespace xlstm::XLSTM_ISA
