"""Implementations for CPU: the C++ kernels of ``csrc/cpu``, and oneDNN."""
