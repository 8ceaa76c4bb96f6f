"""Builds the C++ library of modeltorch.

What comes out is `modeltorch/libmodeltorch_torch<minor>.so`: a plain shared library that links libtorch and no Python,
so one file serves every Python of a torch minor (2.13, say), and libraries for several minors can lie side by side.
`modeltorch/_library.py` loads the one for the torch that is running.

    pip install --no-build-isolation -e .      build in place, against the torch that is installed
    MODELTORCH_DEBUG=1 pip install ...          -O1 -g with assertions instead of -O3

Sources are all of csrc/**/*.cpp; what a device needs beyond that is decided here and nowhere else.
"""

import os
import subprocess
from pathlib import Path

import nlohmann_json
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
SUPPORTED_MINORS = ("2.11", "2.12", "2.13", "2.14")


def compile_flags() -> list[str]:
    """Flags of every C++ file. The processor level is chosen at run time, so nothing here names one."""
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    if os.environ.get("MODELTORCH_DEBUG") == "1":
        return [*flags, "-O1", "-g"]
    return [*flags, "-O3", "-g0", "-DNDEBUG"]


def library() -> Extension:
    """The extension, without the Python library that torch's own CppExtension would link."""
    include = [str(ROOT / "csrc"), str(Path(nlohmann_json.__file__).parent / "include")]
    return Extension(
        "modeltorch.libmodeltorch",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")),
        include_dirs=include + cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths(),
        libraries=["c10", "torch", "torch_cpu"],
        extra_compile_args={"cxx": compile_flags()},
        extra_link_args=["-fopenmp", "-Wl,--no-undefined", "-Wl,-z,defs"],
        language="c++",
    )


class BuildLibrary(cpp_extension.BuildExtension):
    """torch's ninja build, with a file name that carries the torch minor instead of a Python ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Maps modeltorch.libmodeltorch to modeltorch/libmodeltorch_torch2.13.so."""
        return os.path.join(*fullname.split(".")) + f"_torch{TORCH_MINOR}.so"

    def run(self) -> None:
        """Builds, then writes compile_commands.json for editors and clang tools."""
        if TORCH_MINOR not in SUPPORTED_MINORS:
            needed = f"{SUPPORTED_MINORS[0]} to {SUPPORTED_MINORS[-1]}"
            raise SystemExit(f"modeltorch needs torch {needed}, found {torch.__version__}")
        super().run()
        ninja_file = next(Path(self.build_temp).rglob("build.ninja"), None)
        if ninja_file is not None:
            commands = subprocess.run(
                ["ninja", "-C", str(ninja_file.parent), "-t", "compdb"],
                check=True,
                capture_output=True,
                text=True,
            )
            (ROOT / "compile_commands.json").write_text(commands.stdout)


setup(ext_modules=[library()], cmdclass={"build_ext": BuildLibrary})
