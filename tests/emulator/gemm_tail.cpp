// What core.cpp is to the GPU: y = x W^T + u B^T (+ bias) (+ y) as plain loops, where the GEMM of gemm_tail.cuh cannot
// run; what that needs of its operands is checked.

#include "../../csrc/device.cuh"

namespace loraxs {
namespace {

template <class T>
float at(loraxs_matrix const& m, int64_t i, int64_t j) {
  return widen(static_cast<T const*>(m.data)[i * m.row + j * m.column]);
}

bool fits(loraxs_matrix const& m, bool transposed) {
  int64_t const pitch = transposed ? m.column : m.row, inner = transposed ? m.row : m.column;
  return inner == 1 && pitch % 8 == 0 && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <class T>
void run(loraxs_gemm_tail_args const& p) {
  for (int64_t t = 0; t < p.T; ++t) {
    for (int64_t n = 0; n < p.N; ++n) {
      float sum = 0;
      for (int64_t k = 0; p.W.data && k < p.K; ++k) sum += at<T>(p.x, t, k) * at<T>(p.W, n, k);
      for (int64_t i = 0; i < p.r; ++i) sum += at<T>(p.u, t, i) * at<T>(p.B, n, i);
      if (p.bias) sum += widen(static_cast<T const*>(p.bias)[n]);
      if (p.add) sum += at<T>(p.y, t, n);
      static_cast<T*>(p.y.data)[t * p.y.row + n * p.y.column] = T{rounded<T>(sum)};
    }
  }
}

}  // namespace
}  // namespace loraxs

extern "C" int loraxs_gemm_tail(const loraxs_gemm_tail_args* args) {
  using namespace loraxs;
  auto const& p = *args;
  bool good = fits(p.u, false) && fits(p.B, p.transposed) && fits(p.y, false);
  if (p.W.data) good = good && fits(p.x, false) && fits(p.W, p.transposed);
  bool const ordered = p.swizzle >= 1 && p.raster >= LORAXS_RASTER_AUTO && p.raster <= LORAXS_RASTER_N;
  if (!good || !ordered || p.multiprocessors < 1) return LORAXS_NO_SUCH_KERNEL;
  p.type == LORAXS_BF16 ? run<bf16>(p) : run<fp16>(p);
  return LORAXS_OK;
}

extern "C" int loraxs_ready(void) { return LORAXS_OK; }

extern "C" const char* loraxs_message(int status) { return status ? "operands it cannot be called with" : "no error"; }
extern "C" const char* loraxs_architectures(void) { return "90a"; }
