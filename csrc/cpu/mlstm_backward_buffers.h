// Scratch of one task of mlstm_backward.h.
#pragma once

#include "cpu/mlstm.h"
#include "cpu/product.h"

namespace xlstm::XLSTM_ISA {

template <class Element, class Products>
struct BackwardBuffers {
  using T = compute_t<Element>;
  using Stored = typename Products::Stored;
  using Room = typename Products::Room;
  static constexpr int kW = kLanes<T>;

  Matrix<T> C, dC;   // (V, K); C before each chunk of the interval
  Matrix<T> P, dS;   // dS without den's part and D
  Matrix<T> dq, dk;  // their parts through C and dC'
  Matrix<T> totals;  // a vector for each row
  Matrix<Stored> q, k, v, dh, out_k, row_P, row_dS;
  Room kt_room, vt_room, C_room, dC_room, dc_room, k_room, q_room, dh_room, dht_room, P_room,
      dS_room;
  T *n, *m;  // before each chunk of the interval
  T *dn, *row_h, *by_q, *dden, *dm, *dh_h, *r, *u, *dlf, *dli, *column;
  Gates<T> gates;

  BackwardBuffers(const MLSTM& args, Scratch& scratch)
      : BackwardBuffers(args, scratch, round_up(args.chunk, kPad<T>), chunks(args)) {}

 private:
  // Of an interval, or of the longest sequence where that is shorter.
  static std::int64_t chunks(const MLSTM& args) {
    const std::int64_t longest = std::min<std::int64_t>(kStateInterval, args.T);
    return std::max<std::int64_t>(ceil_div(longest, args.chunk), 1);
  }
  BackwardBuffers(const MLSTM& args, Scratch& scratch, std::int64_t L, std::int64_t chunks)
      : C(take_matrix<T>(scratch, args.V * chunks, args.K)),
        dC(take_matrix<T>(scratch, round_up(args.V, kPad<T>), args.K)),
        P(take_matrix<T>(scratch, L, L)),
        dS(take_matrix<T>(scratch, L, L)),
        dq(take_matrix<T>(scratch, L, args.K)),
        dk(take_matrix<T>(scratch, L, args.K)),
        totals(take_matrix<T>(scratch, L, kW)),
        q(take_matrix<Stored>(scratch, L, args.K)),
        k(take_matrix<Stored>(scratch, L, args.K)),
        v(take_matrix<Stored>(scratch, L, args.V)),
        dh(take_matrix<Stored>(scratch, L, args.V)),
        out_k(take_matrix<Stored>(scratch, L, args.K)),
        row_P(take_matrix<Stored>(scratch, L, L)),
        row_dS(take_matrix<Stored>(scratch, L, L)),
        kt_room(Products::room(scratch, L, args.K)),
        vt_room(Products::room(scratch, L, args.V)),
        C_room(Products::tile_room(scratch, args.V, args.K)),
        dC_room(Products::tile_room(scratch, args.V, args.K)),
        dc_room(Products::room(scratch, args.V, args.K)),
        k_room(Products::room(scratch, L, args.K)),
        q_room(Products::room(scratch, L, args.K)),
        dh_room(Products::tile_room(scratch, L, args.V)),
        dht_room(Products::tile_room(scratch, L, args.V)),
        P_room(Products::tile_room(scratch, L, L)),
        dS_room(Products::tile_room(scratch, L, L)),
        n(scratch.take<T>(chunks * k.padded())),
        m(scratch.take<T>(chunks)),
        dn(scratch.take<T>(k.padded())),
        gates(scratch, L) {
    for (T** row : {&row_h, &by_q, &dden, &dm, &dh_h, &r, &u, &dlf, &dli, &column}) {
      *row = scratch.take<T>(L);
    }
  }
};

}  // namespace xlstm::XLSTM_ISA
