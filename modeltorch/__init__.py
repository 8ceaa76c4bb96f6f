"""A native Qwen2 runner inside PyTorch.

Importing this package registers `torch.classes.ModelTorch.ModelTorch` and needs torch alone. The helpers that read
checkpoints, batch requests and sample are in `modeltorch.flash_causal_qwen2`.
"""

from modeltorch import _library

__version__ = "0.1.0"

_library.load()
