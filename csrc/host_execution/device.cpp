// device.cu as C++, for the library that executes kernels on the CPU (library.cpp).
#include "kernels/device.cu"
