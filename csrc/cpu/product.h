// Matrix products of one chunk, with what becomes of each sum given by the caller:
//   f(i, j, sum over terms of sum_k a[i][k] b[k][j])   for vectors of lanes j
// A class of products says how operands are laid out: `VectorProducts` here takes them as they stand,
// tile_product.h packs them into bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm_tile.h"
#include "cpu/matrix.h"
#include "cpu/transpose.h"

namespace xlstm::XLSTM_ISA {

// Of the depth, or of the columns, which row i takes part in: all, up to i, or from i on. What lies
// beyond, up to a whole tile, is read too and must be zero.
enum class Span { kAll, kUpTo, kFrom };

template <class Left, class Right>
struct Term {
  Term(Left a, Right b, std::int64_t depth, Span span = Span::kAll)
      : a(a), b(b), depth(depth), span(span) {}
  std::int64_t begin(std::int64_t row) const { return span == Span::kFrom ? row : 0; }
  std::int64_t end(std::int64_t row_end) const {
    return span == Span::kUpTo ? std::min(depth, row_end) : depth;
  }

  Left a;
  Right b;
  std::int64_t depth;
  Span span;
};

// Memory for an operand that cannot be used as it stands; `spare` for a step on the way there.
template <class T>
struct Room {
  T *data = nullptr, *spare = nullptr;
  std::int64_t part = 0;  // elements of one part

  static Room take(Scratch& scratch, std::int64_t rows, std::int64_t width, int parts,
                   bool with_spare) {
    Room room;
    room.part = (round_up(rows, kPad<T>) + kPad<T>)*(round_up(width, kPad<T>) + kPad<T>);
    room.data = scratch.take<T>(parts * room.part);
    if (with_spare) room.spare = scratch.take<T>(parts * room.part);
    return room;
  }
};

// Operands in the compute type, through the registers of gemm_tile.h. `rows` of an operand that is
// made from a matrix are those in use.
template <class Compute>
struct VectorProducts {
  using T = Compute;
  using Stored = T;  // what tokens and left operands are kept in
  struct Scope {     // what a thread sets up for them
    Scope() {}
    ~Scope() {}
  };
  static constexpr int kTileRows = kRegisters == 32 ? 6 : 3;
  static constexpr int kTileVectors = kRegisters == 32 ? 4 : 3;
  static constexpr int kW = kLanes<T>;

  // Which of its strides is 1 is known to the compiler, which saves it a pointer for each row.
  template <bool kTurned>
  struct Left {
    const T* data;
    std::int64_t stride;
    std::int64_t row() const { return kTurned ? 1 : stride; }
    std::int64_t step() const { return kTurned ? stride : 1; }
  };
  struct Right {
    const T* data;
    std::int64_t stride;
  };
  using Room = XLSTM_ISA::Room<T>;

  // Room for an operand made from a (rows, width) matrix, and for one that only tiles have to make.
  static Room room(Scratch& scratch, std::int64_t rows, std::int64_t width) {
    return Room::take(scratch, rows, width, 1, false);
  }
  static Room tile_room(Scratch&, std::int64_t, std::int64_t) { return {}; }

  static Left<false> left(const Matrix<T>& m) { return {m.data, m.stride()}; }
  static Left<true> left_turned(const Matrix<T>& m, std::int64_t, const Room&) {
    return {m.data, m.stride()};
  }
  static Right right(const Matrix<T>& m, std::int64_t, const Room&) { return {m.data, m.stride()}; }
  static Right right_turned(const Matrix<T>& m, std::int64_t rows, const Room& room) {
    const Matrix<T> turned{room.data, m.padded(), rows};
    transpose(static_cast<const T*>(m.data), m.stride(), round_up(rows, kW), m.padded(),
              turned.data, turned.stride());
    return {turned.data, turned.stride()};
  }
  // The same to all digits of the compute type, row r times factor[r].
  static Left<true> exact_left_turned(const Matrix<T>& m, std::int64_t rows, const T* factor,
                                      const Room& room) {
    return left_turned(scaled(m, rows, factor, room), rows, room);
  }
  static Right exact_right(const Matrix<T>& m, std::int64_t rows, const T* factor,
                           const Room& room) {
    return right(scaled(m, rows, factor, room), rows, room);
  }
  static Right exact_right(const Matrix<T>& m, std::int64_t rows, const Room& room) {
    return right(m, rows, room);
  }

  // Of columns, kUpTo takes the tiles that reach row i or less.
  template <class F, class... Terms>
  static void product(std::int64_t rows, std::int64_t columns, Span span, const F& f,
                      const Terms&... terms) {
    for (std::int64_t column = 0; column < columns; column += kTileVectors * kW) {
      for (std::int64_t row = 0; row < rows; row += kTileRows) {
        const int height = static_cast<int>(std::min<std::int64_t>(kTileRows, rows - row));
        const std::int64_t end = span == Span::kUpTo ? std::min(columns, row + height) : columns;
        if (column >= end) continue;
        const int width =
            static_cast<int>(std::min<std::int64_t>(kTileVectors, (end - column + kW - 1) / kW));
        with_constant<kTileRows>(height, [&](auto h) {
          with_constant<kTileVectors>(width,
                                      [&](auto w) { tile<h(), w()>(row, column, f, terms...); });
        });
      }
    }
  }

 private:
  static Matrix<T> scaled(const Matrix<T>& m, std::int64_t rows, const T* factor,
                          const Room& room) {
    const Matrix<T> to{room.data, m.rows, m.width};
    scale_rows_into(m, rows, factor, to);
    return to;
  }

  template <int kH, int kV, class F, class... Terms>
  static void tile(std::int64_t row, std::int64_t column, const F& f, const Terms&... terms) {
    Vec<T> sum[kH][kV]{};
    (add(row, column, terms, sum), ...);
#pragma GCC unroll 8
    for (int i = 0; i < kH; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kV; ++j) f(row + i, column + j * kW, sum[i][j]);
    }
  }
  // Out of line it would take the sums through memory.
  template <int kH, int kV, bool kTurned>
  XLSTM_HD static void add(std::int64_t row, std::int64_t column,
                           const Term<Left<kTurned>, Right>& term, Vec<T> (&sum)[kH][kV]) {
    const std::int64_t begin = term.begin(row);
    const T* a = term.a.data + row * term.a.row() + begin * term.a.step();
    multiply<kH, kV>(term.end(row + kH) - begin, a, term.a.row(), term.a.step(),
                     term.b.data + begin * term.b.stride + column, term.b.stride, sum);
  }
};

}  // namespace xlstm::XLSTM_ISA
