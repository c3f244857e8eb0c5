// The kernels of copy/strided.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/copy/strided.cu"
