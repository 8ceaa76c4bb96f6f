"""A user's own shared library registers a model after modeltorch was loaded.

Everything runs in processes of its own, so that what is registered here does not reach the other tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeltorch import _library

ROOT = Path(__file__).parent.parent
SOURCES = Path(__file__).parent / "user_model"
MODELS = ["user_model", "second_qwen"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> dict[str, Path]:
    """The shared libraries, built as a user would: with the headers in csrc, linked to modeltorch's own library."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no compiler: {compiler}")
    nlohmann_json = pytest.importorskip("nlohmann_json")
    folder = tmp_path_factory.mktemp("user_model")
    built = {model: folder / f"lib{model}.so" for model in MODELS}
    include = [ROOT / "csrc", Path(nlohmann_json.__file__).parent / "include"]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    compilers = [
        subprocess.Popen(
            [
                *[compiler, *flags, *(f"-isystem{path}" for path in include)],
                *[str(SOURCES / f"{model}.cpp"), str(_library.library_path()), "-o", str(path)],
                f"-Wl,-rpath-link,{Path(torch.__file__).parent / 'lib'}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for model, path in built.items()
    ]
    for process in compilers:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    return built


def run_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program in a process of its own; it must succeed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


USE_BIGRAM = """
import json, sys
import torch
import modeltorch

made = torch.classes.ModelTorch.ModelTorch("somebody_else_BigramModel")
try:
    made.set_param('{"epsilon": 1e-5}')
    raise SystemExit("the name must be unknown before the library is loaded")
except ValueError as error:
    assert "somebody_else_BigramModel" in str(error)

torch.ops.load_library(sys.argv[1])
try:
    torch.classes.ModelTorch.ModelTorch("no_such_model").set_param("{}")
except ValueError as error:
    known = str(error).split("known names:")[1]
    assert "somebody_else_BigramModel" in known and "qwen_DecoderModel" in known, known

made.set_param('{"epsilon": 1e-5}')
torch.manual_seed(0)
vocab, hidden = 37, 48
embedding, norm, head = torch.randn(vocab, hidden), torch.rand(hidden) + 0.5, torch.randn(vocab, hidden)
assert [entry["name"] for entry in json.loads(made.weight_spec())] == ["embedding", "norm", "head"]
made.set_weight([embedding, norm, head])
WITH_OR_WITHOUT_CACHES
for length in (1, 5, 64, 65, 7):
    ids = torch.randint(0, vocab, (length,))
    (logits,) = made.execute([ids], "{}")
    normed = torch.nn.functional.rms_norm(embedding[ids], (hidden,), norm, 1e-5)
    torch.testing.assert_close(logits, normed @ head.T, rtol=1e-4, atol=1e-4)
counters = made.counters()
assert counters["executions"] == 5 and counters["plans_built"] == 4, counters
assert "rms_norm" in made.graph()

for arguments, words in (
    (([ids.int()], "{}"), "ids must be int64"),
    (([ids, ids], "{}"), "Bigram takes 1 input"),
):
    try:
        made.execute(*arguments)
        raise SystemExit("must be refused: " + words)
    except ValueError as error:
        assert words in str(error) and "[Bigram]" in str(error), error
try:
    made.set_param("{}")
    raise SystemExit("the model's own parameters must be checked")
except ValueError as error:
    assert "epsilon" in str(error)
assert torch.equal(made.execute([ids], "{}")[0], logits)
print("done")
"""


@pytest.mark.parametrize(
    "caches", ["", "made.set_kv_cache([], [])"], ids=["no caches are set", "no caches, and set so"]
)
def test_a_model_of_a_users_library_runs_behind_torch_classes(libraries, caches):
    program = USE_BIGRAM.replace("WITH_OR_WITHOUT_CACHES", caches)
    assert run_python(program, libraries["user_model"]).stdout.endswith("done\n")


SCRIPT_BIGRAM = """
import sys
import torch
import modeltorch

torch.ops.load_library(sys.argv[1])
made = [torch.classes.ModelTorch.ModelTorch("somebody_else_BigramModel") for _ in range(2)]
for one in made:
    one.set_param('{"epsilon": 1e-5}')
    one.set_weight([torch.ones(3, 4), torch.ones(4), torch.eye(3, 4)])
assert torch.equal(*(one.execute([torch.tensor([0, 2])], "{}")[0] for one in made))
qwen = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
try:
    qwen.set_param("{}")
except ValueError as error:
    assert "required" in str(error)
    print("done")
"""


def test_a_users_library_leaves_the_models_of_modeltorch_in_place(libraries):
    assert run_python(SCRIPT_BIGRAM, libraries["user_model"]).stdout.endswith("done\n")


TAKE_A_TAKEN_NAME = """
import json, sys
import torch
import modeltorch

torch.ops.load_library(sys.argv[1])
parameters = {
    "isFA": False, "isPrefill": True, "isBF16": False, "rmsNormEps": 1e-6, "numHiddenLayers": 1,
    "numAttentionHeadsPerRank": 2, "numKeyValueHeadsPerRank": 1, "hiddenSizePerAttentionHead": 8,
}
for name in ("qwen_DecoderModel", "qwen_PAModel"):
    made = torch.classes.ModelTorch.ModelTorch(name)
    made.set_param(json.dumps(parameters))
    assert "layers.0.attn.norm.weight" in made.weight_spec()
print("done")
"""


def test_a_name_that_is_taken_keeps_its_first_owner_and_warns(libraries):
    done = run_python(TAKE_A_TAKEN_NAME, libraries["second_qwen"])
    assert done.stdout.endswith("done\n")
    assert done.stderr.count("qwen_DecoderModel is registered twice") == 1
    assert "first" in done.stderr


def test_the_library_needs_no_symbol_of_python():
    reader = shutil.which("nm")
    if reader is None:
        pytest.skip("no nm")
    asked = [reader, "-D", "--undefined-only", str(_library.library_path())]
    symbols = [line.split()[-1] for line in subprocess.check_output(asked, text=True).splitlines()]
    assert any("c10" in symbol for symbol in symbols)
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]


LOAD_TWICE = """
import torch
import modeltorch

path = str(modeltorch._library.library_path())
for _ in range(2):
    torch.classes.load_library(path)
    torch.ops.load_library(path)
assert torch.classes.ModelTorch.ModelTorch("qwen_PAModel").progress() == 0.0
print("done")
"""


def test_loading_the_library_again_as_a_current_caller_does_registers_nothing_twice():
    done = run_python(LOAD_TWICE)
    assert done.stdout.endswith("done\n")
    assert "registered twice" not in done.stderr
