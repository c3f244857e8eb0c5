// The kernels of conv_input_grad.cu as C++, for the library that executes them on the CPU (library.cpp).
#include "kernels/plain/conv_input_grad.cu"
