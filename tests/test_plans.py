"""Plans and the arena: what a step does once, what it never does again, and what stays bounded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from reference import Layout, Runner, Shape, parameters, random_model, reference_logits, relative_error, tables
from reference import weight_list as weights_for

MAX_PLANS = 64
TINY = Shape(heads=2, kv_heads=1, head_size=8, layers=1, hidden=16, intermediate=24, vocab=13, max_positions=1024)
SMALL = Shape()
ONCE_A_PLAN = ("shape_inferences", "kernel_setups", "plans_built", "arena_allocations")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from more threads, and on a busy machine those wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def small_model():
    return random_model(SMALL)


class Free:
    """An object of the tiny model that takes steps of any counts, with inputs cut from larger tensors.

    What the tokens are does not matter to the plans; every slot is -1, so a step only reads.
    """

    LARGEST = 1024

    def __init__(self, is_prefill: bool) -> None:
        self.is_prefill = is_prefill
        layout = Layout()
        self.made = torch.classes.ModelTorch.ModelTorch(layout.model_name)
        self.made.set_param(json.dumps(parameters(TINY, layout, torch.float32, is_prefill)))
        spec = json.loads(self.made.weight_spec())
        self.made.set_weight(weights_for(spec, random_model(TINY), layout, torch.float32))
        caches = [torch.zeros(8, 128, TINY.kv_heads, TINY.head_size) for _ in range(2)]
        self.made.set_kv_cache(caches[:1], caches[1:])
        self.cos, self.sin = tables(TINY, torch.float32)
        self.ids = torch.arange(self.LARGEST) % TINY.vocab
        self.slots = torch.full((self.LARGEST,), -1, dtype=torch.int32)
        self.blocks = torch.arange(8, dtype=torch.int32).repeat(self.LARGEST, 1)
        self.one = torch.ones(1)

    def step(self, lengths: list[int], rows: int = 1) -> torch.Tensor:
        """A prefill of these prompt lengths, or a decode step with these contexts."""
        tokens = sum(lengths) if self.is_prefill else len(lengths)
        ids = self.ids[:tokens]
        inputs = [
            *[ids, ids, self.cos, self.sin, self.one, self.blocks[: len(lengths)], self.slots[:tokens]],
            *[self.one, self.one, torch.tensor(lengths, dtype=torch.int32), ids[:1].repeat(rows), self.one],
        ]
        (logits,) = self.made.execute(inputs, json.dumps({"seqLen": lengths}))
        assert logits.shape == (rows if self.is_prefill else len(lengths), TINY.vocab)
        return logits

    def counters(self) -> dict[str, int]:
        return dict(self.made.counters())


def changed(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {key: after[key] - before[key] for key in after if after[key] != before[key]}


# --------------------------------------------------------------------------------------------------
# After the first step of a bucket


@pytest.mark.parametrize(
    ("is_prefill", "first", "later"),
    [
        pytest.param(True, ([5], 1), [([6], 1), ([7], 1), ([8], 1), ([5], 1)], id="prefill, one prompt"),
        pytest.param(
            True,
            ([30, 20, 14], 4),
            [([11, 11, 11], 3), ([61, 1, 1, 1], 4), ([16] * 4, 3), ([9, 8, 16], 4)],
            id="prefill, three or four prompts",
        ),
        pytest.param(True, ([129], 1), [([192], 1), ([150], 1)], id="prefill, a bucket of 192"),
        pytest.param(False, ([1], 1), [([2], 1), ([1000], 1), ([129], 1)], id="decode, one sequence"),
        pytest.param(
            False,
            ([5] * 8, 8),
            [([7] * 5, 5), ([1, 1000, 30, 2, 2, 2], 6), ([64] * 7, 7)],
            id="decode, five to eight sequences",
        ),
    ],
)
def test_only_the_first_step_of_a_bucket_infers_plans_sets_up_and_allocates(is_prefill, first, later):
    aim = Free(is_prefill)
    fresh = aim.counters()
    aim.step(*first)
    after_first = aim.counters()
    done = changed(fresh, after_first)
    assert done["executions"] == done["plans_built"] == done["plans"] == done["arena_allocations"] == 1
    assert done["shape_inferences"] > 0
    assert done["kernel_setups"] > 0
    for lengths, rows in later * 3:
        aim.step(lengths, rows)
    assert changed(after_first, aim.counters()) == {"executions": 3 * len(later)}


def _allocations(body) -> list[int]:
    """Bytes of every allocation that torch's allocator makes on the CPU while `body` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        body()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


