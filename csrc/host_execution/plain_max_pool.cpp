// The kernels of max_pool.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/plain/max_pool.cu"
