"""How caches are handed over: the plain shape everywhere, tiles on the chips that keep caches so."""

from __future__ import annotations

import pytest
import torch
import torch_npu
from reference import Runner, Shape, random_model, relative_error
from stand_in import IS_OLD_CHIP

SHAPE = Shape()
BLOCK_SIZE = 16
TILES = SHAPE.kv_heads * SHAPE.head_size // 16
STEPS = [{0: 4, 1: 9}, {0: 5}, {0: 6, 1: 7}]
NEEDS_OLD_CHIP = pytest.mark.skipif(not IS_OLD_CHIP, reason="caches are in tiles on the older chips alone")


@pytest.fixture
def runner() -> Runner:
    return Runner(SHAPE, random_model(SHAPE), torch.float16, "npu", block_size=BLOCK_SIZE)


def empty_caches(*sizes: int) -> list[torch.Tensor]:
    return [torch.full(sizes, float("nan"), dtype=torch.float16).to("npu") for _ in range(2 * SHAPE.layers)]


def set_caches(runner: Runner, caches: list[torch.Tensor]) -> None:
    runner.caches = caches
    for step in (runner.encoder, runner.decoder):
        assert step.set_kv_cache(caches[0::2], caches[1::2]) == 0


def answers(runner: Runner) -> list[torch.Tensor]:
    return [runner.prefill([[1, 2, 3] * 7, [4, 5]]), *(runner.decode(step) for step in STEPS)]


def as_tiles(plain: torch.Tensor) -> torch.Tensor:
    """[blocks, block_size, kv_heads, head_size] as [blocks, kv_heads * head_size / 16, block_size, 16]."""
    return plain.view(-1, BLOCK_SIZE, TILES, 16).permute(0, 2, 1, 3)


@NEEDS_OLD_CHIP
@pytest.mark.parametrize("knows_its_format", [False, True])
def test_a_cache_may_be_described_by_its_tiles(runner, knows_its_format):
    on_cpu = Runner(SHAPE, runner.model, torch.float16, block_size=BLOCK_SIZE)
    caches = empty_caches(runner.blocks, TILES, BLOCK_SIZE, 16)
    if knows_its_format:
        torch.npu.config.allow_internal_format = True
        caches = [torch_npu.npu_format_cast(cache, 29) for cache in caches]
        torch.npu.config.allow_internal_format = False
        assert all(torch_npu.get_npu_format(cache) == 29 for cache in caches)
    set_caches(runner, caches)
    for npu, cpu in zip(answers(runner), answers(on_cpu), strict=True):
        assert relative_error(npu, cpu) < 5e-3
    if knows_its_format:
        return
    for npu, cpu in zip(runner.caches, on_cpu.caches, strict=True):
        read, expected = npu.cpu(), as_tiles(cpu)
        assert torch.equal(read.isnan(), expected.isnan())
        torch.testing.assert_close(read, expected, equal_nan=True, rtol=5e-2, atol=5e-2)


@NEEDS_OLD_CHIP
def test_both_descriptions_give_the_same_logits_and_may_change_between_steps(runner):
    other = Runner(SHAPE, runner.model, torch.float16, "npu", block_size=BLOCK_SIZE)
    expected = answers(other)
    got = [runner.prefill([[1, 2, 3] * 7, [4, 5]])]
    set_caches(runner, [cache.view(runner.blocks, TILES, BLOCK_SIZE, 16) for cache in runner.caches])
    got += [runner.decode(step) for step in STEPS]
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one, two)
    assert dict(runner.decoder.counters())["plans_built"] == dict(other.decoder.counters())["plans_built"]


@NEEDS_OLD_CHIP
def test_a_cache_with_other_tiles_is_refused(runner):
    for sizes in [(64, TILES + 1, 16, 16), (64, TILES, 16, 32), (64, TILES, 16)]:
        with pytest.raises(ValueError, match=r"key cache 0 must be \[blocks, block_size, 2, 16\] or, by its tiles"):
            set_caches(runner, empty_caches(*sizes))


def test_tiles_that_do_not_fit_are_refused(runner):
    """On every chip a tensor in FRACTAL_NZ has its bytes in another order than its sizes say."""
    torch.npu.config.allow_internal_format = True
    plain = [torch_npu.npu_format_cast(cache, 29) for cache in empty_caches(8, 32, SHAPE.kv_heads, SHAPE.head_size)]
    partly = [torch_npu.npu_format_cast(cache, 29) for cache in empty_caches(8, TILES, 24, 16)]
    torch.npu.config.allow_internal_format = False
    with pytest.raises(ValueError, match=r"key cache 0 is FRACTAL_NZ, which only a cache"):
        set_caches(runner, plain)
    with pytest.raises(ValueError, match=r"key cache 0 (is FRACTAL_NZ, which only a cache|must be)"):
        set_caches(runner, partly)


@pytest.mark.skipif(IS_OLD_CHIP, reason="the older chips take tiles")
def test_tiles_are_of_the_older_chips_alone(runner):
    with pytest.raises(ValueError, match=r"key cache 0 must be \[blocks, block_size, 2, 16\], got float16"):
        set_caches(runner, empty_caches(runner.blocks, TILES, 32, 16))
