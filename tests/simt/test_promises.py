"""What the kernels of memory-bound operators promise, by the CUDA kernels, every one under AddressSanitizer."""

# ruff: noqa: F403 (the promises that are imported run here)
from kernel_promises import *
from places import Places, leave_out

from .emulator import Emulated

HERE = Places("emulator", (Emulated("address"),))
leave_out(
    globals(),
    {
        "the CUDA convolution has no backward, which the check of the answer and of ReLU are about": [
            "non_finite_values_propagate_as_in_torch",
            "relu_passes_the_gradient_of_all_but_values_up_to_zero",
            "same_answer_of_a_single_image",
        ],
        "kernels are called with dense tensors of 4 dimensions": ["any_input_gets_the_same_answer"],
        "every LRN of the emulator has these constants, windows and groups": [
            "same_answer_for_every_constant_of_lrn",
            "same_answer_for_small_and_large_values",
            "every_window_also_even_and_wider_than_the_channels",
            "groups_do_not_see_each_other",
        ],
    },
)
