#include "cuda/device.h"

#include <sstream>

#include "cuda/check.h"

namespace xlstm {

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  std::istringstream list(XLSTM_CUDA_ARCHS);
  for (std::string arch; std::getline(list, arch, ';');) archs.push_back(arch);
  return archs;
}

std::string cuda_runtime_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

std::vector<CudaDevice> cuda_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<CudaDevice> devices;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    devices.push_back(
        {properties.name, std::to_string(properties.major) + std::to_string(properties.minor),
         static_cast<std::int64_t>(properties.totalGlobalMem), properties.multiProcessorCount,
         static_cast<std::int64_t>(properties.sharedMemPerBlockOptin)});
  }
  return devices;
}

}  // namespace xlstm
