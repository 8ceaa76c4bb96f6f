"""Builds the C++ library of modeltorch.

What comes out is `modeltorch/libmodeltorch_torch<minor>.so`: a plain shared library that links libtorch and no Python,
so one file serves every Python of a torch minor (2.13, say), and libraries for several minors can lie side by side.
`modeltorch/_library.py` loads the one for the torch that is running.

    pip install --no-build-isolation -e .      build in place, against the torch that is installed
    MODELTORCH_DEBUG=1 pip install ...          -O1 -g with assertions instead of -O3
    MODELTORCH_ASCEND=1 pip install ...         with Ascend, against torch_npu and the library under $ATB_HOME_PATH
    MODELTORCH_CUDA=1 pip install ...           with CUDA, by the nvcc of CUDA_HOME; 0: without it
    MODELTORCH_CUDA_ARCHS=90a pip install ...   machine code for these processors only (default: 80,90a,80+PTX)

Unless MODELTORCH_CUDA says otherwise, CUDA is built where torch itself was built for CUDA and there is an nvcc of the
same major version. The library that comes out serves the CPU as well. It links the CUDA runtime and cuBLASLt, both of
which torch has loaded by then, and none of torch's CUDA libraries: what it asks of those goes through torch's
dispatcher and its device-neutral interfaces.

Sources are all of csrc/**/*.cpp but those of devices that were not asked for, and with CUDA csrc/**/*.cu; what a
device needs beyond that is decided here and nowhere else.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nlohmann_json
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
SUPPORTED_MINORS = ("2.11", "2.12", "2.13", "2.14")
DEFAULT_CUDA_ARCHS = "80,90a,80+PTX"


def nvcc() -> Path | None:
    """The CUDA compiler that torch's build would use."""
    home = cpp_extension.CUDA_HOME
    path = Path(home) / "bin" / "nvcc" if home else None
    return path if path is not None and path.exists() else None


