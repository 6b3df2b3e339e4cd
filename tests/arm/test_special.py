"""What is special to the kernels of single operators, as in tests/ops, on ARM."""

# ruff: noqa: F401 (the tests that are imported run here)
from ops.test_conv2d_relu import test_fingerprint_sees_every_change
from ops.test_lrn import test_nan_gradient_stays_in_its_windows_like_torch
from ops.test_max_pool2d import test_zeros_keep_the_sign_that_torch_gives_them, test_zeros_of_both_signs_are_ties
from ops.test_relu_lrn_max_pool2d import (
    test_argmax_is_one_byte_for_up_to_256_places,
    test_ties_of_normalized_zeros_go_to_the_first_element,
    test_window_without_any_element_is_minus_infinity_and_gets_no_gradient,
)