def test_torch_allocates_nothing_in_a_later_step_but_the_logits():
    runner = Runner(SMALL, small_model())
    step = runner.prefill_inputs([list(range(1, 60)), [1, 2, 3]])
    first = _allocations(lambda: runner.encoder.execute(*step))
    logits = runner.encoder.execute(*step)[0]
    size = logits.numel() * logits.element_size()
    assert runner.encoder.counters()["arena_bytes"] in first, "the profiler must see what the first step does"
    assert _allocations(lambda: runner.encoder.execute(*step)) == [size]
    assert _allocations(lambda: runner.encoder.execute_out(step[0], [logits], step[1])) == []


@pytest.mark.parametrize(("inside", "beyond"), [(1, 2), (2, 3), (4, 5), (32, 33), (64, 65), (128, 129), (192, 193)])
def test_a_bucket_ends_at_powers_of_two_up_to_64_and_at_multiples_of_64_after(inside, beyond):
    aim = Free(is_prefill=True)
    for tokens, plans in ((inside, 1), (inside, 1), (beyond, 2), (inside, 2), (beyond, 2)):
        aim.step([tokens])
        assert aim.counters()["plans_built"] == plans
    if inside > 2:
        aim.step([inside - 1])
        assert aim.counters()["plans_built"] == 2


@pytest.mark.parametrize("what", ["tokens", "sequences", "logits rows"])
def test_each_count_has_buckets_of_its_own(what):
    aim = Free(is_prefill=True)
    aim.step([8, 8], rows=2)
    step = {
        "tokens": lambda: aim.step([9, 8], rows=2),
        "sequences": lambda: aim.step([5, 5, 6], rows=2),
        "logits rows": lambda: aim.step([8, 8], rows=3),
    }
    step[what]()
    assert aim.counters()["plans_built"] == 2


def test_logits_are_right_on_both_sides_of_a_bucket_boundary_and_after_shrinking_again():
    runner = Runner(SMALL, small_model(), blocks=80)
    generator = torch.Generator().manual_seed(0)
    for length in (63, 64, 65, 66, 128, 129, 64, 33, 65, 1, 63):
        tokens = torch.randint(0, SMALL.vocab, (length,), generator=generator).tolist()
        logits = runner.prefill([tokens])
        assert relative_error(logits, reference_logits(small_model(), tokens)) < 1e-4
        runner.free += runner.tables_of.pop()
        runner.tokens.pop()
    assert runner.encoder.counters()["executions"] == 11
    assert runner.encoder.counters()["plans_built"] < 11


def test_steps_of_many_shapes_leave_nothing_behind_for_each_other():
    """Every step gives bit for bit what an object gives that has seen no other step."""
    used = Free(is_prefill=True)
    generator = random.Random(1)
    for _ in range(30):
        lengths = [generator.randint(1, 90) for _ in range(generator.randint(1, 5))]
        rows = generator.randint(1, 9)
        assert torch.equal(used.step(lengths, rows), Free(is_prefill=True).step(lengths, rows))


# --------------------------------------------------------------------------------------------------
# Bounds


def _resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the resident size of a process is read from /proc")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@dataclass
class LongRun:
    """What was seen while 10,000 steps of random lengths and batches ran."""

    after_largest: list[dict[str, int]]
    at_the_end: list[dict[str, int]]
    most_plans: int
    resident_halfway: int
    resident_at_the_end: int


