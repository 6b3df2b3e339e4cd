"""Implementations by cuDNN."""
