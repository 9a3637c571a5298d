// Gradient of the mLSTM on CPU cores; equations, chunks and intervals: mlstm_backward.h.
// Tasks: (sequence, head), from the last interval to the first; or, where threads would be left
// without one, intervals. Those need the gradient of the state after them. First the last of each
// sequence is done, and of the others but the first what they add to the gradient before them; then
// dC = decay dC' + own, from the last to the first; then the others are done. That rounds dC in another
// order than one walk does: gradients of few long sequences depend on the number of threads so far.
#include "cpu/mlstm_backward.h"

#include <vector>

namespace xlstm::XLSTM_ISA {
namespace {

template <class Element, class Products>
struct BackwardTasks {
  using Work = Backward<Element, Products>;
  using Buffers = typename Work::Buffers;
  using T = typename Work::T;

  const Work work;

  // Calls f(buffers) with the scratch of one task.
  template <class F>
  void with_buffers(const F& f) const {
    const TaskScope scope;
    const typename Products::Scope tiles;
    Scratch sizes;
    Buffers(work.args, sizes);
    Scratch scratch(sizes.used_bytes(), 0);
    Buffers b(work.args, scratch);
    b.totals.zero();
    f(b);
  }

  void store_first(const Track& track, const Buffers& b, T dm, T before) const {
    const bool no_m = track.length > 0 && work.args.input_gate == InputGate::kSigmoid;
    work.store_first(track, b, (no_m ? T{} : dm) + before);
  }

  void whole_sequence(std::int64_t task) const {
    with_buffers([&](Buffers& b) {
      const Track track(work.args, task);
      T dm, before{};
      work.load_last(track, b, dm);
      for (std::int64_t end = track.length; end > 0;) {
        const std::int64_t begin = (end - 1) / kStateInterval * kStateInterval;
        before = work.interval(track, begin, end, b, dm);
        end = begin;
      }
      store_first(track, b, dm, before);
    });
  }

  // The state's gradient before an interval: what the interval adds to it, later all of it.
  struct Boundary {
    Matrix<T> dC;
    T* dn;
    typename Work::Through through;
  };
  struct Interval {
    Track track;
    std::int64_t begin, end;
    Boundary before;
    bool first() const { return begin == 0; }
    bool last() const { return end == track.length; }
  };

  Interval make_interval(const Track& track, std::int64_t begin, Scratch& scratch) const {
    const std::int64_t K = round_up(work.args.K, kPad<T>);
    Interval made{track, begin, std::min(begin + kStateInterval, track.length), {}};
    made.before.dC = take_matrix<T>(scratch, round_up(work.args.V, kPad<T>), work.args.K);
    made.before.dn = scratch.take<T>(K);
    return made;
  }
  // By sequences, each from its first to its last. An empty sequence is one interval.
  std::vector<Interval> intervals(Scratch& scratch) const {
    std::vector<Interval> all;
    for (std::int64_t task = 0; task < work.args.B * work.args.H; ++task) {
      const Track track(work.args, task);
      std::int64_t begin = 0;
      do {
        all.push_back(make_interval(track, begin, scratch));
        begin += kStateInterval;
      } while (begin < track.length);
    }
    return all;
  }

  static void copy_gradient(const Matrix<T>& from_dC, const T* from_dn, const Matrix<T>& to_dC,
                            T* to_dn) {
    std::copy(from_dC.data, from_dC.data + from_dC.size(), to_dC.data);
    std::copy(from_dn, from_dn + from_dC.padded(), to_dn);
  }

  void last_or_own(Interval& one) const {
    with_buffers([&](Buffers& b) {
      if (!one.last()) {
        if (one.first()) return;
        one.before.through = work.own_gradient(one.track, one.begin, one.end, b);
      } else {
        T dm, before{};
        work.load_last(one.track, b, dm);
        if (one.track.length > 0) before = work.interval(one.track, one.begin, one.end, b, dm);
        if (one.first()) return store_first(one.track, b, dm, before);
        one.before.through.dm = dm;
      }
      copy_gradient(b.dC, b.dn, one.before.dC, one.before.dn);
    });
  }

  // In `before` of each but the first, the gradient of all that comes after.
  static void add_later(std::vector<Interval>& all) {
    for (std::size_t at = all.size() - 1; at > 0; --at) {
      Interval &one = all[at - 1], &after = all[at];
      if (one.first() || one.last()) continue;
      const typename Work::Through through = one.before.through;
      const Matrix<T> dC = one.before.dC;
      for (std::int64_t e = 0; e < dC.size(); ++e) {
        dC.data[e] += through.decay * after.before.dC.data[e];
      }
      for (std::int64_t k = 0; k < dC.padded(); ++k) {
        one.before.dn[k] += through.decay * after.before.dn[k];
      }
      if (through.passes_dm) one.before.through.dm += after.before.through.dm;
    }
  }

  void all_but_last(const Interval& one, const Boundary& after) const {
    if (one.last()) return;
    with_buffers([&](Buffers& b) {
      copy_gradient(after.dC, after.dn, b.dC, b.dn);
      T dm = after.through.dm;
      const T before = work.interval(one.track, one.begin, one.end, b, dm);
      if (one.first()) store_first(one.track, b, dm, before);
    });
  }

  void by_intervals() const {
    Scratch sizes;
    const auto count = static_cast<std::int64_t>(intervals(sizes).size());
    Scratch scratch(sizes.used_bytes(), 0);
    std::vector<Interval> all = intervals(scratch);
    const auto at = [&](std::int64_t task) { return static_cast<std::size_t>(count - 1 - task); };
    parallel_for(count, [&](std::int64_t task) { last_or_own(all[at(task)]); });
    add_later(all);
    parallel_for(count - 1,
                 [&](std::int64_t task) { all_but_last(all[at(task + 1)], all[at(task)].before); });
  }

  // Intervals side by side do what adds to the gradient before them twice, about kTwice of all.
  bool intervals_are_faster() const {
    constexpr double kTwice = 0.6;
    const MLSTM& args = work.args;
    std::int64_t longest = 0, all = 0, twice = 0;
    for (std::int64_t task = 0; task < args.B * args.H; ++task) {
      const std::int64_t count = ceil_div(Track(args, task).length, kStateInterval);
      longest = std::max(longest, count);
      all += count;
      twice += std::max<std::int64_t>(count - 2, 0);
    }
    const auto threads = static_cast<double>(num_threads());
    const double whole = std::max(static_cast<double>(longest), static_cast<double>(all) / threads);
    const double split = (static_cast<double>(all) + kTwice * static_cast<double>(twice)) / threads;
    return longest > 2 && split < whole;
  }
};

}  // namespace

void mlstm_backward(const MLSTMBackward& args) {
  dispatch_products(args.dtype, [&](auto element, auto products) {
    using Tasks = BackwardTasks<decltype(element), decltype(products)>;
    const Tasks tasks{{args}};
    if (tasks.intervals_are_faster()) return tasks.by_intervals();
    parallel_for(args.B * args.H, [&](std::int64_t task) { tasks.whole_sequence(task); });
  });
}

}  // namespace xlstm::XLSTM_ISA
