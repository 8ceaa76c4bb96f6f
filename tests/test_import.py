"""What `import modeltorch` needs, what it brings along, and what it says where something is missing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modeltorch
from modeltorch import _library

PACKAGE = Path(modeltorch.__file__).parent
MINOR = _library.torch_minor()

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
"""


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Runs code in a process of its own, from a folder whose packages come first."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd or PACKAGE.parent,
    )


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message
    assert message.endswith((".", "'"))


# ---- torch alone ------------------------------------------------------------------------------------

TORCH_ALONE = """
import torch
import modeltorch
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
from modeltorch.shapes import Qwen2Shape

shape = Qwen2Shape(100, 32, 48, 2, 4, 2, False, max_position_embeddings=64)
weights = shape.random_weights(torch.float32)
model = FlashQwen2ForCausalLM(shape, weights, dtype="float32", block_size=16, num_blocks=4)
(answer,) = model.generate([[1, 2, 3]], max_new_tokens=5)
assert len(answer.token_ids) == 5
assert model.compute_logits([[1, 2, 3]])[0].shape == (3, 100)
assert not BLOCKED & set(sys.modules)
print("ran")
"""


@pytest.mark.parametrize(
    "blocked", ["transformers,safetensors,huggingface_hub,tqdm,tokenizers,numpy,hypothesis,pytest"]
)
def test_the_package_runs_a_model_with_nothing_but_torch(blocked):
    run = python(BLOCK + TORCH_ALONE, blocked)
    assert run.stdout == "ran\n", run.stderr


OPEN = """
from modeltorch.checkpoint import BUNDLED
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM
try:
    FlashQwen2ForCausalLM.from_pretrained(sys.argv[2] or BUNDLED)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("blocked", "model"),
    [
        ("transformers,safetensors,huggingface_hub,tqdm", ""),
        ("transformers", ""),
        ("safetensors", ""),
        ("huggingface_hub", "nobody/nothing"),
    ],
)
def test_opening_a_checkpoint_names_the_extra_that_is_missing(blocked, model):
    run = python(BLOCK + OPEN, blocked, model)
    assert run.returncode == 0, run.stderr
    message = run.stdout.removesuffix("\n")
    assert "[hf]" in message
    assert "pip install 'modeltorch[hf]'" in message
    assert any(name in message for name in blocked.split(","))
    assert_one_sentence(message)


IMPORTED = """
import sys, torch
before = set(sys.modules)
import modeltorch.cli, modeltorch.flash_causal_qwen2
print(*set(sys.modules) - before)
"""


def test_the_import_leaves_the_libraries_of_checkpoints_alone():
    run = python(IMPORTED)
    assert run.returncode == 0, run.stderr
    names = {name.split(".")[0] for name in run.stdout.split()}
    assert "modeltorch" in names
    assert not names & {"transformers", "safetensors", "huggingface_hub", "tokenizers", "tqdm", "numpy"}


def test_the_import_registers_the_class_and_may_be_repeated():
    code = "import modeltorch, torch; modeltorch._library.load(); print(torch.classes.ModelTorch.ModelTorch('x'))"
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert "ModelTorch" in run.stdout
    assert run.stderr == ""


# ---- the wrong torch, a missing build ---------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.9.1", "2.10.0+cpu", "2.15.0", "3.0.0a0+git1234", "1.13.1", "weird"])
def test_a_torch_that_is_not_supported_is_told_with_the_remedy(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError) as caught:
        _library.load()
    message = str(caught.value)
    assert f"torch {version}" in message
    for known in (_library.SUPPORTED_TORCH[0], _library.SUPPORTED_TORCH[-1], "pip install"):
        assert known in message
    assert_one_sentence(message)


def test_a_torch_without_a_library_of_its_own_is_told_which_ones_there_are(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    for minor in ("2.12", "2.14"):
        (tmp_path / f"libmodeltorch_torch{minor}.so").touch()
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    with pytest.raises(ImportError, match=re.escape("built for torch 2.12, 2.14 only")) as caught:
        _library.load()
    assert "torch 2.11.0+cpu" in str(caught.value)
    assert "pip install" in str(caught.value)
    assert_one_sentence(str(caught.value))


@pytest.mark.parametrize("minor", _library.SUPPORTED_TORCH)
def test_each_supported_torch_has_a_library_of_its_own(monkeypatch, tmp_path, minor):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    library = tmp_path / f"libmodeltorch_torch{minor}.so"
    library.touch()
    for version in (f"{minor}.0", f"{minor}.1+cpu", f"{minor}.0a0+git1"):
        monkeypatch.setattr(torch, "__version__", version)
        assert _library.library_path() == library


def test_a_library_that_does_not_load_is_told_with_its_likely_causes(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    (tmp_path / f"libmodeltorch_torch{MINOR}.so").write_bytes(b"no library")
    with pytest.raises(ImportError) as caught:
        _library.load()
    message = str(caught.value)
    assert f"libmodeltorch_torch{MINOR}.so" in message
    assert "pip install" in message
    assert "another build of torch" in message


def copied(folder: Path) -> Path:
    """A copy of the package without what a build makes."""
    shutil.copytree(PACKAGE, folder / "modeltorch", ignore=shutil.ignore_patterns("*.so", "checkpoints", "__pycache__"))
    return folder


def test_a_package_that_was_never_built_says_so_at_import(tmp_path):
    run = python("import modeltorch", cwd=copied(tmp_path))
    assert run.returncode == 1
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "not built yet" in last
    assert f"torch {torch.__version__}" in last
    assert "pip install" in last


# ---- the library ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nm() -> str:
    found = shutil.which("nm")
    if not found:
        pytest.skip("needs nm")
    return found


@pytest.fixture(scope="module")
def undefined(nm) -> list[str]:
    """The symbols that the library takes from elsewhere."""
    command = [nm, "-D", "--undefined-only", str(_library.library_path())]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in output.splitlines()]


def test_the_library_asks_for_no_symbol_of_python(undefined):
    assert any("c10" in symbol for symbol in undefined)  # the list is that of a library over torch
    python_symbols = [symbol for symbol in undefined if re.match(r"_?Py[A-Z_]|PyInit|_ZN.*pybind11", symbol)]
    assert python_symbols == []


def test_the_library_links_neither_python_nor_torchs_python_half():
    readelf = shutil.which("readelf")
    if not readelf:
        pytest.skip("needs readelf")
    command = [readelf, "-d", str(_library.library_path())]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", output)
    assert any(name.startswith("libc10") for name in needed)
    assert not [name for name in needed if "python" in name]


# ---- the version ------------------------------------------------------------------------------------


def test_the_module_tells_its_version():
    run = subprocess.run(
        [sys.executable, "-m", "modeltorch", "--version"], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert (run.returncode, run.stdout) == (0, f"{modeltorch.__version__}\n")


def test_the_version_is_that_of_the_project_file():
    project = PACKAGE.parent / "pyproject.toml"
    if not project.exists():
        pytest.skip("runs in the source folder")
    (version,) = re.findall(r'^version = "(.+)"$', project.read_text(), flags=re.MULTILINE)
    assert modeltorch.__version__ == version
