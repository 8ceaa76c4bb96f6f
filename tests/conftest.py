"""Test-wide settings: how many random cases, and no time limit on a case (machines are shared)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

    from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

_QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
settings.register_profile("short", max_examples=25, **_QUIET)
settings.register_profile("long", max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

# Modules that tests share say what their assertions compared, as tests do.
pytest.register_assert_rewrite("model_objects", "contract_callers", "watched_models", "flash_callers")


def pytest_report_header() -> str:
    """Says which devices these tests run on, and which not."""
    from reference import DEVICES

    missing = [device for device in ("cuda",) if device not in DEVICES]
    return f"devices: {', '.join(DEVICES)}" + (f"; NOT TESTED: {', '.join(missing)}" if missing else "")


# The tests of the Ascend path run on stand-ins alone: `make test-ascend`.
collect_ignore = [] if os.environ.get("ASCEND_HOST") == "1" else ["ascend_host"]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and wait for it where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference() -> Qwen2ForCausalLM:
    """A model of transformers of the usual small shape, with random weights."""
    from reference import Shape, random_model  # loads the library, which the Ascend tests do in an order of their own

    return random_model(Shape())


@pytest.fixture
def model(reference: Qwen2ForCausalLM) -> FlashQwen2ForCausalLM:
    """Our model over its weights, new for every test."""
    from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

    return FlashQwen2ForCausalLM(reference.config, reference.state_dict(), dtype="float32")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, here and in processes that a test starts."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
