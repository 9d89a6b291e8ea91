// What core.cpp is to the GPU, as plain loops: y = x W^T + u B^T (+ bias) and the shrink by TMA, where gemm_tail.cuh
// and shrink_tma.cu cannot run; what those need of their operands is checked.

#include "../../csrc/device.cuh"

#include <utility>

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
      static_cast<T*>(p.y.data)[t * p.y.row + n * p.y.column] = T{rounded<T>(sum)};
    }
  }
}

template <class T>
void shrink(loraxs_shrink_args const& p) {
  auto const R = [&](int64_t o, int64_t i) { return static_cast<float const*>(p.R.data)[o * p.R.row + i * p.R.column]; };
  for (int64_t t = 0; t < p.T; ++t) {
    float* const z = p.z + t * p.r;
    for (int64_t i = 0; i < p.r; ++i) {
      z[i] = 0;
      for (int64_t k = 0; k < p.K; ++k) z[i] += at<T>(p.x, t, k) * at<T>(p.A, i, k);
    }
    for (int64_t o = 0; o < p.u.row; ++o) {
      float u = 0;
      for (int64_t i = 0; o < p.r && i < p.r; ++i) u += z[i] * R(o, i);
      static_cast<T*>(p.u.data)[t * p.u.row + o] = T{rounded<T>(p.s * u)};
    }
  }
  for (int64_t block = 0; p.other && block * LORAXS_SHRINK_ROWS < p.T; ++block) {
    for (int64_t at = 0; at < p.r * p.r; ++at) {
      float sum = 0;
      for (int64_t t = block * LORAXS_SHRINK_ROWS; t < std::min(p.T, (block + 1) * LORAXS_SHRINK_ROWS); ++t) {
        sum += p.z[t * p.r + at / p.r] * p.other[t * p.r + at % p.r];
      }
      p.gram[block * p.r * p.r + at] = p.s * sum;
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
  for (int64_t unit = 0; p.ready && 128 * unit < p.T; ++unit) {
    if (p.ready[unit] != 2) return LORAXS_NO_SUCH_KERNEL;
  }
  p.type == LORAXS_BF16 ? run<bf16>(p) : run<fp16>(p);
  return LORAXS_OK;
}

extern "C" int loraxs_shrink_tma(const loraxs_shrink_args* args) {
  using namespace loraxs;
  auto const& p = *args;
  if (!fits(p.x, false) || !fits(p.A, p.transposed) || p.r > 64 || p.programs < 1) return LORAXS_NO_SUCH_KERNEL;
  p.type == LORAXS_BF16 ? shrink<bf16>(p) : shrink<fp16>(p);
  for (int64_t unit = 0; p.ready && 128 * unit < p.T; ++unit) p.ready[unit] = 2;
  return LORAXS_OK;
}

// How many times more than once eight lanes had to take turns in shared memory, since it was asked last.
extern "C" __attribute__((visibility("default"))) long emulator_conflicts(void) {
  return std::exchange(loraxs::emulator::conflicts, 0);
}

extern "C" int loraxs_ready(void) { return LORAXS_OK; }

extern "C" const char* loraxs_message(int status) {
  if (status == loraxs::emulator::kFailed) return loraxs::emulator::failure.c_str();
  return status ? "operands it cannot be called with" : "no error";
}

// What -fsanitize=alignment, with which the kernels are compiled, calls in place of its own library.
extern "C" void __ubsan_handle_type_mismatch_v1(void* what, uintptr_t address) {
  struct Place {
    char const* file;
    uint32_t line, column;
  } const& at = *static_cast<Place const*>(what);
  char text[64];
  std::snprintf(text, sizeof text, ":%u: not aligned: %#lx", at.line, static_cast<unsigned long>(address));
  loraxs::emulator::fail(at.file + std::string(text));
}

extern "C" const char* loraxs_architectures(void) { return "90a"; }
