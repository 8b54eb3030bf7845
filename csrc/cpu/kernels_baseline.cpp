// Compiled for the default target of the compiler: SSE2 on x86-64, NEON on arm64.
#define DETRS_KERNELS kernels_baseline
#define DETRS_NAME "baseline"
#define DETRS_VECTOR_BYTES 16
#include "kernel_code.h"
