"""What every operator promises, by the C++ kernels on ARM."""

# ruff: noqa: F403 (the promises that are imported run here)
from kernel_promises import *
from operator_promises import *
from places import Place, Places, leave_out

HERE = Places("cpu", (Place("cpu"),))
leave_out(
    globals(),
    {
        "tracers, transforms and autograd see the same ops, whatever runs in them: tests/ops": [
            "compile_without_graph_break",
            "compile_with_inductor",
            "export_with_gradients",
            "autocast_keeps_the_dtype_of_the_input",
            "vmap",
            "vmap_of_backward",
            "func_transforms_nest",
            "double_backward_is_that_of_torch",
            "gradcheck_and_gradgradcheck",
            "checkpointing_and_retained_graphs",
            "change_in_place_before_backward",
            "layer_survives_pickling_and_deepcopy",
            "meta_tensors_have_shape_and_strides",
        ],
        "arguments are checked before there is a backend: tests/ops": [
            "wrong_rank_raises_as_torch",
            "other_dtypes_raise",
            "sparse_input_raises",
            "input_that_is_no_tensor_raises_as_torch",
        ],
        "guard pages are of this machine": ["no_kernel_reads_or_writes_out_of_bounds"],
    },
)
