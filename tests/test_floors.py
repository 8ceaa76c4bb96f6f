"""The floors of csrc: who may include whom, where torch and devices may show, how long a file may be."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
FLOORS = {
    "core": {"core"},
    "graph": {"core", "graph"},
    "ops": {"core", "graph", "ops", "device"},
    "device": {"core", "graph", "ops", "device"},
    "models": {"core", "graph", "ops", "models"},
    "torch": {"core", "graph", "ops", "device", "models", "torch"},
}
KERNEL_HEADERS = {"ops/cpu_kernel.h", "ops/cuda_kernel.cuh", "ops/rows.h", "ops/rows_impl.h", "ops/vec.h"}
"""What the kernels of the operations share; an operation's own header describes it and nothing else."""
INCLUDED_FOR_EVERY_LEVEL = {"ops/rows_impl.h", "ops/vec.h"}
FORBIDDEN_TORCH_HEADERS = {"torch/extension.h", "torch/torch.h", "torch/all.h"}
DEVICE_WORDS = r"cuda|npu|ascend|hip|rocm|nvcc|acl"
MAX_LINES = {"ops": 600, "device": 600}
MAX_LINES_ELSEWHERE = 400

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif|elifdef|elifndef)\b(.*)$", re.MULTILINE)


def is_device_file(name: str) -> bool:
    """True for a file that exists for one device: rms_norm.cu, rms_norm_npu.cpp, device/cuda.cu."""
    path = Path(name)
    return path.suffix in {".cu", ".cuh"} or path.stem.endswith("_npu") or path.parts[0] == "device"


def include_faults(name: str, text: str) -> list[str]:
    """What is wrong with the includes of one file; `name` is relative to csrc."""
    floor = Path(name).parts[0]
    faults = []
    for kind, target in INCLUDE.findall(text):
        first = target.split("/")[0]
        if target in FORBIDDEN_TORCH_HEADERS:
            faults.append(f"{name} includes {target}, which nothing may")
        elif kind == "<":
            if first in {"ATen", "c10", "torch", "torch_npu", "caffe2"} and floor != "torch":
                faults.append(f"{name} includes <{target}>, which only the floor torch may")
        elif first not in FLOORS:
            faults.append(f"{name} includes {target}, which lies on no floor")
        elif first not in FLOORS[floor]:
            faults.append(f"{name} includes {target}: the floor {floor} may not see {first}")
        elif floor == "models" and target in KERNEL_HEADERS:
            faults.append(f"{name} includes {target}: models may not see kernels")
    return faults


def condition_faults(name: str, text: str) -> list[str]:
    """Preprocessor conditions on a device in a file that all devices share."""
    if is_device_file(name):
        return []
    return [
        f"{name} asks for a device: {condition.strip()}"
        for condition in CONDITION.findall(text)
        if re.search(DEVICE_WORDS, condition, re.IGNORECASE)
    ]


def length_faults(name: str, text: str) -> list[str]:
    """A file that is too long."""
    limit = MAX_LINES.get(Path(name).parts[0], MAX_LINES_ELSEWHERE)
    lines = text.count("\n")
    return [f"{name} has {lines} lines, more than {limit}"] if lines > limit else []


@cache
def sources() -> dict[str, str]:
    """The text of every source of the library, by path relative to csrc."""
    found = sorted(path for path in CSRC.rglob("*") if path.suffix in SUFFIXES)
    return {str(path.relative_to(CSRC)): path.read_text() for path in found}


def own_includes(name: str) -> list[str]:
    return [target for kind, target in INCLUDE.findall(sources()[name]) if kind == '"']


def reachable(name: str) -> dict[str, str]:
    """Every file of csrc that `name` includes, directly or not, with the file that includes it."""
    found: dict[str, str] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for target in own_includes(current):
            if target in sources() and target not in found:
                found[target] = current
                waiting.append(target)
    return found


def test_every_source_lies_on_a_floor():
    assert {Path(name).parts[0] for name in sources()} <= set(FLOORS)
    for floor in ("core", "graph", "ops", "models", "torch"):
        assert any(name.startswith(f"{floor}/") for name in sources()), f"no sources in {floor}"


def test_every_include_of_our_own_names_a_file_from_csrc():
    for name in sources():
        if not is_device_file(name):
            for target in own_includes(name):
                assert target in sources(), f'{name} includes "{target}", which is not in csrc'


def test_a_floor_includes_only_lower_floors():
    faults = [fault for name, text in sources().items() for fault in include_faults(name, text)]
    assert not faults, "\n".join(faults)


def test_no_floor_reaches_a_higher_one_through_another_header():
    for name in sources():
        for target, through in reachable(name).items():
            assert Path(target).parts[0] in FLOORS[Path(name).parts[0]], f"{name} sees {target} through {through}"


