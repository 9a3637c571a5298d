// Tasks of the mLSTM forward; equations and chunks: mlstm_forward.h.
// A task is a (sequence, head), and columns of V where heads are few, and walks its chunks with C in
// cache. No result depends on how many there are. Or, where that would leave threads without work,
// an interval of a sequence. Those need the state before them (xk.mlstm_combine): first the first of
// each sequence is done, and of the others but the last what they add to a state of zero; then
// C = decay C' + own, from the first to the last; then the others are done. That rounds C and n in
// another order than one walk does: results of few long sequences depend on the number of threads. m,
// a scalar a token, is walked through before all that, and does not.
#include "cpu/mlstm_forward.h"

#include <type_traits>
#include <vector>

namespace xlstm::XLSTM_ISA {
namespace {

// Of the time that all of a token takes, that of its scores, which every task of a head works out.
constexpr double kScores = 0.2;
// Tokens of an interval, about; the first has fewer.
constexpr std::int64_t kLeastTokens = 512;
// Of the time by columns, that of intervals where they are taken.
constexpr double kWorthwhile = 0.9;

// Columns of a task, so that the slowest thread is done soonest.
std::int64_t task_columns(std::int64_t heads, std::int64_t V) {
  constexpr std::int64_t kColumns = 64;  // whole tiles of any product
  std::int64_t best = kColumns;
  double least = static_cast<double>(INT64_MAX);
  for (std::int64_t columns = round_up(V, kColumns); columns > 0; columns -= kColumns) {
    const std::int64_t rounds = ceil_div(heads * ceil_div(V, columns), num_threads());
    const double cost = static_cast<double>(rounds) *
                        (kScores + static_cast<double>(columns) / static_cast<double>(V));
    if (cost < least) least = cost, best = columns;
  }
  return best;
}

// Tasks that take as long as so many tokens of all columns.
struct Load {
  double all = 0, longest = 0;
  std::int64_t count = 0;
  void add(double tokens) { all += tokens, longest = std::max(longest, tokens), ++count; }
  // Until all are done: whole rounds of tasks of middling length.
  double time() const {
    if (count == 0) return 0;
    const auto rounds = static_cast<double>(ceil_div(count, num_threads()));
    return std::max(longest, all / static_cast<double>(count) * rounds);
  }
};

template <class Element, class Products>
struct ForwardTasks {
  using Work = Forward<Element, Products>;
  using Buffers = typename Work::Buffers;
  using Part = typename Work::Part;
  using T = typename Work::T;
  // Of the time that all of a token takes, that of its part of the next state, which is exact: on
  // tiles a product of three parts.
  static constexpr double kOwnState = std::is_same_v<typename Work::Stored, T> ? 0.5 : 0.8;

  const Work work;

  std::int64_t heads() const { return work.args.B * work.args.H; }

  void whole_sequence(std::int64_t task) const {
    const Track track(work.args, task / work.parts());
    const Part part{task % work.parts() * work.columns};
    work.with_buffers(part, [&](Buffers& b) {
      T m;
      work.load_state(track, part, b, m);
      work.interval(track, part, 0, track.length, b, m);
      work.store_last(track, part, b, m);
    });
  }

  struct Interval {
    Track track;
    std::int64_t begin, end;
    T m = T{};  // before it
    // After it: what it adds to the state before it and leaves of that, later all of it.
    Matrix<T> C = {};
    T *n = nullptr, decay = T{};
    bool first() const { return begin == 0; }
    bool last() const { return end == track.length; }
  };
  using Intervals = std::vector<Interval>;

  // Time of a task for each sequence and part of its columns.
  Load sequences(double time_of_token) const {
    Load load;
    for (std::int64_t task = 0; task < heads() * work.parts(); ++task) {
      const Track track(work.args, task / work.parts());
      load.add(time_of_token * static_cast<double>(track.length));
    }
    return load;
  }
  double time_of_sequences() const {
    const double columns = static_cast<double>(work.columns) / static_cast<double>(work.args.V);
    return sequences(std::min(kScores + columns, 1.0)).time();
  }
  // Of the two passes of by_intervals.
  static double time(const Intervals& all) {
    Load first, second;
    for (const Interval& one : all) {
      const auto tokens = static_cast<double>(one.end - one.begin);
      if (!one.first()) second.add(tokens);
      if (one.first() || !one.last()) first.add(one.first() ? tokens : kOwnState * tokens);
    }
    return first.time() + second.time();
  }

