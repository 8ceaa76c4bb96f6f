"""A torch.nn.Module that holds the object scripts with torch.jit.script and calls it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from reference import DEVICES, Layout, Runner, Shape, random_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SHAPE = Shape()


@cache
def reference_model():
    return random_model(SHAPE)


class Decoder(torch.nn.Module):
    """Both phases behind one forward."""

    def __init__(self, encoder: torch.ScriptObject, decoder: torch.ScriptObject) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, inputs: list[torch.Tensor], parameters: str, is_prefill: bool) -> torch.Tensor:
        """The logits of one step."""
        if is_prefill:
            return self.encoder.execute(inputs, parameters)[0]
        return self.decoder.execute(inputs, parameters)[0]

    @torch.jit.export
    def fill(self, inputs: list[torch.Tensor], parameters: str, out: torch.Tensor) -> int:
        """Writes the logits of a prefill into `out`."""
        return self.encoder.execute_out(inputs, [out], parameters)

    @torch.jit.export
    def best_tokens(self, inputs: list[torch.Tensor], parameters: str) -> torch.Tensor:
        """What a scripted caller does with the logits."""
        logits = self.encoder.execute(inputs, parameters)[0]
        return torch.argmax(logits.float() * 2.0, dim=-1)

    @torch.jit.export
    def executions(self) -> int:
        """A read-only extra from a script."""
        return self.encoder.counters()["executions"]

    @torch.jit.export
    def description(self) -> tuple[str, str, float]:
        """The other read-only extras."""
        return self.encoder.graph(), self.encoder.weight_spec(), self.encoder.progress()

    @torch.jit.export
    def use_caches(self, keys: list[torch.Tensor], values: list[torch.Tensor]) -> int:
        """Sets up from a script."""
        return self.encoder.set_kv_cache(keys, values) + self.decoder.set_kv_cache(keys, values)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(params=["qwen_PAModel", "qwen_QwenDecoderModel"])
def runner(request, device) -> Runner:
    return Runner(SHAPE, reference_model(), layout=Layout(request.param), device=device)


def scripted(runner: Runner) -> torch.jit.ScriptModule:
    return torch.jit.script(Decoder(runner.encoder, runner.decoder))


def test_a_scripted_module_returns_the_same_logits_in_both_phases(runner):
    module = scripted(runner)
    prefill = runner.prefill_inputs([[1, 2, 3], [4]])
    logits = module(*prefill, True)
    assert logits.shape == (4, SHAPE.vocab)
    assert torch.equal(logits, runner.encoder.execute(*prefill)[0])
    decode = runner.decode_inputs({1: 5, 0: 6})
    logits = module(*decode, False)
    assert logits.shape == (2, SHAPE.vocab)
    assert torch.equal(logits, runner.decoder.execute(*decode)[0])


def test_a_scripted_module_computes_with_the_logits(runner):
    module = scripted(runner)
    step = runner.prefill_inputs([[1, 2, 3], [4]])
    assert torch.equal(module.best_tokens(*step), runner.encoder.execute(*step)[0].argmax(-1))


def test_a_scripted_module_writes_into_the_tensors_of_execute_out(runner):
    module = scripted(runner)
    step = runner.prefill_inputs([[1, 2, 3], [4]])
    out = torch.full((4, SHAPE.vocab), float("nan"), device=runner.device)
    assert module.fill(*step, out) == 0
    assert torch.equal(out, runner.encoder.execute(*step)[0])


def test_the_extras_answer_inside_a_script(runner):
    module = scripted(runner)
    assert module.executions() == 0
    module(*runner.prefill_inputs([[1, 2, 3]]), True)
    assert module.executions() == runner.encoder.counters()["executions"] == 1
    assert module.description() == (runner.encoder.graph(), runner.encoder.weight_spec(), 1.0)


def test_a_script_can_set_the_caches(runner):
    module = scripted(runner)
    step = runner.prefill_inputs([[1, 2, 3]])
    fresh = [torch.full_like(tensor, float("nan")) for tensor in runner.caches]
    assert module.use_caches(fresh[0::2], fresh[1::2]) == 0
    module(*step, True)
    assert all(tensor.isnan().all() for tensor in runner.caches)
    assert not any(tensor.isnan().all() for tensor in fresh)


@pytest.mark.parametrize(
    ("spoil", "mention"),
    [
        pytest.param(lambda inputs: inputs[:11], "12 inputs", id="count"),
        pytest.param(lambda inputs: [inputs[0].double(), *inputs[1:]], "input_ids", id="dtype"),
        pytest.param(lambda inputs: [inputs[0].to("meta"), *inputs[1:]], "input_ids", id="place"),
    ],
)
def test_an_error_inside_a_script_raises_and_the_module_stays_usable(runner, spoil, mention):
    module = scripted(runner)
    inputs, text = runner.prefill_inputs([[1, 2, 3]])
    expected = runner.encoder.execute(inputs, text)[0]
    with pytest.raises(RuntimeError, match=mention):
        module(spoil(inputs), text, True)
    with pytest.raises(RuntimeError, match=r"execute_out.*output 0"):
        module.fill(inputs, text, torch.zeros(1, SHAPE.vocab, device=runner.device))
    with pytest.raises(RuntimeError, match="seqLen"):
        module(inputs, "{}", True)
    assert torch.equal(module(inputs, text, True), expected)


@pytest.mark.parametrize("device", ["cpu"])  # elsewhere values are seen by kernels: test_cuda.py
def test_a_value_out_of_range_inside_a_script_raises(runner):
    module = scripted(runner)
    inputs, text = runner.prefill_inputs([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="input_ids"):
        module([inputs[0] + SHAPE.vocab, *inputs[1:]], text, True)
    assert torch.isfinite(module(inputs, text, True)).all()


def test_a_script_sees_an_object_that_is_not_ready():
    empty = torch.classes.ModelTorch.ModelTorch("qwen_PAModel")
    module = torch.jit.script(Decoder(empty, empty))
    with pytest.raises(RuntimeError, match="set_param must come first"):
        module([torch.zeros(1)], "{}", True)


def test_the_script_and_python_hold_the_same_object(runner):
    module = scripted(runner)
    step = runner.prefill_inputs([[1, 2, 3]])
    first = module(*step, True)
    caches = [torch.zeros_like(tensor) for tensor in runner.caches]
    runner.encoder.set_kv_cache(caches[0::2], caches[1::2])
    assert torch.equal(module(*step, True), first)
    assert all(tensor.count_nonzero() > 0 for tensor in caches)
