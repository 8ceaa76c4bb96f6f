"""The Python front end on device npu: the bundled checkpoint does sums there too."""

from __future__ import annotations

import pytest
import torch
from stand_in import IN_LINE, IS_OLD_CHIP, count, inject, pending

from modeltorch import checkpoint
from modeltorch.cli import main
from modeltorch.engine import Generation
from modeltorch.flash_causal_qwen2 import FlashQwen2ForCausalLM

PROMPTS = ["345+678=", "12-345=", "max 271 828 182=", "sort 31 4 15 9 26=", "reverse 1 2 3="]
TEXTS = ["1023", "-333", "828", "4 9 15 26 31", "3 2 1"]


def bundled(device: str, dtype: str = "float16", **options: int) -> FlashQwen2ForCausalLM:
    sizes = {"num_blocks": 8, **options}
    return FlashQwen2ForCausalLM.from_pretrained(checkpoint.BUNDLED, device=device, dtype=dtype, **sizes)


@pytest.fixture(scope="module")
def model() -> FlashQwen2ForCausalLM:
    return bundled("npu")


@pytest.fixture(scope="module")
def expected() -> list[Generation]:
    return bundled("cpu").generate(PROMPTS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_bundled_checkpoint_answers_on_the_npu_as_on_the_cpu(dtype):
    before = count("operations")
    answers = bundled("npu", dtype).generate(PROMPTS)
    assert count("operations") > before
    assert answers == bundled("cpu", dtype).generate(PROMPTS)
    assert [answer.text.strip() for answer in answers] == TEXTS


def test_requests_enter_and_leave_the_batch_on_the_npu(expected):
    """Three blocks: prefill and decode steps of different requests follow each other."""
    assert bundled("npu", num_blocks=3, block_size=64).generate(PROMPTS) == expected


def test_tokens_are_drawn_on_the_npu_as_on_the_cpu(model):
    """The logits are a little apart, but these draws do not lie where that matters."""
    options = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3}
    assert model.generate(PROMPTS, **options) == bundled("cpu").generate(PROMPTS, **options)


def test_logits_of_every_position_equal_the_cpus(model):
    tokens = [model.encode(prompt) for prompt in PROMPTS]
    for npu, cpu in zip(model.compute_logits(tokens), bundled("cpu").compute_logits(tokens), strict=True):
        assert npu.dtype == torch.float32
        torch.testing.assert_close(npu, cpu, rtol=5e-2, atol=5e-2)


def test_the_command_line_answers_on_the_npu(capsys):
    assert main(["generate", "--device", "npu", "--dtype", "float16", "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out.split() == [PROMPTS[0], TEXTS[0]]


@pytest.mark.parametrize("step", ["the prefill", "the first decode step", "a later decode step"])
@pytest.mark.parametrize("call", ["setup", "execute"])
def test_a_step_that_fails_gives_one_exception_and_no_text(model, expected, call, step):
    assert model.generate(PROMPTS) == expected
    before = count("operations")
    model.generate(PROMPTS, max_new_tokens=1)
    prefill = count("operations") - before
    before = count("operations")
    model.generate(PROMPTS, max_new_tokens=2)
    decode = count("operations") - before - prefill
    skip = {"the prefill": 5, "the first decode step": prefill + 5, "a later decode step": prefill + 2 * decode + 5}
    inject(call, skip=skip[step])
    with pytest.raises(RuntimeError, match=r"node [\w.]+ \(\w+\): \w+Operation: the vendor's (Setup|Execute) returned"):
        model.generate(PROMPTS)
    assert pending(call) == 0
    assert model.cache.free_blocks == model.cache.num_blocks
    assert model.generate(PROMPTS) == expected


def test_a_prefill_that_fails_is_told_by_compute_logits(model):
    tokens = model.encode(PROMPTS[0])
    (expected,) = model.compute_logits([tokens])
    inject("execute", skip=5)
    with pytest.raises(RuntimeError, match="the vendor's Execute returned 7"):
        model.compute_logits([tokens])
    assert torch.equal(model.compute_logits([tokens])[0], expected)


@pytest.mark.skipif(IN_LINE, reason="launches are in line in this mode")
def test_a_prefill_that_failed_stops_the_decode_object(model):
    """A caller of forward who reads no logits in between."""
    ids, places = torch.tensor([3, 4]), torch.tensor([0, 1])
    tables, slots = torch.tensor([[0]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    lengths = torch.tensor([2], dtype=torch.int32)
    prefill = (ids, places, True, model.cache.pairs, tables, slots, lengths, 2)
    decode = (ids[:1], places[:1] + 2, False, model.cache.pairs, tables, slots[:1] + 2, lengths + 1, 3)
    model.forward(*prefill)
    model.forward(*decode)
    model.settle()
    inject("execute", skip=5)
    model.forward(*prefill)
    with pytest.raises(RuntimeError, match="an earlier step of this object failed"):
        model.forward(*decode)
    model.forward(*prefill)
    model.forward(*decode)
    model.settle()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", id="brain float")])
def test_a_type_that_the_chip_lacks_is_refused_with_the_weights(dtype):
    if dtype == "bfloat16" and not IS_OLD_CHIP:
        pytest.skip("this chip has bfloat16")
    told = "Ascend computes in float16 or bfloat16, got float32" if dtype == "float32" else "this Ascend chip has no bf"
    with pytest.raises(NotImplementedError, match=rf"set_weight \[DecoderModel_Prefill\]: {told}"):
        bundled("npu", dtype)
