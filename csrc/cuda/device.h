// What this build holds and what this machine has.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xlstm {

struct CudaDevice {
  std::string name;
  std::string arch;  // compute capability, "90"
  std::int64_t memory_bytes;
  int multiprocessors;
  std::int64_t shared_bytes;  // that a block may have
};

std::vector<std::string> cuda_archs();   // of this build, "90a"; the last one as PTX too
std::string cuda_runtime_version();      // of the runtime linked in, "13.0"
std::vector<CudaDevice> cuda_devices();  // throws std::runtime_error without a driver or a device

}  // namespace xlstm
