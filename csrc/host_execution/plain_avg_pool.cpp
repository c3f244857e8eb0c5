// The kernels of avg_pool.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/plain/avg_pool.cu"
