"""The engines beside modeltorch, and how each gets an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """What pip installs for an engine.

    Attributes:
        name: its folder.
        requirements: of pip, installed together; torch, if it is among them, also alone before the others, so that
            none of them chooses its build.
        unwanted: packages that come along and break others.
        bindings: bindings of llama.cpp, whose source archive holds the library, which is compiled here.
        commands: programs that must be there already.
    """

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    bindings: str = ""
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """An engine in one precision: a column of the table. Without an environment it runs in this one."""

    name: str
    dtype: str
    script: str
    environment: Environment | None

    @property
    def label(self) -> str:
        """As the table calls it."""
        return f"{self.name} {self.dtype}"

    @property
    def key(self) -> str:
        """As the command line and the folders call it."""
        return f"{self.name}-{self.dtype}"


_TRANSFORMERS = Environment("transformers", (TORCH, "transformers==5.23.0", "accelerate==1.15.0"))
_LLAMA = Environment(
    "llama.cpp", ("gguf==0.19.0",), bindings="llama-cpp-python==0.3.36", commands=("cmake", "make", "c++")
)
_OPENVINO = Environment(
    "openvino",
    (TORCH, "openvino-genai==2026.4.1.0", "optimum-intel[openvino]==2.2.0", "nncf==3.4.0", "transformers==5.5.4"),
    unwanted=("torchvision",),
)
_ONNX_RUNTIME = Environment(
    "onnxruntime",
    (
        TORCH,
        "onnxruntime-genai==0.18.0",
        "onnxruntime==1.32.0",
        "onnx==1.23.2",
        "onnx_ir==1.1.0",
        "transformers==5.23.0",
    ),
)
_CTRANSLATE2 = Environment("ctranslate2", (TORCH, "ctranslate2==4.8.5", "transformers==5.23.0"))

ENGINES = (
    Engine("modeltorch", "bfloat16", "modeltorch_peer.py", None),
    Engine("transformers", "bfloat16", "transformers_peer.py", _TRANSFORMERS),
    Engine("llama.cpp", "bfloat16", "llama_cpp_peer.py", _LLAMA),
    Engine("openvino-genai", "bfloat16", "openvino_peer.py", _OPENVINO),
    Engine("onnxruntime-genai", "fp32", "onnxruntime_peer.py", _ONNX_RUNTIME),
    Engine("onnxruntime-genai", "int4", "onnxruntime_peer.py", _ONNX_RUNTIME),
    Engine("ctranslate2", "float32", "ctranslate2_peer.py", _CTRANSLATE2),
    Engine("ctranslate2", "int8", "ctranslate2_peer.py", _CTRANSLATE2),
)


def _run(*command: str | Path) -> None:
    """Runs a program, and says how far it is where it prints that as make does: "[ 44%] Building ...".

    Raises:
        RuntimeError: it failed; with the last line that it printed.
    """
    print("+", *command, file=sys.stderr, flush=True)
    arguments = [str(part) for part in command]
    tenth, last = "0", ""
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean_environment()
    ) as run:
        for line in run.stdout or ():
            last = line.strip() or last
            found = re.match(r"\[ *(\d+)\d%\]", line)
            if found and found[1] != tenth:
                tenth = found[1]
                print(f"  {tenth}0 %", file=sys.stderr, flush=True)
    if run.returncode:
        raise RuntimeError(f"{Path(arguments[0]).name} {arguments[1]} failed: {last}")


def clean_environment() -> dict[str, str]:
    """The environment variables without Python's, which would mix packages of two environments."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _build_llama_cpp(python: Path, bindings: str, jobs: int) -> None:
    """Builds the library with -march=native, and installs the bindings without a library of their own.

    What an interrupted run compiled is not compiled again.
    """
    name = bindings.partition("==")[0]
    sources = python.parent.parent / "llama.cpp"
    _run(python, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "-d", sources, bindings)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    (tree,) = sources.glob("*/vendor/llama.cpp")
    build = sources / "build"
    without = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    kind = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DGGML_NATIVE=ON"]
    _run("cmake", "-G", "Unix Makefiles", "-S", tree, "-B", build, *kind, *without)
    _run("cmake", "--build", build, f"-j{jobs}", "--target", "llama")
    bare = [f"-Ccmake.define.{part}_BUILD=OFF" for part in ("LLAMA", "LLAVA")]
    _run(python, "-m", "pip", "install", "-q", *bare, archive)
    (package,) = python.parent.parent.glob("lib/python*/site-packages/llama_cpp")
    (package / "lib").mkdir(exist_ok=True)
    shutil.copy(build / "bin" / "libllama.so", package / "lib")


def set_up(environment: Environment, folder: Path, jobs: int) -> Path:
    """Makes the environment under `folder`; one that is there as described is kept, an unfinished one finished.

    Returns:
        Its Python.

    Raises:
        RuntimeError: what is missing, or what failed, in one sentence.
    """
    home = folder / "environments" / environment.name
    python, begun, installed = home / "bin" / "python", home / "begun", home / "installed"
    wanted = repr(environment)
    if _says(installed, wanted):
        return python
    missing = [command for command in environment.commands if shutil.which(command) is None]
    if missing:
        raise RuntimeError(f"{environment.name} needs {' and '.join(missing)}, which this machine lacks")
    if not _says(begun, wanted):
        _run(sys.executable, "-m", "venv", "--clear", home)
        begun.write_text(wanted)
    pip: list[str | Path] = [python, "-m", "pip", "install", "-q"]
    if TORCH in environment.requirements:
        _run(*pip, TORCH)
    _run(*pip, *environment.requirements)
    if environment.unwanted:
        _run(python, "-m", "pip", "uninstall", "-qy", *environment.unwanted)
    if environment.bindings:
        _build_llama_cpp(python, environment.bindings, jobs)
    installed.write_text(wanted)
    return python


def _says(stamp: Path, wanted: str) -> bool:
    return stamp.exists() and stamp.read_text() == wanted
