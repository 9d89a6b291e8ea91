// The core for Python.  Nothing is checked here that Python has checked, and nothing is kept.
//
// A matrix is (address, row stride, column stride), None: none.  A failed call raises RuntimeError with CUDA's own words.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "loraxs.h"
#include "trace.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) { return reinterpret_cast<T*>(address); }

loraxs_stream stream(Address address) { return reinterpret_cast<loraxs_stream>(address); }

loraxs_matrix matrix(py::handle from) {
  if (from.is_none()) return {};
  auto const found = py::reinterpret_borrow<py::tuple>(from);
  return {pointer<void>(found[0].cast<Address>()), found[1].cast<int64_t>(), found[2].cast<int64_t>()};
}

void require(int status, const char* kernel) {
  if (status == LORAXS_OK) return;
  throw std::runtime_error(std::string("loraxs ") + kernel + ": " + loraxs_message(status));
}

void gemm_tail(int64_t T, int64_t N, int64_t K, int64_t r, py::handle x, py::handle W, py::handle u, py::handle B,
               py::handle y, Address bias, int type, bool transposed, int tile, bool overlap, int swizzle, int raster,
               int multiprocessors, Address ready, Address at) {
  loraxs_gemm_tail_args args{T, N, K, r, matrix(x), matrix(W), matrix(u), matrix(B), matrix(y), pointer<void>(bias),
                             type, transposed, tile, overlap, swizzle, raster, multiprocessors,
                             pointer<uint32_t>(ready), stream(at)};
  require(loraxs_gemm_tail(&args), "gemm_tail");
}

void shrink(int64_t T, int64_t K, int64_t r, py::handle x, py::handle A, py::handle R, py::handle u, Address other,
            Address z, Address gram, Address parts, float s, int type, bool transposed, int split, bool overlap,
            Address at) {
  loraxs_shrink_args args{T, K, r, matrix(x), matrix(A), matrix(R), matrix(u), pointer<float>(other), pointer<float>(z),
                          pointer<float>(gram), pointer<float>(parts), s, type, transposed, split, overlap, 0, nullptr, stream(at)};
  require(loraxs_shrink(&args), "shrink");
}

void shrink_tma(int64_t T, int64_t K, int64_t r, py::handle x, py::handle A, py::handle R, py::handle u, Address other,
                Address z, Address gram, float s, int type, bool transposed, int programs, Address ready, Address at) {
  loraxs_shrink_args args{T, K, r, matrix(x), matrix(A), matrix(R), matrix(u), pointer<float>(other), pointer<float>(z),
                          pointer<float>(gram), nullptr, s, type, transposed, 1, true, programs, pointer<uint32_t>(ready),
                          stream(at)};
  require(loraxs_shrink_tma(&args), "shrink_tma");
}

void decode(int64_t T, int64_t N, int64_t K, int64_t r, py::handle x, py::handle A, py::handle R, py::handle B,
            py::handle y, int64_t R_next, Address index, Address bias, Address z, float s, int type, int R_type, bool add,
            int cluster, int clusters, Address at) {
  loraxs_decode_args args{T, N, K, r, matrix(x), matrix(A), matrix(R), matrix(B), matrix(y), R_next,
                          pointer<int32_t>(index), pointer<void>(bias), pointer<float>(z), s, type, R_type, add, cluster,
                          clusters, stream(at)};
  require(loraxs_decode(&args), "decode");
}

#ifdef LORAXS_TRACE
void trace(Address memory, int64_t count) { require(loraxs_trace(pointer<void>(memory), count), "trace"); }
#endif

// Why the driver here cannot run the core; None: it can.
py::object not_ready() {
  int const status = loraxs_ready();
  return status == LORAXS_OK ? py::object(py::none()) : py::object(py::str(loraxs_message(status)));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The CUDA core; csrc/loraxs.h says what each function computes.";
  m.def("gemm_tail", &gemm_tail);
  m.def("shrink", &shrink);
  m.def("shrink_tma", &shrink_tma);
  m.def("decode", &decode);
  m.def("not_ready", &not_ready);
  LORAXS_TRACED(m.def("trace", &trace);)
  m.attr("architectures") = loraxs_architectures();
}
