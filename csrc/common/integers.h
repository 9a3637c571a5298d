// Integer arithmetic of sizes, which are not negative.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace xlstm {

XLSTM_HD std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
XLSTM_HD std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace xlstm
