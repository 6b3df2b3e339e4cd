"""What the kernels of every operator promise, by the Triton and by the CUDA kernels on a GPU, at few larger sizes."""

# ruff: noqa: F401 (the promises that are imported run here; of the others, a GPU would say what the CPU says)
import pytest
from kernel_promises import test_same_answer
from operator_promises import test_same_bits_in_every_run_and_for_every_number_of_threads
from places import Place, Places

pytestmark = pytest.mark.gpu
HERE = Places("gpu", (Place("triton", "cuda"), Place("cuda", "cuda")))
