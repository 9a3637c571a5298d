#include "cpu/dispatch.h"

#include <stdexcept>

#include "common/parallel.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xlstm {

ParallelFor g_parallel_for = nullptr;
GetNumThreads g_get_num_threads = nullptr;

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  Kernels kernels;
};

#define XLSTM_KERNELS(ISA)                                                \
  {ISA::recurrence_forward, ISA::recurrence_backward, ISA::mlstm_forward, \
   ISA::mlstm_backward,     ISA::mlstm_step,          ISA::kl_div,        \
   ISA::topk_kl_div,        ISA::scale_rows}

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}

// Linux keeps tiles from a process until it asks for them: they enlarge what a context switch saves.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

// Tiles multiply bfloat16; everything else is as with AVX-512.
constexpr Kernels with_tiles(Kernels kernels) {
  kernels.mlstm_forward = [](const MLSTMForward& args) {
    (args.dtype == DType::kBFloat16 ? amx::mlstm_forward : avx512::mlstm_forward)(args);
  };
  kernels.mlstm_backward = [](const MLSTMBackward& args) {
    (args.dtype == DType::kBFloat16 ? amx::mlstm_backward : avx512::mlstm_backward)(args);
  };
  return kernels;
}
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx",
     [] {
       return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
              __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
              may_use_tiles();
     },
     with_tiles(XLSTM_KERNELS(avx512))},
    {"avx512", has_avx512, XLSTM_KERNELS(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); },
     XLSTM_KERNELS(avx2)},
#endif
    {"baseline", [] { return true; }, XLSTM_KERNELS(baseline)},
};

const Isa* best_isa() {
  for (const Isa& isa : kIsas) {
    if (isa.supported()) return &isa;
  }
  return nullptr;
}

const Isa* g_isa = best_isa();

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names.emplace_back(isa.name);
  }
  return names;
}

std::string current_isa() { return g_isa->name; }

void set_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.supported()) {
      g_isa = &isa;
      return;
    }
  }
  std::string known;
  for (const std::string& isa : supported_isas()) known += (known.empty() ? "" : ", ") + isa;
  throw std::invalid_argument("instruction set must be one of " + known + " on this CPU, got '" +
                              name + "'");
}

void recurrence_forward_cpu(const RecurrenceForward& args) {
  g_isa->kernels.recurrence_forward(args);
}
void recurrence_backward_cpu(const RecurrenceBackward& args) {
  g_isa->kernels.recurrence_backward(args);
}
void mlstm_forward_cpu(const MLSTMForward& args) { g_isa->kernels.mlstm_forward(args); }
void mlstm_backward_cpu(const MLSTMBackward& args) { g_isa->kernels.mlstm_backward(args); }
void mlstm_step_cpu(const MLSTMStep& args) { g_isa->kernels.mlstm_step(args); }
void kl_div_cpu(const KlDiv& args) { g_isa->kernels.kl_div(args); }
void topk_kl_div_cpu(const TopkKlDiv& args) { g_isa->kernels.topk_kl_div(args); }
void scale_rows_cpu(const ScaleRows& args) { g_isa->kernels.scale_rows(args); }

}  // namespace xlstm
