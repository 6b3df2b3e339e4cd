"""Direct convolution, as in tests/ops, on ARM."""

# ruff: noqa: F403 (the tests that are imported run here)
from ops.test_direct_convolution import *
from places import leave_out

leave_out(globals(), {"guard pages are of this machine": ["nothing_is_read_or_written_out_of_bounds"]})