def nvcc_major(path: Path) -> str:
    """The major version of a CUDA compiler, "13"."""
    text = subprocess.run([str(path), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", text)
    return found.group(1) if found else ""


def wants_cuda() -> bool:
    """Whether this build has CUDA; stops with a sentence that says what is missing if it was asked for."""
    asked = os.environ.get("MODELTORCH_CUDA")
    if asked == "0":
        return False
    torch_major = (torch.version.cuda or "").split(".")[0]
    compiler = nvcc()
    if asked != "1":
        return compiler is not None and bool(torch_major) and nvcc_major(compiler) == torch_major
    if not torch_major:
        raise SystemExit(f"MODELTORCH_CUDA=1 needs a torch that was built for CUDA, this is {torch.__version__}")
    if compiler is None:
        raise SystemExit("MODELTORCH_CUDA=1 needs nvcc: install the CUDA toolkit or set CUDA_HOME to its folder")
    if nvcc_major(compiler) != torch_major:
        raise SystemExit(
            f"MODELTORCH_CUDA=1 needs the nvcc of CUDA {torch_major}, for which this torch was built, but {compiler} "
            f"is of CUDA {nvcc_major(compiler)}"
        )
    return True


CUDA = wants_cuda()


def is_switched_on(variable: str) -> bool:
    """Whether an environment variable asks for something: 1, true, yes or on. Stops at what is neither yes nor no."""
    value = os.environ.get(variable, "").strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("", "0", "false", "no", "off"):
        return False
    raise SystemExit(f"{variable} must be 1 or 0, got {os.environ[variable]!r}")


ASCEND = is_switched_on("MODELTORCH_ASCEND")


def compile_flags() -> list[str]:
    """Flags of every C++ file. The processor level is chosen at run time, so nothing here names one."""
    flags = ["-std=c++20", "-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    if is_switched_on("MODELTORCH_DEBUG"):
        return [*flags, "-O1", "-g"]
    return [*flags, "-O3", "-g0", "-DNDEBUG"]


def is_for_ascend(path: Path) -> bool:
    """True for sources that need torch_npu or the vendor's library."""
    return path.stem.endswith("_npu") or path.stem.startswith("npu")


def is_for_cuda(path: Path) -> bool:
    """True for sources that need CUDA's headers."""
    return path.suffix == ".cu" or path.stem.startswith("cuda")


def sources() -> list[str]:
    """Every source of this build, relative to the root."""
    every = [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.cu")]
    chosen = [path for path in every if (ASCEND or not is_for_ascend(path)) and (CUDA or not is_for_cuda(path))]
    return sorted(str(path.relative_to(ROOT)) for path in chosen)


def cuda_flags() -> list[str]:
    """Flags of every .cu file. torch's own build would switch the operators of half types off."""
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "-Xcompiler", "-fopenmp,-Wall,-Wno-psabi"]
    flags += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")]
    flags += ["-U__CUDA_NO_HALF2_OPERATORS__", "--diag-suppress=177", "--expt-relaxed-constexpr"]
    for arch in os.environ.get("MODELTORCH_CUDA_ARCHS", DEFAULT_CUDA_ARCHS).split(","):
        number = arch.removesuffix("+PTX")
        code = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={code}_{number}")
    return flags


def cuda_paths() -> tuple[list[str], list[str], list[str]]:
    """Include folders, library folders and libraries of a CUDA build; cuBLASLt may come from torch's own wheels."""
    major = (torch.version.cuda or "").split(".")[0]
    compiler = nvcc()
    assert compiler is not None  # wants_cuda has seen it
    homes = [Path(cpp_extension.CUDA_HOME or ""), compiler.resolve().parent.parent]
    toolkit = next((home for home in homes if (home / "include" / "cuda_runtime.h").exists()), None)
    if toolkit is None:
        raise SystemExit(f"MODELTORCH_CUDA=1 needs the headers of the CUDA toolkit, looked for in {homes[0]}/include")
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(folder) / f"cu{major}" for folder in (spec.submodule_search_locations or [])] if spec else []
    include = next((f / "include" for f in (toolkit, *wheels) if (f / "include" / "cublasLt.h").exists()), None)
    library_name = f"libcublasLt.so.{major}"
    folders = [toolkit / "lib64", *(folder / "lib" for folder in wheels)]
    library = next((folder for folder in folders if (folder / library_name).exists()), None)
    if include is None or library is None:
        raise SystemExit(
            f"MODELTORCH_CUDA=1 needs cublasLt.h and {library_name}, looked for in {toolkit} and in the package "
            "nvidia-cublas of this Python"
        )
    return [str(toolkit / "include"), str(include)], [str(toolkit / "lib64"), str(library)], [library_name]


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
    contents = library_file.read_bytes()
    if not contents.startswith(b"\x7fELF"):
        what = "is empty" if not contents else "is no shared library"
        raise SystemExit(f"{library_file} {what}: install the vendor's transformer library again")
    has_cxx11_abi = b"__cxx11" in contents
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
    cuda_include, cuda_libraries, cublas = cuda_paths() if CUDA else ([], [], [])
    system_include = [f"-isystem{path}" for path in ascend_include + cuda_include]
    return Extension(
        "modeltorch.libmodeltorch",
        sources=sources(),
        include_dirs=include + cpp_extension.include_paths(),
        library_dirs=cpp_extension.library_paths() + ascend_libraries + cuda_libraries,
        libraries=[
            "c10",
            "torch",
            "torch_cpu",
            *(["torch_npu", "atb", "ascendcl"] if ASCEND else []),
            *(["cudart"] if CUDA else []),
        ],
        extra_compile_args={"cxx": compile_flags() + system_include, "nvcc": cuda_flags()},
        extra_link_args=[
            "-fopenmp",
            # The one that torch has loaded, also where the compiler would put its own into the library: two of them in
            # one process do not know each other's locales, and the first number that one prints ends the process.
            "-l:libstdc++.so.6",
            "-Wl,--no-undefined",
            "-Wl,-z,defs",
            *(["-Wl,--allow-shlib-undefined"] if ASCEND or CUDA else []),
            *(f"-l:{name}" for name in cublas),
        ],
        language="c++",
    )


class BuildLibrary(cpp_extension.BuildExtension):
    """torch's ninja build, with a file name that carries the torch minor instead of a Python ABI."""

    def get_ext_filename(self, fullname: str) -> str:
        """Maps modeltorch.libmodeltorch to modeltorch/libmodeltorch_torch2.13.so."""
        return os.path.join(*fullname.split(".")) + f"_torch{TORCH_MINOR}.so"

    def build_extensions(self) -> None:
        """Builds; rms_norm.cpp and rms_norm.cu of one folder get object files of their own."""
        plain = self.compiler.object_filenames

        def object_filenames(names: Iterable[str], *options: Any, **named: Any) -> list[str]:
            objects = []
            for name in names:
                built = plain([name], *options, **named)[0]
                objects.append(built.removesuffix(".o") + ".cu.o" if str(name).endswith(".cu") else built)
            return objects

        self.compiler.object_filenames = object_filenames
        super().build_extensions()

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
