// Products of product.h on AMX tiles: bfloat16 operands, float32 sums.
//
// A left operand is rows of bfloat16; a right one has rows 2k and 2k + 1 of the matrix in one, element
// by element in turn, which is a matrix of 32-bit words. Turning either as words gives the other kind
// of operand of the turned matrix.
// A float32 matrix that must not lose digits goes in as three parts of eight bits each, whose sum it
// is; the products of parts add up in the same tiles.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/matrix.h"
#include "cpu/product.h"
#include "cpu/transpose.h"

namespace xlstm::XLSTM_ISA {

#if defined(__AMX_TILE__)

// gcc does not know how much of memory tile instructions read: what they read must be stored before.
inline void stores_before_tiles() { asm volatile("" ::: "memory"); }

// Tiles of this thread, all of 16 rows of 64 bytes, while it lives.
class TileScope {
 public:
  TileScope() {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    stores_before_tiles();
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// Row a in the even and row b in the odd elements, rounded to nearest.
XLSTM_HD __m512i interleaved(VecF a, VecF b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
// The leading eight bits of both, which are taken off a and b.
XLSTM_HD __m512i interleaved_part(VecF& a, VecF& b) {
  const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i first_a = _mm512_and_si512((__m512i)a, leading);
  const __m512i first_b = _mm512_and_si512((__m512i)b, leading);
  a -= (VecF)first_a, b -= (VecF)first_b;
  return _mm512_or_si512(_mm512_srli_epi32(first_a, 16), first_b);
}

struct TileProducts {
  using T = float;
  using Stored = bf16;
  using Scope = TileScope;
  static constexpr int kTileRows = 32;  // two tiles by two
  static constexpr int kW = kLanes<T>;
  static constexpr int kParts = 3;

  struct Packed {
    const bf16* data;
    std::int64_t stride, part;
    int parts;
  };
  using Left = Packed;
  using Right = Packed;
  using Room = XLSTM_ISA::Room<bf16>;

  static Room room(Scratch& scratch, std::int64_t rows, std::int64_t width) {
    return Room::take(scratch, rows, width, kParts, true);
  }
  static Room tile_room(Scratch& scratch, std::int64_t rows, std::int64_t width) {
    return room(scratch, rows, width);
  }

  static Left left(const Matrix<bf16>& m) { return {m.data, m.stride(), 0, 1}; }
  static Left left_turned(const Matrix<bf16>& m, std::int64_t rows, const Room& room) {
    return turned(pack_pairs(m, rows, room.spare), round_up(rows, kPad<bf16>) / 2, m.padded(),
                  room);
  }
  template <class Element>
  static Right right(const Matrix<Element>& m, std::int64_t rows, const Room& room) {
    return pack_pairs(m, rows, room.data);
  }
  static Right right_turned(const Matrix<bf16>& m, std::int64_t rows, const Room& room) {
    const Packed words{m.data, m.stride(), 0, 1};
    return turned(words, round_up(rows, kPad<bf16>), m.padded() / 2, room);
  }
  static Right right_turned(const Matrix<float>& m, std::int64_t rows, const Room& room) {
    const Matrix<bf16> rounded{room.spare, m.rows, m.width};
    for (std::int64_t r = 0; r < round_up(rows, kPad<bf16>); ++r) {
      for (std::int64_t c = 0; c < m.padded(); c += 2 * kW) {
        const float* from = m.row(r) + c;
        _mm512_storeu_si512(rounded.row(r) + c, (__m512i)_mm512_cvtne2ps_pbh(
                                                    (__m512)load(from + kW), (__m512)load(from)));
      }
    }
    return right_turned(rounded, rows, room);
  }
  static Left exact_left_turned(const Matrix<bf16>& m, std::int64_t rows, const T* factor,
                                const Room& room) {
    const Packed parts = split_pairs(m, rows, factor, room.spare, room.part);
    return turned(parts, round_up(rows, kPad<bf16>) / 2, m.padded(), room);
  }
  template <class Element>
  static Right exact_right(const Matrix<Element>& m, std::int64_t rows, const T* factor,
                           const Room& room) {
    return split_pairs(m, rows, factor, room.data, room.part);
  }
  static Right exact_right(const Matrix<float>& m, std::int64_t rows, const Room& room) {
    return exact_right(m, rows, nullptr, room);
  }

  template <class F, class... Terms>
  static void product(std::int64_t rows, std::int64_t columns, Span span, const F& f,
                      const Terms&... terms) {
    for (std::int64_t column = 0; column < columns; column += 2 * kW) {
      for (std::int64_t row = 0; row < rows; row += kTileRows) {
        if (span == Span::kUpTo && column > row) continue;
        alignas(64) float sum[kTileRows][2 * kW];
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        stores_before_tiles();
        (add(row, column, terms), ...);
        constexpr int kRowBytes = sizeof sum[0];
        _tile_stored(0, sum[0], kRowBytes);
        _tile_stored(1, sum[0] + kW, kRowBytes);
        _tile_stored(2, sum[16], kRowBytes);
        _tile_stored(3, sum[16] + kW, kRowBytes);
        const std::int64_t height = std::min<std::int64_t>(kTileRows, rows - row);
        for (std::int64_t i = 0; i < height; ++i) {
          f(row + i, column, load(static_cast<const float*>(sum[i])));
          f(row + i, column + kW, load(static_cast<const float*>(sum[i] + kW)));
        }
      }
    }
  }

 private:
  // Rows 2r and 2r + 1 in one; rows from `rows` on count as zero.
  static Packed pack_pairs(const Matrix<bf16>& m, std::int64_t rows, bf16* to) {
    const __m512i low = pair_order(0), high = pair_order(16);
    const Packed packed{to, 2 * m.padded() + 2 * kW, 0, 1};
    for (std::int64_t r = 0; r < round_up(rows, kPad<bf16>); r += 2, to += packed.stride) {
      for (std::int64_t c = 0; c < m.padded(); c += 2 * kW) {
        const __m512i a = r < rows ? bits(m.row(r) + c) : __m512i{};
        const __m512i b = r + 1 < rows ? bits(m.row(r + 1) + c) : __m512i{};
        _mm512_storeu_si512(to + 2 * c, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + 2 * c + 2 * kW, _mm512_permutex2var_epi16(a, high, b));
      }
    }
    return packed;
  }
  static Packed pack_pairs(const Matrix<float>& m, std::int64_t rows, bf16* to) {
    const Packed packed{to, 2 * m.padded() + 2 * kW, 0, 1};
    for_pairs(m, rows, nullptr, [&](std::int64_t r, std::int64_t c, VecF a, VecF b) {
      _mm512_storeu_si512(to + r / 2 * packed.stride + 2 * c, interleaved(a, b));
    });
    return packed;
  }
  template <class Element>
  static Packed split_pairs(const Matrix<Element>& m, std::int64_t rows, const T* factor, bf16* to,
                            std::int64_t part) {
    const Packed packed{to, 2 * m.padded() + 2 * kW, part, kParts};
    for_pairs(m, rows, factor, [&](std::int64_t r, std::int64_t c, VecF a, VecF b) {
      bf16* at = to + r / 2 * packed.stride + 2 * c;
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p, at += part) {
        _mm512_storeu_si512(at, interleaved_part(a, b));
      }
    });
    return packed;
  }
  // f(r, c, row r, row r + 1) from column c on, times factors; rows from `rows` on are zero.
  template <class Element, class F>
  static void for_pairs(const Matrix<Element>& m, std::int64_t rows, const T* factor, const F& f) {
    const auto row_at = [&](std::int64_t r, std::int64_t c) {
      if (r >= rows) return VecF{};
      const VecF x = load(m.at(r, c));
      return factor ? factor[r] * x : x;
    };
    for (std::int64_t r = 0; r < round_up(rows, kPad<bf16>); r += 2) {
      for (std::int64_t c = 0; c < m.padded(); c += kW) f(r, c, row_at(r, c), row_at(r + 1, c));
    }
  }
  // `from` turned into room.data, both counted in words.
  static Packed turned(const Packed& from, std::int64_t rows, std::int64_t columns,
                       const Room& room) {
    const Packed to{room.data, 2 * rows + 2 * kW, from.part, from.parts};
    for (int p = 0; p < from.parts; ++p) {
      transpose(reinterpret_cast<const float*>(from.data + p * from.part), from.stride / 2, rows,
                columns, reinterpret_cast<float*>(room.data + p * to.part), to.stride / 2);
    }
    return to;
  }
  static __m512i bits(const bf16* p) { return _mm512_loadu_si512(p); }
  // Elements first, first + 1, ... of the first operand and of the second in turn.
  static __m512i pair_order(int first) {
    alignas(64) std::uint16_t order[32];
    for (int at = 0; at < 32; ++at) {
      order[at] = static_cast<std::uint16_t>(first + at / 2 + 32 * (at % 2));
    }
    return _mm512_load_si512(order);
  }

  static void add(std::int64_t row, std::int64_t column, const Term<Left, Right>& term) {
    const std::int64_t begin = term.begin(row), end = term.end(row + kTileRows);
    const std::int64_t a_bytes = 2 * term.a.stride, b_bytes = 2 * term.b.stride;
    const int parts = std::max(term.a.parts, term.b.parts);
    for (int p = 0; p < parts; ++p) {
      const bf16* a = term.a.data + p * term.a.part + row * term.a.stride;
      const bf16* b = term.b.data + p * term.b.part + 2 * column;
      for (std::int64_t k = begin; k < end; k += 32) {
        const bf16* b_k = b + k / 2 * term.b.stride;
        _tile_loadd(4, a + k, a_bytes);
        _tile_loadd(6, b_k, b_bytes);
        _tile_loadd(7, b_k + 32, b_bytes);
        _tile_loadd(5, a + 16 * term.a.stride + k, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
};

#endif

// Calls f(element type of `dtype`, products for it).
template <class F>
void dispatch_products(DType dtype, const F& f) {
#if defined(__AMX_TILE__)
  if (dtype == DType::kBFloat16) f(bf16{}, TileProducts{});  // all there is: cpu/dispatch.cpp
#else
  dispatch_dtype(
      dtype, [&](auto element) { f(element, VectorProducts<compute_t<decltype(element)> >{}); });
#endif
}

}  // namespace xlstm::XLSTM_ISA
