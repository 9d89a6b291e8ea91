/* The tiles the GEMM is built for: number, BLOCK_T, BLOCK_N, programs that share a tile of W, schedule.
   loraxs_kernels/backends/cuda/config.py picks one by its number; CMakeLists.txt builds each four times (two types, two
   ways W lies), half a minute each.  128 x 256 reads least; 128 x 128 leaves fewer programs idle, and on an H100 is
   the faster one for many rows, too (bench/results/NOTES.md).

   What a program reads from L2 for 64 columns of the sum: 128 rows of x, 16 KB, and its half of a tile of W, which the
   two programs hand each other.  Rates at 635 TFLOP/s, which the library reaches; bytes for T = 8192, N = K = 4096:
       128 x 256   16 + 16 KB   128 flop a byte   5.0 TB/s   2.1 GB in 1024 tiles
       128 x 128   16 +  8 KB    85 flop a byte   7.4 TB/s   3.2 GB in 2048 tiles */

#define LORAXS_TILES(tile)          \
  tile(0, 128, 256, 2, Cooperative) \
  tile(1, 128, 128, 2, Pingpong)
