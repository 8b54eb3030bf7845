// Compiled with -mavx512f -mavx512dq -mavx512vl -mavx512bw.
#define DETRS_KERNELS kernels_avx512
#define DETRS_NAME "avx512"
#define DETRS_VECTOR_BYTES 64
#include "kernel_code.h"
