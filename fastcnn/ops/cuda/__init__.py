"""Implementations by the CUDA C++ kernels of ``csrc/cuda``."""
