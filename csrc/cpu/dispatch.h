// Choice of instruction set at run time.
#pragma once

#include <string>
#include <vector>

namespace xlstm {

std::vector<std::string> supported_isas();  // of this build on this CPU, best first
std::string current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument when not supported here

}  // namespace xlstm
