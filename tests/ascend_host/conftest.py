"""Every test runs on the stand-in driver; none may break a rule of the vendor's operations or touch dead memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch_npu  # noqa: F401  torch.npu
from stand_in import IS_OLD_CHIP, count, counters, launch_mode

pytest.register_assert_rewrite("pairs")

if os.environ.get("ASCEND_HOST_FEW") == "1":
    settings.register_profile("few", settings.get_profile("short"), max_examples=4)
    settings.load_profile("few")


@pytest.fixture(autouse=True)
def rules_are_kept():
    before = {name: count(name) for name in ("violations", "dead_memory", "kernel_faults")}
    yield
    torch.npu.synchronize()
    for name, value in before.items():
        assert count(name) == value, f"{name} went from {value} to {count(name)}"


@pytest.fixture
def npu() -> str:
    return "npu"


def pytest_collection_modifyitems(config, items):
    """The chips without bfloat16 and the unusual launch modes run the tests that depend on them alone."""
    if IS_OLD_CHIP:
        skip = pytest.mark.skip(reason="needs bfloat16")
        for item in items:
            if "bfloat16" in item.name:
                item.add_marker(skip)


def list_skipped(terminalreporter):
    """Every case that this run left out, by the reason."""
    left_out: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        left_out.setdefault(reason, []).append(report.nodeid.rsplit("/", 1)[-1])
    for reason, cases in sorted(left_out.items()):
        terminalreporter.write_line(f"{len(cases)} left out, {reason}: {', '.join(sorted(cases))}")


def pytest_terminal_summary(terminalreporter):
    list_skipped(terminalreporter)
    totals = counters()
    operations = {name: value for name, value in totals.items() if name.endswith("Operation")}
    listed = ", ".join(f"{name.removesuffix('Operation')} {value}" for name, value in sorted(operations.items()))
    terminalreporter.write_line(
        f"{launch_mode()}: {totals.get('operations', 0)} vendor operations ran ({listed}); "
        f"{totals.get('violations', 0)} refused"
    )
