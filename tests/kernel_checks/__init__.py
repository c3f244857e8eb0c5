"""Checks of the CUDA operators that take the operator namespace and the device as arguments.

tests/host_execution runs them on the kernels executed by the CPU, tests/ops_cuda on a GPU.
"""
