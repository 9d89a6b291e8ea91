/* The CUDA core's interface: plain data in, a status out.  It knows no torch and keeps nothing between calls.

   Letters as everywhere: x (T, K), W (N, K), A (r, K), R (r, r), B (N, r), y (T, N); z = x A^T, u = s z R^T.  All sizes
   and strides count elements.  Pointers are device pointers.  Nothing here is checked but what only the CUDA runtime
   can know: loraxs_kernels/backends/cuda checks operands before it calls. */

#ifndef LORAXS_H
#define LORAXS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LORAXS_API __attribute__((visibility("default")))

typedef struct CUstream_st* loraxs_stream;

/* Element types. */
enum { LORAXS_BF16 = 0, LORAXS_FP16 = 1, LORAXS_FP32 = 2 };

/* The order in which programs take the tiles of y: down its columns (T), along its rows (N), or (AUTO) CUTLASS chooses:
   down the columns where y has more tiles from left to right than from top to bottom, else along the rows.  In bands of
   `swizzle` tiles, so that neighbours share tiles of x and of W in the L2 cache; the number of tiles is rounded up to
   whole bands both ways. */
enum { LORAXS_RASTER_AUTO = 0, LORAXS_RASTER_T = 1, LORAXS_RASTER_N = 2 };

/* A status: 0, a cudaError_t, or one of these. */
enum { LORAXS_OK = 0, LORAXS_NO_SUCH_KERNEL = -1, LORAXS_NOT_BUILT_FOR = -2, LORAXS_NOT_DESCRIBED = -3 };

/* A matrix as it lies: element (i, j) is at data + i * row + j * column. */
typedef struct {
  void* data;
  int64_t row, column;
} loraxs_matrix;

/* y = x W^T + u B^T (+ bias), for capability 9.0.  W.data = 0: without W.
   The last dimensions of x, u and y are contiguous; W and B both have contiguous rows (transposed = 0) or both
   contiguous columns (1).  Bases and pitches are multiples of 16 bytes.  What lies between r and the pitch is not read. */
typedef struct {
  int64_t T, N, K, r;
  loraxs_matrix x, W, u, B, y;
  const void* bias;   /* (N) or 0 */
  int type;           /* of everything */
  int transposed;     /* which way W and B lie */
  int tile;           /* a row of gemm_tail_tiles.h */
  int overlap;        /* start before the launch that makes u has ended */
  int swizzle;        /* tiles of a band across the raster: 1, 2, 4 or 8, see LORAXS_RASTER_ */
  int raster;         /* LORAXS_RASTER_ */
  int multiprocessors; /* how many the launch may take */
  const uint32_t* ready; /* of a loraxs_shrink_tma just before, which may still run: wait for its rows, not for its end */
  loraxs_stream stream;
} loraxs_gemm_tail_args;

/* z = x A^T (T, r) fp32; u = s z R^T (T, u.row) in the type of x, zero from column r on; gram = s z^T other (r, r), one
   for each block of LORAXS_SHRINK_ROWS rows, where other (T, r) fp32 is given.  r <= 64, capability 8.0 on.
   x has contiguous rows, A contiguous rows (transposed = 0) or columns (1); bases and pitches are multiples of 16
   bytes.  With split > 1 programs share K, leave their part of z in parts (split, T, r), and a second launch adds those
   up in order. */
#define LORAXS_SHRINK_ROWS 64
typedef struct {
  int64_t T, K, r;
  loraxs_matrix x, A, R, u;
  const float* other; /* contiguous, or 0 */
  float *z, *gram, *parts;
  float s;
  int type;           /* of x, A and u; R is fp32 */
  int transposed;     /* which way A lies */
  int split;
  int overlap;        /* let the next launch start early, and the second of two */
  int programs;       /* of loraxs_shrink_tma: how many, each of which takes a multiprocessor */
  uint32_t* ready;    /* of loraxs_shrink_tma: one for each 128 rows, 2 once their u is written; or 0 */
  loraxs_stream stream;
#ifdef LORAXS_TRACE
  void* trace;        /* the core's own */
#endif
} loraxs_shrink_args;

/* y = (y +) s R[index] x A^T B^T (+ bias) and z = x A^T for T <= 64 rows, r <= 128, in one launch, capability 8.0 on.
   Any strides.  Token t uses R + index[t] * R_next, none where index[t] is -1; without an index all use R.
   What is not finite in a token's x or R reaches no other token's y; an infinity may be a NaN there. */
typedef struct {
  int64_t T, N, K, r;
  loraxs_matrix x, A, R, B, y;
  int64_t R_next;
  const int32_t* index; /* (T) or 0 */
  const void* bias;     /* (N) or 0 */
  float* z;             /* (T, r) contiguous, or 0 */
  float s;
  int type;             /* of x, A, B, bias and y */
  int R_type;
  int add;              /* whether to y as it is */
  int cluster;          /* programs that share the sum over K: 1, or up to 8 from capability 9.0 on */
  int clusters;         /* how many such groups share N */
  loraxs_stream stream;
#ifdef LORAXS_TRACE
  void* trace;          /* the core's own */
#endif
} loraxs_decode_args;

LORAXS_API int loraxs_gemm_tail(const loraxs_gemm_tail_args* args);
LORAXS_API int loraxs_shrink(const loraxs_shrink_args* args);
/* The same for capability 9.0, in one launch, without split and parts: `programs` take the rows in order.  The next launch
   may start at once. */
LORAXS_API int loraxs_shrink_tma(const loraxs_shrink_args* args);
LORAXS_API int loraxs_decode(const loraxs_decode_args* args);

/* Whether the driver here can run what the core was built with; asks for no device and makes no context. */
LORAXS_API int loraxs_ready(void);

/* A sentence about a status. */
LORAXS_API const char* loraxs_message(int status);

/* The architectures it was built for: "80;90a". */
LORAXS_API const char* loraxs_architectures(void);

#ifdef __cplusplus
}
#endif

#endif
