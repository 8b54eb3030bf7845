// Compiled with -mavx2 -mfma.
#define DETRS_KERNELS kernels_avx2
#define DETRS_NAME "avx2"
#define DETRS_VECTOR_BYTES 32
#include "kernel_code.h"