  // By sequences, each from its first to its last. A long sequence has as many as its share of the
  // threads, and a first one, which is done by the time that the others' own states are.
  Intervals intervals() const {
    const auto tokens = static_cast<std::int64_t>(sequences(1.0).all);
    const std::int64_t share = std::max(tokens / num_threads(), kLeastTokens);
    Intervals all;
    for (std::int64_t task = 0; task < heads(); ++task) {
      const Track track(work.args, task);
      const std::int64_t count = (track.length + share / 2) / share;
      const double each =
          static_cast<double>(track.length) / (static_cast<double>(count) + kOwnState);
      std::int64_t begin = 0;
      for (std::int64_t at = 0; at < count && count > 1; ++at) {
        const auto end = static_cast<std::int64_t>(each * (static_cast<double>(at) + kOwnState));
        all.push_back({track, begin, round_up(end, work.args.chunk)});
        begin = all.back().end;
      }
      all.push_back({track, begin, track.length});
    }
    return all;
  }

  void by_intervals(Intervals& all) const {
    Scratch sizes;
    take_states(all, sizes);
    Scratch scratch(sizes.used_bytes(), 0);
    take_states(all, scratch);
    const auto count = static_cast<std::int64_t>(all.size());
    const auto at = [&](std::int64_t task) -> Interval& {
      return all[static_cast<std::size_t>(task)];
    };
    parallel_for(count, [&](std::int64_t task) { find_m(&at(task)); });
    parallel_for(count, [&](std::int64_t task) { first_or_own(at(task)); });
    parallel_for(work.args.K, [&](std::int64_t row) { add_earlier(all, row); });
    parallel_for(count - 1, [&](std::int64_t task) { all_but_first(at(task), at(task + 1)); });
  }

 private:
  static constexpr Part kAllColumns{};

  void take_states(Intervals& all, Scratch& scratch) const {
    for (Interval& one : all) {
      if (one.last()) continue;
      one.C = take_matrix<T>(scratch, work.args.K, work.args.V);
      one.n = scratch.take<T>(one.C.rows);
    }
  }

  // Before each interval of a sequence, of which this is the first.
  void find_m(Interval* one) const {
    if (!one->first() || one->last()) return;
    work.with_buffers(kAllColumns, [&](Buffers& b) {
      for (one->m = work.first_m(one->track); !one->last(); ++one) {
        one[1].m = work.m_after(one->track, one->begin, one->end, b, one->m);
      }
    });
  }

  static void copy_state(const Matrix<T>& from_C, const T* from_n, const Matrix<T>& to_C, T* to_n) {
    std::copy(from_C.data, from_C.data + from_C.size(), to_C.data);
    std::copy(from_n, from_n + from_C.rows, to_n);
  }

  void first_or_own(Interval& one) const {
    if (one.last() && !one.first()) return;
    work.with_buffers(kAllColumns, [&](Buffers& b) {
      if (one.first()) {
        T m;
        work.load_state(one.track, kAllColumns, b, m);
        work.interval(one.track, kAllColumns, one.begin, one.end, b, m);
        if (one.last()) return work.store_last(one.track, kAllColumns, b, m);
      } else {
        one.decay = work.own_state(one.track, kAllColumns, one.begin, one.end, b, one.m);
      }
      copy_state(b.C, b.n, one.C, one.n);
    });
  }

  // To a row of the intervals' own states, what is left of those before.
  static void add_earlier(const Intervals& all, std::int64_t row) {
    const TaskScope scope;
    for (std::size_t at = 1; at < all.size(); ++at) {
      const Interval &one = all[at], &before = all[at - 1];
      if (one.first() || one.last()) continue;
      T *C = one.C.row(row), *C_before = before.C.row(row);
      for (std::int64_t e = 0; e < one.C.width; ++e) C[e] += one.decay * C_before[e];
      one.n[row] += one.decay * before.n[row];
    }
  }

  void all_but_first(const Interval& before, const Interval& one) const {
    if (one.first()) return;
    work.with_buffers(kAllColumns, [&](Buffers& b) {
      T m = one.m;
      padded_in<T>(nullptr, 0, b.k.padded(), b.n);
      copy_state(before.C, before.n, b.C, b.n);
      work.interval(one.track, kAllColumns, one.begin, one.end, b, m);
      if (one.last()) work.store_last(one.track, kAllColumns, b, m);
    });
  }
};

}  // namespace

void mlstm_forward(const MLSTMForward& args) {
  dispatch_products(args.dtype, [&](auto element, auto products) {
    using Tasks = ForwardTasks<decltype(element), decltype(products)>;
    const std::int64_t heads = args.B * args.H;
    const Tasks by_columns{{args, task_columns(heads, args.V)}}, by_tokens{{args, args.V}};
    auto intervals = by_tokens.intervals();
    if (by_tokens.time(intervals) < kWorthwhile * by_columns.time_of_sequences()) {
      return by_tokens.by_intervals(intervals);
    }
    parallel_for(heads * by_columns.work.parts(),
                 [&](std::int64_t task) { by_columns.whole_sequence(task); });
  });
}

}  // namespace xlstm::XLSTM_ISA
