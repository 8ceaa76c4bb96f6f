"""Finds and loads the C++ library that was built for the torch that is running."""

from __future__ import annotations

import re
from pathlib import Path

import torch

SUPPORTED_TORCH = ("2.11", "2.12", "2.13", "2.14")
"""Torch minors that the sources build against; each needs a library of its own."""

_FOLDER = Path(__file__).parent
_REBUILD = "pip install --no-build-isolation -e ."


def torch_minor() -> str:
    """The minor of the torch that is running, for example "2.13"."""
    match = re.match(r"(\d+\.\d+)", torch.__version__)
    return match.group(1) if match else torch.__version__


def library_path() -> Path:
    """The library for the running torch.

    Raises:
        ImportError: this torch is not supported, or no library was built for it; the message says what to do.
    """
    minor = torch_minor()
    path = _FOLDER / f"libmodeltorch_torch{minor}.so"
    if minor not in SUPPORTED_TORCH:
        raise ImportError(
            f"modeltorch works with torch {SUPPORTED_TORCH[0]} to {SUPPORTED_TORCH[-1]}, but this is torch "
            f"{torch.__version__}: install one of those and run `{_REBUILD}`."
        )
    if not path.exists():
        built = sorted(p.stem.removeprefix("libmodeltorch_torch") for p in _FOLDER.glob("libmodeltorch_torch*.so"))
        found = f"built for torch {', '.join(built)} only" if built else "not built yet"
        raise ImportError(
            f"modeltorch's C++ library is {found}, but this is torch {torch.__version__}: run `{_REBUILD}` in its "
            "source folder."
        )
    return path


def _load(path: Path) -> None:
    """Loads the library; one that was built for Ascend needs torch_npu before it."""
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        if "libtorch_npu" not in f"{error} {error.__cause__}":
            raise
        import torch_npu  # noqa: F401  its libraries are what was missing

        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]


def load() -> None:
    """Registers torch.classes.ModelTorch; does nothing if it is registered already.

    Raises:
        ImportError: see library_path; or the library is there but does not load, with the likely causes.
    """
    path = library_path()
    try:
        _load(path)
    except OSError as error:
        raise ImportError(
            f"modeltorch could not load {path.name}: {error}. It was most likely built against another build of torch "
            f"{torch_minor()}, or against a system library that is missing here: run `{_REBUILD}` again."
        ) from error
