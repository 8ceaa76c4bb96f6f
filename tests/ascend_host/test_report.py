"""The command that collects a report: on a machine that works, and on one where an operation fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stand_in import IS_OLD_CHIP


def report(path, **environment: str) -> tuple[int, str, str]:
    words = [sys.executable, "-m", "modeltorch.ascend_report", str(path)]
    ran = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=path.parent,
        check=False,
    )
    return ran.returncode, ran.stdout, path.read_text()


def test_a_machine_that_works(tmp_path):
    code, verdicts, text = report(tmp_path / "report.txt")
    failed = [line for line in verdicts.splitlines() if line.startswith(("FAILED", "WRONG"))]
    if IS_OLD_CHIP:
        # bfloat16, and the attention over a cache that no ReshapeAndCache has put into tiles.
        assert all("bfloat16" in line or "Cache" in line or "PagedAttention" in line for line in failed), failed
    else:
        assert failed == []
        assert code == 0
    assert "torch_npu 2." in text
    assert "layers.1.mlp.down = Linear(" in text
    assert "ATB_HOME_PATH=" in text


def test_the_failing_node_and_its_tensors_are_in_it(tmp_path):
    code, _, text = report(tmp_path / "report.txt", ASCEND_HOST_INJECT="setup 40 1")
    assert code == 1
    assert "FAILED" in text
    assert "Operation: the vendor's Setup returned 1 for (float16[" in text
    assert "node layers." in text


def test_there_is_a_report_where_torch_npu_does_not_load(tmp_path):
    """As on a machine whose set_env.sh nobody sourced: torch must not load torch_npu by itself."""
    file = Path(__file__).parents[2] / "modeltorch" / "ascend_report.py"
    hidden = {"LD_LIBRARY_PATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": ""}
    environment = {name: value for name, value in {**os.environ, **hidden}.items() if value}
    out = tmp_path / "report.txt"
    ran = subprocess.run([sys.executable, file, out], capture_output=True, timeout=300, env=environment, check=False)
    assert ran.returncode == 1
    assert "torch_npu 2." in out.read_text()
    assert "libhccl.so: cannot open shared object file" in out.read_text()
