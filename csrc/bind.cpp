// The only file that knows Python. Compiled once into _cpu and once into _cuda. Pointers arrive as
// integers (Tensor.data_ptr()), 0 for an absent tensor; the Python side has checked every shape.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <vector>

#include "launch.h"

#ifdef __clang__
#define XLSTM_COMPILER __VERSION__
#else
#define XLSTM_COMPILER "gcc " __VERSION__
#endif

#ifdef XLSTM_BUILD_CPU
#include <sys/mman.h>

#include "common/parallel.h"
#include "cpu/dispatch.h"
#endif
#ifdef XLSTM_BUILD_CUDA
#include "cuda/device.h"
#include "cuda/recurrence_launch.h"
#include "cuda/row_launch.h"
#endif
#ifdef XLSTM_EMULATED
#include "emulator/machine.h"
#endif

namespace py = pybind11;
using xlstm::DType;
using Address = std::uintptr_t;

namespace {

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void fill(xlstm::Recurrence& args, int cell, int dtype, std::array<std::int64_t, 4> sizes,
          Address starts, Address x, std::array<std::int64_t, 4> x_stride, Address r, Address b,
          Address state, double n_floor, double clip_grad) {
  args.cell = static_cast<xlstm::Cell>(cell);
  args.dtype = static_cast<DType>(dtype);
  args.B = sizes[0], args.T = sizes[1], args.H = sizes[2], args.D = sizes[3];
  args.starts = pointer<const std::int32_t>(starts);
  args.x = pointer(x);
  for (int axis = 0; axis < 4; ++axis) args.x_stride[axis] = x_stride[axis];
  args.r = pointer(r), args.b = pointer(b), args.state = pointer(state);
  args.n_floor = n_floor, args.clip_grad = clip_grad;
}

// What only the CUDA kernels take: the digits' members and the stream, then the scratch; and the teams.
// Members are in their order.
#ifdef XLSTM_BUILD_CUDA
#define XLSTM_FOR_CUDA(count) \
  , std::array<Address, count> for_cuda, std::array<int, 5> deal, std::array<Address, 3> for_teams

xlstm::RecurrenceTeams teams_of(const std::array<int, 5>& deal,
                                const std::array<Address, 3>& for_teams) {
  xlstm::RecurrenceTeams teams{deal[0], deal[1], deal[2], deal[3], deal[4] != 0};
  teams.flags = pointer<unsigned>(for_teams[0]);
  teams.exchange = pointer(for_teams[1]), teams.far = pointer(for_teams[2]);
  return teams;
}
#else
#define XLSTM_FOR_CUDA(count)
#endif

void recurrence_forward(int cell, int dtype, std::array<std::int64_t, 4> sizes, Address starts,
                        Address x, std::array<std::int64_t, 4> x_stride, Address r, Address b,
                        Address state, double n_floor, Address h, Address last, Address raw,
                        Address checkpoints XLSTM_FOR_CUDA(3)) {
  xlstm::RecurrenceForward args;
  fill(args, cell, dtype, sizes, starts, x, x_stride, r, b, state, n_floor, 0.0);
  args.h = pointer(h), args.last = pointer(last);
  args.raw = pointer(raw), args.checkpoints = pointer(checkpoints);
  py::gil_scoped_release unlocked;
#ifdef XLSTM_BUILD_CUDA
  xlstm::recurrence_forward_cuda(args, teams_of(deal, for_teams),
                                 {static_cast<DType>(for_cuda[0]), for_cuda[1] != 0},
                                 pointer(for_cuda[2]));
#else
  xlstm::recurrence_forward_cpu(args);
#endif
}

void recurrence_backward(int cell, int dtype, std::array<std::int64_t, 4> sizes, Address starts,
                         Address r, double n_floor, double clip_grad, Address raw,
                         Address checkpoints, Address dh, std::array<std::int64_t, 3> dh_stride,
                         Address dlast, Address dx, Address dr, Address db,
                         Address dstate XLSTM_FOR_CUDA(6)) {
  xlstm::RecurrenceBackward args;
  fill(args, cell, dtype, sizes, starts, 0, {}, r, 0, 0, n_floor, clip_grad);
  args.raw = pointer(raw), args.checkpoints = pointer(checkpoints);
  args.dh = pointer(dh), args.dlast = pointer(dlast);
  for (int axis = 0; axis < 3; ++axis) args.dh_stride[axis] = dh_stride[axis];
  args.dx = pointer(dx), args.dr = pointer(dr), args.db = pointer(db),
  args.dstate = pointer(dstate);
  py::gil_scoped_release unlocked;
#ifdef XLSTM_BUILD_CUDA
  xlstm::recurrence_backward_cuda(
      args, {pointer(for_cuda[3]), pointer(for_cuda[4]), pointer(for_cuda[5])},
      teams_of(deal, for_teams), {static_cast<DType>(for_cuda[0]), for_cuda[1] != 0},
      pointer(for_cuda[2]));
#else
  xlstm::recurrence_backward_cpu(args);
#endif
}

using Strides = std::array<std::int64_t, 2>;

// `kinds`, `numbers` and `results` in the order of the fields that they fill.
void fill(xlstm::RowLoss& args, std::array<int, 5> kinds, Strides rows, std::int64_t V,
          Address student, Strides student_stride, Address labels, std::int64_t ignore_index,
          Address row_weight, std::array<double, 7> numbers, std::array<Address, 4> results,
          Strides grad_stride) {
  args.divergence = static_cast<xlstm::Divergence>(kinds[0]);
  args.reduction = static_cast<xlstm::Reduction>(kinds[1]);
  args.student_dtype = static_cast<DType>(kinds[2]);
  args.grad_dtype = static_cast<DType>(kinds[3]);
  args.phase = static_cast<xlstm::Phase>(kinds[4]);
  args.V_student = V, args.student = pointer(student);
  for (int axis = 0; axis < 2; ++axis) {
    args.rows[axis] = rows[axis];
    args.student_stride[axis] = student_stride[axis];
    args.grad_stride[axis] = grad_stride[axis];
  }
  args.labels = pointer<const std::int64_t>(labels), args.ignore_index = ignore_index;
  args.row_weight = pointer(row_weight);
  args.temperature = numbers[0], args.mix = numbers[1];
  args.kl_weight = numbers[2], args.ce_weight = numbers[3];
  args.label_smoothing = numbers[4], args.z_loss = numbers[5], args.softcap = numbers[6];
  args.row_loss = pointer(results[0]), args.loss = pointer(results[1]);
  args.grad = pointer(results[2]), args.sums = pointer<xlstm::RowSums>(results[3]);
}

// What only the CUDA kernels take.
#ifdef XLSTM_BUILD_CUDA
#define XLSTM_ROWS_FOR_CUDA , Address counted, Address stream
#else
#define XLSTM_ROWS_FOR_CUDA
#endif

void kl_div(std::array<int, 5> kinds, Strides rows, std::int64_t V, Address student,
            Strides student_stride, Address labels, std::int64_t ignore_index, Address row_weight,
            std::array<double, 7> numbers, std::array<Address, 4> results, Strides grad_stride,
            int teacher_dtype, std::int64_t V_teacher, Address teacher, Strides teacher_stride,
            double teacher_softcap XLSTM_ROWS_FOR_CUDA) {
  xlstm::KlDiv args;
  fill(args, kinds, rows, V, student, student_stride, labels, ignore_index, row_weight, numbers,
       results, grad_stride);
  args.teacher_dtype = static_cast<DType>(teacher_dtype);
  args.V_teacher = V_teacher, args.teacher = pointer(teacher);
  for (int axis = 0; axis < 2; ++axis) args.teacher_stride[axis] = teacher_stride[axis];
  args.teacher_softcap = teacher_softcap;
  py::gil_scoped_release unlocked;
#ifdef XLSTM_BUILD_CUDA
  xlstm::kl_div_cuda(args, pointer(counted), pointer(stream));
#else
  xlstm::kl_div_cpu(args);
#endif
}

void topk_kl_div(std::array<int, 5> kinds, Strides rows, std::int64_t V, Address student,
                 Strides student_stride, Address labels, std::int64_t ignore_index,
                 Address row_weight, std::array<double, 7> numbers, std::array<Address, 4> results,
                 Strides grad_stride, int support, std::array<std::int64_t, 3> sizes,
                 std::array<Address, 4> target XLSTM_ROWS_FOR_CUDA) {
  xlstm::TopkKlDiv args;
  fill(args, kinds, rows, V, student, student_stride, labels, ignore_index, row_weight, numbers,
       results, grad_stride);
  args.support = static_cast<xlstm::Support>(support);
  args.V = sizes[0], args.first = sizes[1], args.K = sizes[2];
  args.logprobs = pointer(target[0]), args.ids = pointer<const std::int64_t>(target[1]);
  args.tail_logmass = pointer(target[2]), args.z_words = pointer<double>(target[3]);
  py::gil_scoped_release unlocked;
#ifdef XLSTM_BUILD_CUDA
  xlstm::topk_kl_div_cuda(args, pointer(counted), pointer(stream));
#else
  xlstm::topk_kl_div_cpu(args);
#endif
}

#ifdef XLSTM_BUILD_CPU

// Addresses come as lists in the order of the fields they fill.
using MLSTMStrides = std::array<std::array<std::int64_t, 3>, 5>;

void fill(xlstm::MLSTM& args, std::array<int, 3> kinds, std::array<std::int64_t, 6> sizes,
          std::array<double, 2> factors, Address starts, std::array<Address, 5> inputs,
          const MLSTMStrides& strides, std::array<Address, 5> saved) {
  args.dtype = static_cast<DType>(kinds[0]);
  args.input_gate = static_cast<xlstm::InputGate>(kinds[1]);
  args.normalizer = static_cast<xlstm::Normalizer>(kinds[2]);
  args.B = sizes[0], args.T = sizes[1], args.H = sizes[2], args.K = sizes[3], args.V = sizes[4];
  args.chunk = sizes[5];
  args.scale = factors[0], args.eps = factors[1];
  args.starts = pointer<const std::int32_t>(starts);
  args.q = pointer(inputs[0]), args.k = pointer(inputs[1]), args.v = pointer(inputs[2]);
  args.i = pointer(inputs[3]), args.f = pointer(inputs[4]);
  for (int axis = 0; axis < 3; ++axis) {
    args.q_stride[axis] = strides[0][axis], args.k_stride[axis] = strides[1][axis];
    args.v_stride[axis] = strides[2][axis], args.i_stride[axis] = strides[3][axis];
    args.f_stride[axis] = strides[4][axis];
  }
  args.row_m = pointer(saved[0]), args.row_den = pointer(saved[1]);
  args.c_saved = pointer(saved[2]), args.n_saved = pointer(saved[3]);
  args.m_saved = pointer(saved[4]);
}

void mlstm_forward(std::array<int, 3> kinds, std::array<std::int64_t, 6> sizes,
                   std::array<double, 2> factors, Address starts, std::array<Address, 5> inputs,
                   const MLSTMStrides& strides, std::array<Address, 5> saved,
                   std::array<Address, 3> state, std::array<Address, 4> outputs) {
  xlstm::MLSTMForward args;
  fill(args, kinds, sizes, factors, starts, inputs, strides, saved);
  args.c = pointer(state[0]), args.n = pointer(state[1]), args.m = pointer(state[2]);
  args.h = pointer(outputs[0]);
  args.c_last = pointer(outputs[1]), args.n_last = pointer(outputs[2]);
  args.m_last = pointer(outputs[3]);
  py::gil_scoped_release unlocked;
  xlstm::mlstm_forward_cpu(args);
}

void mlstm_backward(std::array<int, 3> kinds, std::array<std::int64_t, 6> sizes,
                    std::array<double, 2> factors, Address starts, std::array<Address, 5> inputs,
                    const MLSTMStrides& strides, std::array<Address, 5> saved, Address dh,
                    std::array<std::int64_t, 3> dh_stride, std::array<Address, 3> dlast,
                    std::array<Address, 5> dinputs, std::array<Address, 3> dstate) {
  xlstm::MLSTMBackward args;
  fill(args, kinds, sizes, factors, starts, inputs, strides, saved);
  args.dh = pointer(dh);
  for (int axis = 0; axis < 3; ++axis) args.dh_stride[axis] = dh_stride[axis];
  args.dc_last = pointer(dlast[0]), args.dn_last = pointer(dlast[1]);
  args.dm_last = pointer(dlast[2]);
  args.dq = pointer(dinputs[0]), args.dk = pointer(dinputs[1]), args.dv = pointer(dinputs[2]);
  args.di = pointer(dinputs[3]), args.df = pointer(dinputs[4]);
  args.dc = pointer(dstate[0]), args.dn = pointer(dstate[1]), args.dm = pointer(dstate[2]);
  py::gil_scoped_release unlocked;
  xlstm::mlstm_backward_cpu(args);
}

// `kinds` go on with the dtypes of i, f and c; `sizes` are B, T, H, K, V.
void mlstm_step(std::array<int, 6> kinds, std::array<std::int64_t, 5> sizes,
                std::array<double, 2> factors, std::array<Address, 5> inputs,
                const MLSTMStrides& strides, const std::vector<std::int64_t>& from,
                const std::vector<std::int64_t>& to, std::array<Address, 3> state,
                std::array<std::int64_t, 3> from_stride, std::array<Address, 4> outputs,
                std::array<std::int64_t, 3> to_stride) {
  xlstm::MLSTMStep args;
  fill(args, {kinds[0], kinds[1], kinds[2]}, {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], 1},
       factors, 0, inputs, strides, {});
  args.i_dtype = static_cast<DType>(kinds[3]), args.f_dtype = static_cast<DType>(kinds[4]);
  args.c_dtype = static_cast<DType>(kinds[5]);
  args.from = from.empty() ? nullptr : from.data(), args.to = to.empty() ? nullptr : to.data();
  args.c = pointer(state[0]), args.n = pointer(state[1]), args.m = pointer(state[2]);
  for (int part = 0; part < 3; ++part) {
    args.from_stride[part] = from_stride[part], args.to_stride[part] = to_stride[part];
  }
  args.h = pointer(outputs[0]);
  args.c_last = pointer(outputs[1]), args.n_last = pointer(outputs[2]);
  args.m_last = pointer(outputs[3]);
  py::gil_scoped_release unlocked;
  xlstm::mlstm_step_cpu(args);
}

