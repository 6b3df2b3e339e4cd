"""Launchers of the Triton kernels of ``kernels/``, and their configurations."""
