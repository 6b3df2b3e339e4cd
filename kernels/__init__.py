"""Triton kernels, one file an operator; installed as ``fastcnn.kernels``."""
