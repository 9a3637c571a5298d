// From a run-time cell to its type.
#pragma once

#include "cells/list.h"
#include "cells/lstm.h"
#include "cells/slstm.h"
#include "launch.h"

namespace xlstm::XLSTM_ISA {

// Calls f(Type{}) with the cell's type.
template <class F>
void dispatch_cell(Cell cell, F&& f) {
  switch (cell) {
#define XLSTM_CELL_CASE(name, type, states)                                       \
  case Cell::name:                                                                \
    static_assert(type::kStates == states, "cells/list.h and the cell disagree"); \
    return f(type{});
    XLSTM_CELLS(XLSTM_CELL_CASE)
#undef XLSTM_CELL_CASE
  }
}

}  // namespace xlstm::XLSTM_ISA
