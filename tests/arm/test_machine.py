"""The ops run on ARM, and errors of the kernels are found there."""

import pytest
import torch
from promises import assert_bitwise, running_on

import fastcnn.functional as FF

from .machine import OPS, MachineError

fingerprint = torch.ops.fastcnn_cpu.fingerprint


def test_the_program_is_for_arm(machine):
    aarch64 = 183  # of ELF
    assert int.from_bytes(machine.program.read_bytes()[18:20], "little") == aarch64


def test_all_ops_but_the_allocator_run_there():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcnn_cpu::")}
    assert names == {f"fastcnn_cpu::{name}" for name in (*OPS, "kept_like")}


def test_the_ops_run_there_and_only_while_it_is_in_use(machine, monkeypatch):
    calls, call = [], machine.call
    monkeypatch.setattr(machine, "call", lambda op, *args: calls.append(op) or call(op, *args))
    x = torch.arange(1000.0)
    with machine.in_use():
        there = fingerprint(x)
    assert calls == [fingerprint.default]
    with running_on("cpu-baseline"):
        assert there == fingerprint(x)


def test_the_glue_of_an_op_refuses_there_what_it_refuses_here():
    with pytest.raises(RuntimeError, match=r"fingerprint_op\.cpp:\d+, the tensor must be contiguous"):
        fingerprint(torch.zeros(2, 3).T)


@pytest.mark.parametrize("machine", ["sanitized"], indirect=True)
@pytest.mark.parametrize("wrong", [0, 1], ids=["read", "write"])
def test_out_of_bounds_is_caught_and_the_next_op_runs(wrong):
    """Of an expanded tensor all elements but one are beyond its memory; the op is told that it is dense."""
    tensors = [torch.zeros(1, 4, 5, 5), torch.zeros(1, 4, 5, 5)]
    tensors[wrong] = torch.zeros(1, 1, 1, 1).expand(1, 4, 5, 5)
    with pytest.raises(MachineError, match=rf"heap-buffer-overflow[\s\S]*{['READ', 'WRITE'][wrong]}[\s\S]*cpu/lrn\."):
        torch.ops.fastcnn_cpu.lrn(*tensors, False, 5, 1.0, 0.75, 1.0, 1)
    with running_on("cpu-baseline"):
        assert_bitwise(FF.local_response_norm(torch.zeros(1, 4, 5, 5), 5), torch.zeros(1, 4, 5, 5))
