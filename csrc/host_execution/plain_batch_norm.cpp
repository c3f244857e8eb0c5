// The kernels of batch_norm.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/plain/batch_norm.cu"
