// Run-time options of the cells.
#pragma once

#include "common/host_device.h"

namespace xlstm::XLSTM_ISA {

struct CellOptions {
  double n_floor = 0.0;  // sLSTM: lower bound of n
};

}  // namespace xlstm::XLSTM_ISA
