"""What every operator promises, by plain PyTorch and by the C++ kernels at each CPU capability."""

# ruff: noqa: F403 (the promises that are imported run here)
from kernel_promises import *
from operator_promises import *
from places import on_cpu

HERE = on_cpu()
