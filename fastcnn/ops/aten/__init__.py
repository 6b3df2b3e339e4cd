"""Implementations in plain PyTorch, which run anywhere."""
