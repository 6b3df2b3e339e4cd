"""What every operator promises, by the C++ kernels on ARM."""

# ruff: noqa: F403 (the promises that are imported run here)
from kernel_promises import *
from operator_promises import *
from places import LEFT_TO_OPS, Place, Places, leave_out

HERE = Places("cpu", (Place("cpu"),))
leave_out(
    globals(),
    {
        **LEFT_TO_OPS,
        "guard pages are of this machine": ["no_kernel_reads_or_writes_out_of_bounds"],
    },
)