@pytest.fixture(scope="module")
def long_run() -> LongRun:
    steps = 10_000
    generator = random.Random(0)
    encoder, decoder = Free(is_prefill=True), Free(is_prefill=False)
    encoder.step([320] * 2, rows=64)
    encoder.step([10] * 64, rows=64)
    decoder.step([1000] * 64)
    after_largest = [encoder.counters(), decoder.counters()]
    most_plans, halfway = 0, 0
    for number in range(steps):
        if number == steps // 2:
            halfway = _resident_bytes()
        batch = generator.choice([1, 1, 2, 3, 5, 9, 17, 33, 64])
        if generator.random() < 0.5:
            longest = generator.choice([4, 30, 200]) if batch > 2 else 1000
            decoder.step([generator.randint(1, longest) for _ in range(batch)])
            continue
        longest = generator.choice([4, 16, 64, 64, 160, 640]) // batch
        lengths = [generator.randint(1, max(1, longest)) for _ in range(batch)]
        encoder.step(lengths, rows=generator.choice([1, batch, 40]))
        most_plans = max(most_plans, encoder.counters()["plans"], decoder.counters()["plans"])
    at_the_end = [encoder.counters(), decoder.counters()]
    assert sum(counters["executions"] for counters in at_the_end) == steps + 3
    return LongRun(after_largest, at_the_end, most_plans, halfway, _resident_bytes())


def test_ten_thousand_steps_of_random_lengths_keep_the_plans_bounded(long_run):
    encoder, _ = long_run.at_the_end
    assert encoder["plans_evicted"] > 0, "the steps must have had more shapes than plans may be kept"
    assert long_run.most_plans <= MAX_PLANS
    for counters in long_run.at_the_end:
        assert counters["plans"] <= MAX_PLANS
        assert counters["plans"] == counters["plans_built"] - counters["plans_evicted"]


def test_ten_thousand_steps_keep_the_arena_as_large_as_the_largest_step_needs(long_run):
    for largest, end in zip(long_run.after_largest, long_run.at_the_end, strict=True):
        assert end["plans_built"] > largest["plans_built"]
        assert end["arena_bytes"] == largest["arena_bytes"]
        assert end["arena_allocations"] == largest["arena_allocations"] <= 2


def test_memory_of_the_process_does_not_grow_over_the_last_five_thousand_steps(long_run):
    assert long_run.resident_at_the_end - long_run.resident_halfway < 4 * 2**20


def test_the_arena_only_grows_and_is_as_large_as_the_largest_plan_asks():
    aim = Free(is_prefill=True)
    sizes = []
    for tokens in (1, 300, 20, 64, 301, 640, 5):
        aim.step([tokens])
        sizes.append(aim.counters()["arena_bytes"])
    assert sizes == sorted(sizes)
    assert sizes[1] > sizes[0]
    assert sizes[5] > sizes[4] == sizes[3] == sizes[2] == sizes[1]
    assert sizes[6] == sizes[5]
    assert aim.counters()["arena_allocations"] == 3
    alone = Free(is_prefill=True)
    alone.step([640])
    assert alone.counters()["arena_bytes"] == sizes[-1]


def test_the_plan_that_was_used_longest_ago_is_the_one_that_goes():
    aim = Free(is_prefill=True)
    shapes = [(64 * blocks, rows) for blocks in range(1, 14) for rows in (1, 2, 4, 8, 16)]
    assert len(shapes) == MAX_PLANS + 1
    for tokens, rows in shapes[:MAX_PLANS]:
        aim.step([tokens], rows)
    assert aim.counters()["plans"] == aim.counters()["plans_built"] == MAX_PLANS
    assert aim.counters()["plans_evicted"] == 0
    aim.step([shapes[0][0]], shapes[0][1])  # now the second is the one that was used longest ago
    aim.step([shapes[-1][0]], shapes[-1][1])
    full = aim.counters()
    assert (full["plans"], full["plans_built"], full["plans_evicted"]) == (MAX_PLANS, MAX_PLANS + 1, 1)
    for tokens, rows in (shapes[0], shapes[2], shapes[-1]):
        aim.step([tokens], rows)
    assert aim.counters()["plans_built"] == MAX_PLANS + 1
    aim.step([shapes[1][0]], shapes[1][1])
    assert aim.counters()["plans_built"] == MAX_PLANS + 2


