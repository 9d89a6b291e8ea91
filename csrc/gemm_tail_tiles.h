/* The tiles the GEMM is built for: number, BLOCK_T, BLOCK_N, programs that share a tile of W, schedule.
   loraxs_kernels/backends/cuda/config.py picks one by its number; CMakeLists.txt builds each four times (two types, two
   ways W lies), half a minute each.  128 x 256 reads least; 128 x 128 leaves fewer programs idle, and on an H100 is
   the faster one for many rows, too (bench/results/NOTES.md). */

#define LORAXS_TILES(tile)          \
  tile(0, 128, 256, 2, Cooperative) \
  tile(1, 128, 128, 2, Pingpong)
