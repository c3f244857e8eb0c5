// The kernels of conv_forward.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/plain/conv_forward.cu"