// Asks the kernel for huge pages before the first touch of a fresh buffer: one fault per 2 MiB, not
// per 4 KiB. Advice only, so a refusal changes nothing.
void advise_huge_pages(Address address, std::int64_t size_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr Address kPage = Address{1} << 21;
  const Address begin = (address + kPage - 1) & ~(kPage - 1);
  const Address end = (address + static_cast<Address>(size_bytes)) & ~(kPage - 1);
  if (end > begin) ::madvise(pointer(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)size_bytes;
#endif
}

void set_thread_pool(Address parallel_for, Address get_num_threads) {
  xlstm::g_parallel_for = reinterpret_cast<xlstm::ParallelFor>(parallel_for);
  xlstm::g_get_num_threads = reinterpret_cast<xlstm::GetNumThreads>(get_num_threads);
}

// Names and numbers of states, in the order of the numbers that recurrence_forward takes.
py::dict cells() {
  py::dict found;
#define XLSTM_CELL_ITEM(name, type, states) found[#name] = states;
  XLSTM_CELLS(XLSTM_CELL_ITEM)
#undef XLSTM_CELL_ITEM
  return found;
}

#endif  // XLSTM_BUILD_CPU

#ifdef XLSTM_BUILD_CUDA

// [{"name": ..., "arch": ..., "memory_bytes": ..., ...}]
py::list devices() {
  py::list found;
  for (const xlstm::CudaDevice& device : xlstm::cuda_devices()) {
    found.append(py::dict(py::arg("name") = device.name, py::arg("arch") = device.arch,
                          py::arg("memory_bytes") = device.memory_bytes,
                          py::arg("multiprocessors") = device.multiprocessors,
                          py::arg("shared_bytes") = device.shared_bytes));
  }
  return found;
}

// [{"team": ..., "direction": ..., "operand": dtype code, "D": ..., ...}]
py::list recurrence_launch_shapes() {
  py::list found;
  const auto add = [&](bool team, const xlstm::RecurrenceLaunchShape& shape) {
    found.append(py::dict(
        py::arg("team") = team, py::arg("direction") = shape.forward ? "forward" : "backward",
        py::arg("operand") = static_cast<int>(shape.operand), py::arg("D") = shape.D,
        py::arg("threads") = shape.threads, py::arg("fragments") = shape.fragments,
        py::arg("held") = shape.held, py::arg("shared_bytes") = shape.shared_bytes,
        py::arg("cluster") = shape.cluster));
  };
  for (const auto& shape : xlstm::recurrence_launch_shapes()) add(false, shape);
  for (const auto& shape : xlstm::recurrence_team_shapes()) add(true, shape);
  return found;
}

// How a row is cut for a loss that looks at `rows` of them together.
py::dict row_shape(int shared_bytes, bool clusters, std::int64_t columns, int per_vector,
                   int rows) {
  const xlstm::RowShape shape =
      xlstm::row_shape({shared_bytes, 1024, clusters}, columns, per_vector, {rows, 0, 0});
  return py::dict(py::arg("blocks") = shape.blocks, py::arg("threads") = shape.threads,
                  py::arg("slice") = shape.slice, py::arg("kept") = shape.kept,
                  py::arg("shared_bytes") = shape.shared_bytes);
}

#endif  // XLSTM_BUILD_CUDA

// `stream` is for CUDA alone.
void scale_rows(int dtype, std::array<std::int64_t, 2> sizes, Address x, std::int64_t x_stride,
                Address scale, [[maybe_unused]] Address stream) {
  xlstm::ScaleRows args;
  args.dtype = static_cast<DType>(dtype);
  args.N = sizes[0], args.V = sizes[1];
  args.x = pointer(x), args.x_stride = x_stride;
  args.scale = pointer(scale);
  py::gil_scoped_release unlocked;
#ifdef XLSTM_BUILD_CUDA
  xlstm::scale_rows_cuda(args, pointer(stream));
#else
  xlstm::scale_rows_cpu(args);
#endif
}

}  // namespace