def test_models_reach_no_kernels_and_no_device_even_through_an_operations_header():
    faults = []
    for name in sources():
        if name.startswith("models/"):
            for target, through in reachable(name).items():
                if target in KERNEL_HEADERS or target.startswith("device/"):
                    faults.append(f"{name} sees {target} through {through}")
    assert not faults, "\n".join(faults)


def test_no_file_that_devices_share_asks_the_preprocessor_for_a_device():
    faults = [fault for name, text in sources().items() for fault in condition_faults(name, text)]
    assert not faults, "\n".join(faults)


def test_no_file_is_too_long_to_read():
    faults = [fault for name, text in sources().items() for fault in length_faults(name, text)]
    assert not faults, "\n".join(faults)


def test_environment_variables_are_read_in_one_file():
    readers = {name for name, text in sources().items() if re.search(r"\bgetenv\b", text)}
    assert readers == {"core/environment.cpp"}


def test_every_header_is_included_once_unless_it_is_made_to_be_included_again():
    for name, text in sources().items():
        if name.endswith((".h", ".cuh")) and name not in INCLUDED_FOR_EVERY_LEVEL:
            assert text.startswith("#pragma once\n"), f"{name} must begin with #pragma once"


def test_no_python_module_is_named_for_nothing_in_particular():
    vague = {"utils", "util", "common", "helper", "helpers", "manager", "misc"}
    modules = [path for folder in ("modeltorch", "tests", "benchmarks", "tools") for path in
               (ROOT / folder).rglob("*.py")]  # fmt: skip
    assert len(modules) > 10
    for path in modules:
        assert not vague & set(path.stem.lower().strip("_").split("_")), f"{path.relative_to(ROOT)} says nothing"


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("core/a.h", '#include "graph/graph.h"', "core may not see graph"),
        ("core/a.h", '  #  include "ops/add.h"', "core may not see ops"),
        ("graph/a.cpp", '#include "core/check.h"\n#include "ops/add.h"', "graph may not see ops"),
        ("graph/a.cpp", '#include "device/cpu.h"', "graph may not see device"),
        ("ops/a.cpp", '#include "models/model.h"', "ops may not see models"),
        ("device/cpu.cpp", '#include "models/model.h"', "device may not see models"),
        ("models/a.cpp", '#include "torch/tensors.h"', "models may not see torch"),
        ("models/a.cpp", '#include "device/cuda.h"', "models may not see device"),
        ("models/a.cpp", '#include "ops/cpu_kernel.h"', "models may not see kernels"),
        ("models/a.cpp", '#include "ops/rows.h"', "models may not see kernels"),
        ("models/a.cpp", '#include "ops/vec.h"', "models may not see kernels"),
        ("ops/a.cpp", "#include <ATen/ATen.h>", "only the floor torch"),
        ("core/a.cpp", "#include <c10/util/Exception.h>", "only the floor torch"),
        ("graph/a.cpp", "#include <torch/library.h>", "only the floor torch"),
        ("torch/a.cpp", "#include <torch/extension.h>", "which nothing may"),
        ("torch/a.cpp", "#include <torch/torch.h>", "which nothing may"),
        ("torch/a.cpp", "#include <torch/all.h>", "which nothing may"),
        ("torch/a.cpp", '#include "somewhere/else.h"', "no floor"),
        ("ops/a.cpp", "#ifdef USE_CUDA", "asks for a device"),
        ("core/a.h", "# if defined(MODELTORCH_NPU)", "asks for a device"),
        ("models/a.cpp", "#if 0\n#elif __CUDACC__\n#endif", "asks for a device"),
        ("ops/a.cpp", "\n" * 601, "601 lines"),
        ("models/a.cpp", "\n" * 401, "401 lines"),
    ],
)
def test_a_breach_is_noticed(name, text, fault):
    found = include_faults(name, text) + condition_faults(name, text) + length_faults(name, text)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/a.cpp", '#include "ops/cpu_kernel.h"\n#include "device/cpu.h"\n#include <vector>'),
        ("models/a.cpp", '#include "ops/rms_norm.h"\n#include <nlohmann/json.hpp>'),
        ("torch/a.cpp", '#include "ops/rows.h"\n#include <ATen/Parallel.h>\n#include <torch/library.h>'),
        ("ops/a.cu", "#ifdef __CUDA_ARCH__\n#include <cuda_runtime.h>"),
        ("ops/a_npu.cpp", "#if ASCEND"),
        ("ops/a.cpp", "#if defined(__x86_64__)"),
        ("ops/a.cpp", "\n" * 600),
        ("models/a.cpp", "\n" * 400),
    ],
)
def test_what_is_allowed_is_not_taken_for_a_breach(name, text):
    assert include_faults(name, text) + condition_faults(name, text) + length_faults(name, text) == []