# --------------------------------------------------------------------------------------------------
# Caches and weights that change


def _written_runner(seed: int = 0, **options) -> tuple[Runner, list, str]:
    """A runner with two prompts in its cache, and a decode step."""
    runner = Runner(SMALL, small_model(), seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    runner.prefill([torch.randint(0, SMALL.vocab, (length,), generator=generator).tolist() for length in (9, 20)])
    inputs, text = runner.decode_inputs({0: 1, 1: 2})
    return runner, inputs, text


def test_other_caches_of_the_same_shape_keep_the_plans_and_are_the_ones_in_use():
    runner, inputs, text = _written_runner()
    first = runner.decoder.execute(inputs, text)[0]
    before = runner.decoder.counters()
    others = [tensor.flip(1).contiguous() for tensor in runner.caches]
    runner.decoder.set_kv_cache(others[0::2], others[1::2])
    assert dict(runner.decoder.counters()) == dict(before)
    olds, news = copy.deepcopy(runner.caches), copy.deepcopy(others)
    second = runner.decoder.execute(inputs, text)[0]
    assert changed(dict(before), dict(runner.decoder.counters())) == {"executions": 1}
    slots = inputs[6].long()
    for tensor, old, other, new in zip(runner.caches, olds, others, news, strict=True):
        assert torch.equal(tensor.view(torch.int32), old.view(torch.int32)), "the old caches are left alone"
        rows = other.view(-1, SMALL.kv_heads * SMALL.head_size)[slots]
        assert not torch.equal(rows, new.view(-1, SMALL.kv_heads * SMALL.head_size)[slots])
    fresh = Runner(SMALL, small_model())
    fresh.decoder.set_kv_cache(news[0::2], news[1::2])
    torch.testing.assert_close(second, fresh.decoder.execute(inputs, text)[0], rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("block_size", "blocks"), [(8, 64), (16, 100), (128, 4), (1, 70)])
def test_caches_of_another_shape_work(block_size, blocks):
    runner, inputs, text = _written_runner()
    expected = runner.decoder.execute(inputs, text)[0]
    other, other_inputs, _ = _written_runner(block_size=block_size, blocks=blocks)
    runner.decoder.set_kv_cache(other.caches[0::2], other.caches[1::2])
    logits = runner.decoder.execute(other_inputs, text)[0]
    assert relative_error(logits, expected) < 1e-6
    assert f"float32[{blocks}, {block_size}, {SMALL.kv_heads}, {SMALL.head_size}]" in runner.decoder.graph()
    runner.decoder.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
    assert torch.equal(runner.decoder.execute(inputs, text)[0], expected)


def test_other_weights_are_the_ones_in_use_and_cost_one_plan_again():
    runner, inputs, text = _written_runner()
    runner.decoder.execute(inputs, text)
    other = random_model(SMALL, seed=5)
    spec = json.loads(runner.decoder.weight_spec())
    runner.decoder.set_weight(weights_for(spec, other, runner.layout, torch.float32))
    second = runner.decoder.execute(inputs, text)[0]
    fresh = Runner(SMALL, other)
    fresh.decoder.set_kv_cache(runner.caches[0::2], runner.caches[1::2])
    assert torch.equal(second, fresh.decoder.execute(inputs, text)[0])
    assert runner.decoder.counters()["plans"] == 1


def test_tables_of_another_size_and_block_tables_of_another_width_need_no_plan():
    runner, inputs, text = _written_runner()
    expected = runner.decoder.execute(inputs, text)[0]
    before = dict(runner.decoder.counters())
    inputs[2], inputs[3] = inputs[2][:100].contiguous(), inputs[3][:100].contiguous()
    inputs[5] = torch.cat([inputs[5], torch.zeros(2, 7, dtype=torch.int32)], dim=1)
    assert torch.equal(runner.decoder.execute(inputs, text)[0], expected)
    assert changed(before, dict(runner.decoder.counters())) == {"executions": 1}
