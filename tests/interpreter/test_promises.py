"""What every operator promises, by the Triton kernels, on small and awkward shapes."""

# ruff: noqa: F403 (the promises that are imported run here)
import pytest
from kernel_promises import *
from operator_promises import *
from places import LEFT_TO_OPS, Place, Places, leave_out

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on infinities and NaN
HERE = Places("interpreter", (Place("triton"),))
leave_out(
    globals(),
    {
        **LEFT_TO_OPS,
        "the interpreter runs one program at a time, in numpy's memory": [
            "many_python_threads_at_once",
            "no_kernel_reads_or_writes_out_of_bounds",
        ],
        "its kernels have no vectors of channels and rows, whose ends the many sizes are for": [
            "every_channel_count_and_width",
            "same_answer_for_small_and_large_values",
            "same_answer_for_every_pool_after_lrn",
        ],
    },
)
