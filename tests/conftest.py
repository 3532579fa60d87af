"""Shared by all tests: what is missing on this machine is a skip for a user and a failure where all must run."""

import os

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("THEODOLITE_REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"skipped where every test must run: {call.excinfo.value if call.excinfo else ''}"