PYBIND11_MODULE(XLSTM_MODULE, m) {
#ifdef XLSTM_BUILD_CPU
  m.def("set_thread_pool", &set_thread_pool,
        "Addresses of torch_parallel_for and torch_get_num_threads, or 0 to run serially");
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("supported_isas", &xlstm::supported_isas, "Instruction sets of this build on this CPU");
  m.def("current_isa", &xlstm::current_isa);
  m.def("set_isa", &xlstm::set_isa);
  m.def("num_threads", &xlstm::XLSTM_ISA::num_threads);
  m.def("has_thread_pool", [] { return xlstm::g_parallel_for != nullptr; });
  m.def("cells", &cells);
  m.def("mlstm_forward", &mlstm_forward);
  m.def("mlstm_backward", &mlstm_backward);
  m.def("mlstm_step", &mlstm_step);
  m.attr("checkpoint_interval") = xlstm::kCheckpointInterval;
  m.attr("state_interval") = xlstm::kStateInterval;
#endif
  m.def("kl_div", &kl_div);
  m.def("topk_kl_div", &topk_kl_div);
  m.def("recurrence_forward", &recurrence_forward);
  m.def("recurrence_backward", &recurrence_backward);
#ifdef XLSTM_BUILD_CUDA
  m.def("recurrence_launch_shapes", &recurrence_launch_shapes);
  m.def("row_shape", &row_shape);
  m.def("archs", &xlstm::cuda_archs, "Compute capabilities inside; the last one as PTX too");
  m.def("devices", &devices);
  m.attr("runtime_version") = xlstm::cuda_runtime_version();
#endif
#ifdef XLSTM_EMULATED
  m.def(
      "set_chip",
      [](int capability, int shared_bytes) {
        xlstm::emulator::g_chip = {capability, static_cast<std::size_t>(shared_bytes)};
      },
      "What launches may ask for from here on, for tests of how they choose");
#endif
  m.def("scale_rows", &scale_rows);
  m.attr("compiler") = XLSTM_COMPILER;
  m.attr("sanitizers") = XLSTM_SANITIZERS;
}
