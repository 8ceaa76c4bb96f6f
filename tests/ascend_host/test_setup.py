"""setup.py with MODELTORCH_ASCEND=1: one sentence about what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOME = ROOT / "build" / "ascend_host"
READ_PATHS = "sys.argv[1:] = ['--name']; import runpy; runpy.run_path('setup.py')"


def set_up(before: str = "", **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs `before` and then setup.py as far as its settings."""
    merged = {**os.environ, "MODELTORCH_ASCEND": "1", "ATB_HOME_PATH": str(HOME), **environment}
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{before}\n{READ_PATHS}"],
        capture_output=True,
        text=True,
        env={name: value for name, value in merged.items() if value is not None},
        cwd=ROOT,
        timeout=120,
        check=False,
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder laid out like the vendor's, without its library."""
    (tmp_path / "include" / "atb").mkdir(parents=True)
    (tmp_path / "include" / "atb" / "atb_infer.h").write_text("")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libascendcl.so").write_text("")
    return tmp_path


def test_everything_is_found():
    ran = set_up()
    assert ran.returncode == 0, ran.stderr
    assert "modeltorch" in ran.stdout


def test_the_vendors_folder_is_asked_for():
    ran = set_up(ATB_HOME_PATH=None)
    assert ran.returncode != 0
    assert ran.stderr.strip().splitlines()[-1].startswith("MODELTORCH_ASCEND=1 needs ATB_HOME_PATH")


def test_a_missing_torch_npu_is_told():
    ran = set_up(before="sys.modules['torch_npu'] = None")
    assert ran.stderr.strip().splitlines()[-1] == "MODELTORCH_ASCEND=1 needs torch_npu: pip install torch_npu==2.13.0"


def test_a_torch_npu_for_another_torch_is_told():
    ran = set_up(before="import importlib.metadata as m; m.version = lambda package: '2.12.0'")
    assert "needs torch_npu 2.13, found 2.12.0" in ran.stderr.strip().splitlines()[-1]


def test_a_folder_without_the_library_is_told(home):
    ran = set_up(ATB_HOME_PATH=str(home))
    assert f"ATB_HOME_PATH is {home}, but {home}/lib/libatb.so does not exist" in ran.stderr


def test_a_library_that_is_none_is_told(home):
    library = home / "lib" / "libatb.so"
    for contents, told in ((b"", "is empty"), (b"version https://git-lfs", "is no shared library")):
        library.write_bytes(contents)
        ran = set_up(ATB_HOME_PATH=str(home))
        last = ran.stderr.strip().splitlines()[-1]
        assert last == f"{library} {told}: install the vendor's transformer library again"


def test_another_abi_is_told(home):
    (home / "lib" / "libatb.so").write_bytes(b"\x7fELF _ZN3atb9Operation7GetNameEv Ss")
    ran = set_up(ATB_HOME_PATH=str(home))
    assert "was built with C++ ABI 0, this torch with 1: source the library's set_env.sh with --cxx_abi=1" in ran.stderr


def test_a_missing_toolkit_is_told(home):
    (home / "lib" / "libatb.so").write_bytes(b"\x7fELF NSt7__cxx1112basic_string")
    (home / "lib" / "libascendcl.so").unlink()
    ran = set_up(ATB_HOME_PATH=str(home), ASCEND_HOME_PATH=None)
    assert "needs libascendcl.so, looked for in ASCEND_HOME_PATH/lib64" in ran.stderr


@pytest.mark.parametrize("value", [None, "", "0", "false"])
def test_a_build_without_ascend_asks_for_nothing(value):
    assert set_up(MODELTORCH_ASCEND=value, ATB_HOME_PATH=None).returncode == 0


@pytest.mark.parametrize("value", ["1", "true", "TRUE", "on"])
def test_every_yes_asks_for_ascend(value):
    assert "needs ATB_HOME_PATH" in set_up(MODELTORCH_ASCEND=value, ATB_HOME_PATH=None).stderr


def test_neither_yes_nor_no_is_refused():
    ran = set_up(MODELTORCH_ASCEND="maybe")
    assert ran.stderr.strip().splitlines()[-1] == "MODELTORCH_ASCEND must be 1 or 0, got 'maybe'"
