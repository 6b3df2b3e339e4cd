"""Runs kernels in the emulator for tests/simt/emulator.py: requests come on stdin, replies go to stdout, both pickled.

A process of its own, because a sanitizer's runtime must be loaded before anything else and ends the process where it
finds an error. So it imports nothing but the emulator.
"""

import importlib.util
import os
import pickle
import sys


def main() -> None:
    name, path = sys.argv[1:]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tasks = {"conv2d_relu": module.ConvTask, "augment": module.AugmentTask, "batch_norm": module.BatchNormTask}
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, task, descriptions = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        buffers = [None if d is None else module.Buffer(*d) for d in descriptions]
        kind = "batch_norm" if function.startswith("batch_norm") else function
        first = [function] if task is None else [tasks.get(kind, module.Task)(*task)]
        try:
            getattr(module, "planted" if task is None else function)(*first, *buffers)
            reply = [
                b.bytes() for b, d in zip(buffers, descriptions, strict=True) if d is not None and isinstance(d[0], int)
            ]
        except RuntimeError as error:
            reply = str(error)
        pickle.dump(reply, replies)
        replies.flush()


main()
