"""Triton kernels, one file per operator; installed as ``fastcnn.kernels``.

What a kernel is compiled for comes in its parameters ``lrn``, ``pool``, ``conv`` and ``layout``, which are the named
tuples of ``fastcnn/ops/triton/parameters.py``.
"""
