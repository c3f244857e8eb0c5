// The kernels of copy/compress.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/copy/compress.cu"
