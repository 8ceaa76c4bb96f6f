"""Builds the C++ library of modeltorch.

What comes out is `modeltorch/libmodeltorch_torch<minor>.so`: a plain shared library that links libtorch and no Python,
so one file serves every Python of a torch minor (2.13, say), and libraries for several minors can lie side by side.
`modeltorch/_library.py` loads the one for the torch that is running.

    pip install --no-build-isolation -e .      build in place, against the torch that is installed
    MODELTORCH_DEBUG=1 pip install ...          -O1 -g with assertions instead of -O3
    MODELTORCH_ASCEND=1 pip install ...         with Ascend, against torch_npu and the library under $ATB_HOME_PATH

Sources are all of csrc/**/*.cpp but those of devices that were not asked for; what a device needs beyond that is
decided here and nowhere else.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
from pathlib import Path

import nlohmann_json
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
ASCEND = os.environ.get("MODELTORCH_ASCEND") == "1"
SUPPORTED_MINORS = ("2.11", "2.12", "2.13", "2.14")


def compile_flags() -> list[str]:
    """Flags of every C++ file. The processor level is chosen at run time, so nothing here names one."""
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    if os.environ.get("MODELTORCH_DEBUG") == "1":
        return [*flags, "-O1", "-g"]
    return [*flags, "-O3", "-g0", "-DNDEBUG"]


def is_for_ascend(path: Path) -> bool:
    """True for sources that need torch_npu or the vendor's library."""
    return path.stem.endswith("_npu") or path.stem.startswith("npu")


def sources() -> list[str]:
    """Every source of this build, relative to the root."""
    chosen = [path for path in (ROOT / "csrc").rglob("*.cpp") if ASCEND or not is_for_ascend(path)]
    return sorted(str(path.relative_to(ROOT)) for path in chosen)


def ascend_paths() -> tuple[list[str], list[str]]:
    """Include and library folders of an Ascend build; stops with a sentence that says what is missing."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"MODELTORCH_ASCEND=1 needs torch_npu: pip install torch_npu=={TORCH_MINOR}.0")
    found = importlib.metadata.version("torch_npu")
    if not found.startswith(f"{TORCH_MINOR}."):
        raise SystemExit(f"torch {torch.__version__} needs torch_npu {TORCH_MINOR}, found {found}: install that one")
    torch_npu = Path(spec.submodule_search_locations[0])
    home = os.environ.get("ATB_HOME_PATH")
    if not home:
        raise SystemExit(
            "MODELTORCH_ASCEND=1 needs ATB_HOME_PATH, the folder of the vendor's transformer library: source the "
            "set_env.sh of its package"
        )
    vendor = Path(home)
    library_file = vendor / "lib" / "libatb.so"
    for needed in (vendor / "include" / "atb" / "atb_infer.h", library_file):
        if not needed.is_file():
            raise SystemExit(f"ATB_HOME_PATH is {home}, but {needed} does not exist: source the right set_env.sh")
    has_cxx11_abi = b"__cxx11" in library_file.read_bytes()
    if has_cxx11_abi != torch.compiled_with_cxx11_abi():
        raise SystemExit(
            f"{library_file} was built with C++ ABI {int(has_cxx11_abi)}, this torch with "
            f"{int(torch.compiled_with_cxx11_abi())}: source the library's set_env.sh with "
            f"--cxx_abi={int(torch.compiled_with_cxx11_abi())}"
        )
    include = [torch_npu / "include", torch_npu / "include/third_party/acl/inc", vendor / "include"]
    libraries = [torch_npu / "lib", vendor / "lib"]
    toolkit = os.environ.get("ASCEND_HOME_PATH")
    if toolkit:
        include.append(Path(toolkit) / "include")
        libraries.append(Path(toolkit) / "lib64")
    if not any((folder / "libascendcl.so").exists() for folder in libraries):
        raise SystemExit(
            "MODELTORCH_ASCEND=1 needs libascendcl.so, looked for in ASCEND_HOME_PATH/lib64: source the set_env.sh of "
            "the CANN toolkit"
        )
    return [str(path) for path in include], [str(path) for path in libraries]


def library() -> Extension:
    """The extension, without the Python library that torch's own CppExtension would link."""
    include = [str(ROOT / "csrc"), str(Path(nlohmann_json.__file__).parent / "include")]
    ascend_include, ascend_libraries = ascend_paths() if ASCEND else ([], [])
    return Extension(
        "modeltorch.libmodeltorch",
        sources=sources(),
        include_dirs=include + cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths() + ascend_libraries,
        libraries=["c10", "torch", "torch_cpu", *(["torch_npu", "atb", "ascendcl"] if ASCEND else [])],
        extra_compile_args={"cxx": compile_flags() + [f"-isystem{path}" for path in ascend_include]},
        extra_link_args=[
            "-fopenmp",
            "-Wl,--no-undefined",
            "-Wl,-z,defs",
            *(["-Wl,--allow-shlib-undefined"] if ASCEND else []),
        ],
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
