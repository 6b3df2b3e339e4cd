"""Pytest plugin ``-p tools.gpu.results_plugin``: a line of JSON in ``$FASTCNN_RESULTS`` for each test, as it ends.

A kernel that reads or writes where it must not takes the CUDA context with it, and every test after it would fail. So a
worker of pytest-xdist that has lost its context ends, another takes its place, and the tests go on; without workers
the run stops.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

_EXIT_STATUS = 86
_failed: set[str] = set()
_config: pytest.Config


def pytest_configure(config: pytest.Config) -> None:
    global _config
    _config = config


def _in_worker() -> bool:
    return hasattr(_config, "workerinput")


def _tell(line: dict[str, Any]) -> None:
    file = os.environ.get("FASTCNN_RESULTS")
    if file and not _in_worker():
        with Path(file).open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def pytest_runtest_logstart(nodeid: str) -> None:
    _tell({"test": nodeid, "outcome": "started"})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported."""
    if report.failed:
        _tell({"test": report.nodeid, "outcome": "failed", "when": "collect", "message": report.longreprtext})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)
    if report.when == "call" or not report.passed:
        message = "" if report.passed else report.longreprtext
        if report.skipped and isinstance(report.longrepr, tuple):
            message = report.longrepr[2]
        _tell(
            {"test": report.nodeid, "outcome": report.outcome, "when": report.when, "seconds": report.duration}
            | ({"message": message, "sections": dict(report.sections)} if message else {})
        )


def pytest_runtest_logfinish(nodeid: str) -> None:
    if nodeid not in _failed or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if _in_worker():
            os._exit(_EXIT_STATUS)  # the report has been sent
        pytest.exit(f"the CUDA context was lost in {nodeid}", _EXIT_STATUS)


def read(file: Path) -> dict[str, Any]:
    """What such a file tells: counts by outcome, failures (the first of a test's), skips, and what was under way."""
    tests: dict[str, dict[str, Any]] = {}
    for text in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if not text.endswith("\n"):
            continue
        line = json.loads(text)
        known = tests.get(line["test"], {}).get("outcome", "started")
        if known == "started" or (known != "failed" and line["outcome"] == "failed"):
            tests[line["test"]] = line
    outcomes = [line["outcome"] for line in tests.values()]
    skips = {line["message"] for line in tests.values() if line["outcome"] == "skipped"}
    return {
        **{name: outcomes.count(name) for name in ("passed", "failed", "skipped") if name in outcomes},
        "failures": [line for line in tests.values() if line["outcome"] == "failed"],
        "reasons_to_skip": sorted(skips),
        "under_way": [test for test, line in tests.items() if line["outcome"] == "started"],
    }
