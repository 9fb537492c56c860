"""Sampler and RowLogits against transformers' own processors, one step at a time."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma2_stream import NotFiniteError, Request, SamplingParams
from gemma2_stream.sampling import Chooser, RowLogits, Sampler, _find

several = settings(max_examples=50)
parameters = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.3, 5),
        "top_k": st.sampled_from([0, 1, 2, 3, 5, 100]),
        "top_p": st.one_of(st.just(1.0), st.floats(0.05, 1)),
        "min_p": st.one_of(st.just(0.0), st.floats(0, 1)),
    }
)


def warped(logits: torch.Tensor, **values: Any) -> torch.Tensor:
    """Probabilities by transformers' warpers, in the order that `generate` applies them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(values["temperature"])])
    if values.get("top_k"):
        warpers.append(TopKLogitsWarper(values["top_k"]))
    if values.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(values["top_p"]))
    if values.get("min_p"):
        warpers.append(MinPLogitsWarper(values["min_p"]))
    ids = torch.zeros(1, 0, dtype=torch.long)
    return warpers(ids, logits[None].double()).softmax(-1)[0]


def draw(logits: torch.Tensor, times: int, seed: int = 0, **values: Any) -> Counter[int]:
    sampler = Sampler(SamplingParams(seed=seed, **values))
    return Counter(sampler.choose(logits.numpy()) for _ in range(times))


def noise(size: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * spread


@several
@given(
    size=st.integers(1, 12),
    spread=st.floats(0.01, 3),
    number=st.integers(0, 999),
    params=parameters,
)
def test_the_support_is_that_of_transformers(
    size: int, spread: float, number: int, params: dict[str, Any]
) -> None:
    """Only tokens that the warpers leave are chosen, and all of them that have some weight."""
    logits = noise(size, number, spread)
    expected = warped(logits, **params)
    for name in ("top_p", "min_p"):
        # On an edge the last bit decides, and theirs is not ours.
        for value in (params[name] - 1e-5, params[name] + 1e-5):
            moved = {**params, name: min(max(value, 0.0), 1.0)}
            assume(torch.equal(warped(logits, **moved) > 0, expected > 0))
    chosen = draw(logits, 400, **params)
    assert {*chosen} <= {*expected.nonzero().flatten().tolist()}
    assert {*(expected > 0.05).nonzero().flatten().tolist()} <= {*chosen}


def distance(chosen: Counter[int], expected: torch.Tensor, groups: int) -> tuple[float, float]:
    """The total variation between `chosen` and `expected`, over groups of tokens that are alike
    likely; and what it exceeds once in a million runs of so many draws of `expected` itself.

    The mean is bounded by the deviations of the groups, and what is beyond by McDiarmid.
    """
    times = sum(chosen.values())
    order = expected.argsort(descending=True)
    group = (expected[order].cumsum(0) * groups).long().clamp(max=groups - 1)
    counts = torch.zeros(len(expected), dtype=torch.double)
    for token_id, count in chosen.items():
        counts[token_id] = count / times
    drawn, mass = (
        torch.zeros(groups, dtype=torch.double).index_add(0, group, each[order])
        for each in (counts, expected)
    )
    mean = float((mass * (1 - mass).clamp(min=0) / times).sqrt().sum()) / 2
    return float((drawn - mass).abs().sum()) / 2, mean + math.sqrt(math.log(1e6) / (2 * times))


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 7},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 1.7, "top_p": 0.15},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.2, "top_k": 12, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_frequencies_follow_the_probabilities(params: dict[str, Any]) -> None:
    """Of 20,000 choices each token gets the share that transformers' warpers give it."""
    logits = noise(20)
    expected = warped(logits, **params)
    chosen = draw(logits, 20_000, seed=1, **params)
    assert {*chosen} <= {*expected.nonzero().flatten().tolist()}
    found, bound = distance(chosen, expected, 20)
    assert found < bound < 0.05


@pytest.mark.parametrize("params", [*SETTINGS, {"temperature": 1.0, "top_k": 2_000}], ids=str)
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
def test_frequencies_in_a_large_vocabulary(params: dict[str, Any], spread: float) -> None:
    """The same in 30,000 tokens, whose likely ones stand anywhere: the last block is not whole."""
    logits = noise(30_000, spread=spread)
    expected = warped(logits, **params)
    found, bound = distance(draw(logits, 4_000, seed=2, **params), expected, 25)
    assert found < bound < 0.1


@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(2**-60, 1, width=32)), min_size=1).filter(
        any
    ),
    share=st.floats(2**-53, 1),
)
def test_a_share_falls_on_a_weight(weights: list[float], share: float) -> None:
    """On the first whose cumulated sum reaches it, never on a 0, and with a share of that weight
    from which it can be found again.
    """
    position, part = _find(np.array(weights, np.float32), share)
    assert weights[position] > 0
    assert 0 < part <= 1
    reached = (sum(weights[:position]) + part * weights[position]) / sum(weights)
    assert reached == pytest.approx(share, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.97, 0.9999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0], ids=["flat", "normal", "peaked"])
def test_top_p_in_a_large_vocabulary(top_p: float, spread: float) -> None:
    """More tokens than are looked at first: the head ends where transformers' ends."""
    logits = noise(3_000, spread=spread)
    params = {"temperature": 1.0, "top_p": top_p}
    support = {*warped(logits, **params).nonzero().flatten().tolist()}
    least = warped(logits, **{**params, "top_p": min(1.0, top_p + 1e-5)}) > 0
    chosen = draw(logits, 1_500, **params)
    assert {*chosen} <= support | {*least.nonzero().flatten().tolist()}
    assert len(chosen) > min(len(support), 1_000) * (0.5 if spread < 8 else 0.05)


def test_the_tail_of_a_flat_head_is_reached() -> None:
    """With top_p=0.9 of 5,000 like tokens 4,500 can come, and those alone."""
    logits = torch.linspace(1e-3, 0, 5_000)
    chosen = draw(logits, 2_000, temperature=1.0, top_p=0.9)
    assert max(chosen) < 4_502
    assert sum(token >= 1_024 for token in chosen) > len(chosen) / 2


@pytest.mark.parametrize("size", [1, 2, 10, 1_024, 1_025])
def test_any_size_of_vocabulary(size: int) -> None:
    """top_k and top_p larger than what there is are no error."""
    chosen = draw(noise(size), 50, temperature=1.0, top_k=10**9, top_p=0.999, min_p=1e-9)
    assert {*chosen} <= {*range(size)}


@pytest.mark.parametrize("temperature", [5e-324, 1e-60, 1e-45, 1e-38, 1e-30, 1e-4])
@pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_next_to_no_temperature_is_greedy(temperature: float, rest: dict[str, Any]) -> None:
    """However small, a temperature never divides by zero."""
    logits = noise(50)
    assert {*draw(logits, 50, temperature=temperature, **rest)} == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e5, 1e30, 1e39, 1e300])
def test_great_heat_is_uniform(temperature: float) -> None:
    """However large, a temperature gives every token its chance, and none to what is ruled out."""
    logits = noise(8, spread=10)
    logits[3] = -torch.inf
    chosen = draw(logits, 700, temperature=temperature)
    assert sorted(chosen) == [0, 1, 2, 4, 5, 6, 7]
    assert min(chosen.values()) > 50


@pytest.mark.parametrize("top_p", [5e-324, 1e-45, 1e-10])
def test_a_tiny_top_p_is_greedy(top_p: float) -> None:
    """The most likely token always stays."""
    logits = noise(50)
    assert {*draw(logits, 50, temperature=1.0, top_p=top_p)} == {int(logits.argmax())}


def test_huge_logits_do_not_overflow() -> None:
    """The largest logits that float32 holds, hot and cold."""
    logits = torch.tensor([3e38, -3e38, 3e38, -torch.inf])
    for temperature in (1e-30, 1.0, 1e30):
        assert {*draw(logits, 50, temperature=temperature)} <= {0, 1, 2}
    assert {*draw(logits, 50, temperature=0.1)} == {0, 2}


def test_top_p_among_equals_keeps_as_many_as_reach_it() -> None:
    """Of ten like tokens four reach a share of 0.35, and the first four stay."""
    chosen = draw(torch.zeros(10), 500, temperature=1.0, top_p=0.35)
    assert {*chosen} == {0, 1, 2, 3}
    assert min(chosen.values()) > 80


def test_top_k_keeps_what_equals_the_last() -> None:
    """As in transformers; in bfloat16 there are many such, and none is left out by its place."""
    logits = torch.tensor([1.0, 1.0, 5.0, 1.0, 1.0, 0.0])
    assert {*draw(logits, 500, temperature=5.0, top_k=3)} == {0, 1, 2, 3, 4}
    coarse = noise(5_000).bfloat16().float()
    support = {*warped(coarse, temperature=5.0, top_k=50).nonzero().flatten().tolist()}
    assert len(support) > 50
    assert {*draw(coarse, 2_000, temperature=5.0, top_k=50)} == support


def test_equals_have_equal_chances() -> None:
    """Ties are drawn, not decided by their place."""
    chosen = draw(torch.zeros(10), 3_000, temperature=1.0)
    assert min(chosen.values()) > 200


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_a_seed_decides_everything(seed: int) -> None:
    """The same seed, 0 included, makes the same choices; another makes others."""
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=seed)

    def choices(params: SamplingParams) -> list[int]:
        sampler = Sampler(params)
        return [sampler.choose(noise(100, step).numpy()) for step in range(30)]

    assert choices(params) == choices(params)
    assert choices(params) != choices(params.override(seed=seed ^ 2))


def test_without_a_seed_two_samplers_differ() -> None:
    """Entropy comes from the operating system, whatever the global generators are set to."""
    drawn = []
    for _ in range(2):
        random.seed(0)
        torch.manual_seed(0)
        sampler = Sampler(SamplingParams(temperature=1.0))
        drawn.append([sampler.choose(np.zeros(100, np.float32)) for _ in range(30)])
    assert drawn[0] != drawn[1]


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    """A seeded choice is the same whatever the global state is, and leaves it alone."""
    drawn = []
    for state in (1, 2):
        random.seed(state)
        torch.manual_seed(state)
        before = random.getstate(), torch.get_rng_state()
        drawn.append(draw(noise(2_000), 30, temperature=1.0, top_p=0.9))
        assert random.getstate() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])
    assert drawn[0] == drawn[1]


def test_logits_are_only_read() -> None:
    """`choose` may be shown the model's own tensor."""
    logits = noise(50)
    copy = logits.clone()
    draw(logits, 5, temperature=0.7, top_k=10, top_p=0.9, min_p=0.1)
    assert torch.equal(logits, copy)


ROWS = [
    Request((5, 6, 7, 8, 9), SamplingParams()),
    Request((3,), SamplingParams(temperature=1.0, seed=1)),
    Request((4, 4, 0), SamplingParams(temperature=0.7, top_p=0.9, seed=2, repetition_penalty=1.3)),
    Request((0, 2), SamplingParams(repetition_penalty=0.5)),
    Request((1, 2, 3), SamplingParams(temperature=0.0, repetition_penalty=2.0)),
    Request((3,), SamplingParams(temperature=2.0, top_k=4, min_p=0.2, seed=3)),
]


def batch(requests: list[Request], check_finite: bool = False, **others: Any) -> RowLogits:
    """New choosers for `requests`, whose prompts are padded to the longest."""
    width = max(len(request.prompt_ids) for request in requests)
    padding = [width - len(request.prompt_ids) for request in requests]
    choosers = [Chooser(request, None) for request in requests]
    return RowLogits(choosers, padding, check_finite=check_finite, **others)


def padded(requests: list[Request]) -> torch.Tensor:
    width = max(len(request.prompt_ids) for request in requests)
    rows = [[0] * (width - len(r.prompt_ids)) + [*r.prompt_ids] for r in requests]
    return torch.tensor(rows)


def picks(rows: RowLogits, ids: torch.Tensor, logits: torch.Tensor) -> list[int]:
    """What `generate` takes, row by row, of what it is shown."""
    return rows(ids, logits.clone()).argmax(-1).tolist()


def steps(requests: list[Request], logits: list[torch.Tensor], new: list[torch.Tensor]) -> Any:
    """The choices of each step, with `new` ids after left-padded prompts."""
    ids, rows = padded(requests), batch(requests)
    for scores, chosen in zip(logits, new, strict=True):
        yield picks(rows, ids, scores)
        ids = torch.cat([ids, chosen[:, None]], 1)


def noises(count: int, rows: int = len(ROWS), size: int = 40) -> list[torch.Tensor]:
    return [torch.stack([noise(size, 100 * s + r, 3) for r in range(rows)]) for s in range(count)]


def test_rows_of_a_batch_behave_as_alone() -> None:
    """Different parameters, lengths and seeds: neighbours and padding change no choice of a row."""
    logits = noises(60)
    new = [noise(len(ROWS), s).mul(100).long().abs() % 40 for s in range(60)]
    together = list(steps(ROWS, logits, new))
    for row, request in enumerate(ROWS):
        own = [step[row : row + 1] for step in logits], [step[row : row + 1] for step in new]
        alone = list(steps([request], *own))
        assert [choice for [choice] in alone] == [choices[row] for choices in together]


def test_a_row_goes_on_in_another_batch() -> None:
    """Its chooser keeps the random state: rows may join and leave between calls of `generate`."""
    logits, new = noises(40), [torch.zeros(len(ROWS), dtype=torch.long)] * 40
    whole = list(steps(ROWS, logits, new))
    choosers = [Chooser(request, None) for request in ROWS]
    ids, made = padded(ROWS), []
    width = ids.shape[1]
    for step, scores in enumerate(logits):
        kept = range(len(ROWS)) if step % 2 else range(len(ROWS) - 1, -1, -1)
        padding = [width - len(ROWS[row].prompt_ids) for row in kept]
        rows = RowLogits([choosers[row] for row in kept], padding, check_finite=False)
        chosen = dict(zip(kept, picks(rows, ids[list(kept)], scores[list(kept)]), strict=True))
        made.append([chosen[row] for row in range(len(ROWS))])
        ids = torch.cat([ids, new[step][:, None]], 1)
    assert made == whole


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 5.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    """On the ids of the text alone, and the padding id 0 goes free where the text has none."""
    params = SamplingParams(repetition_penalty=penalty)
    requests = [Request((7, 7, 3), params), Request((4,), params), Request((0,), params)]
    ids = torch.tensor([[7, 7, 3, 9], [0, 0, 4, 9], [0, 0, 0, 9]])
    reference = RepetitionPenaltyLogitsProcessor(penalty)
    moved = 0
    for logits in noises(200, rows=3, size=10):
        expected = [
            int(reference(torch.tensor([text]), logits[row][None]).argmax())
            for row, text in enumerate([[7, 7, 3, 9], [4, 9], [0, 9]])
        ]
        assert picks(batch(requests), ids, logits) == expected
        moved += expected != logits.argmax(-1).tolist()
    assert (moved > 0) is (penalty != 1)


@pytest.mark.parametrize(("penalty", "chosen"), [(math.ulp(0.0), 1), (1e300, 0)])
def test_a_penalty_beyond_float32_is_an_extreme_one(penalty: float, chosen: int) -> None:
    """Without a warning: what was said is certain, or never said again."""
    rows = batch([Request((1, 2), SamplingParams(repetition_penalty=penalty))])
    logits = torch.tensor([[29.0, 1.0, -1.0]])
    assert picks(rows, torch.tensor([[1, 2]]), logits) == [chosen]


def test_generate_is_left_one_token_a_row() -> None:
    """Whatever the logits of the others, NaN too: it takes the largest, and no other is finite."""
    requests = [Request((1,), SamplingParams(temperature=5.0)), Request((1,), SamplingParams())]
    logits = torch.stack([noise(40, row) for row in range(2)])
    shown = batch(requests)(torch.tensor([[1], [1]]), logits.clone())
    assert shown.bool().sum(-1).tolist() == [1, 1]
    assert shown[1].argmax() == logits[1].argmax()


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        (SamplingParams(), False),
        (SamplingParams(temperature=0, repetition_penalty=1.0, top_p=0.5, seed=1), False),
        (SamplingParams(temperature=1e-9), True),
        (SamplingParams(repetition_penalty=0.9), True),
    ],
    ids=str,
)
def test_greedy_rows_need_nothing(params: SamplingParams, needed: bool) -> None:
    """A batch of greedy rows can be left to `generate` alone."""
    requests = [Request((1,), SamplingParams()), Request((1,), params)]
    assert batch(requests).needed is needed
    assert batch(requests, check_finite=True).needed is True


def test_nan_is_an_error_with_the_repair() -> None:
    """One NaN anywhere raises where the check is on; infinities are no NaN."""
    rows = batch([Request((1,), SamplingParams())], check_finite=True)
    ids, logits = torch.tensor([[1]]), noise(10)[None]
    logits[0, 3] = -torch.inf
    assert picks(rows, ids, logits) == [int(logits.argmax())]
    logits[0, 4] = torch.nan
    with pytest.raises(NotFiniteError, match="bfloat16"):
        rows(ids, logits)


def test_a_row_that_fails_leaves_the_others_alone() -> None:
    """Its error is told once, with its index; the others choose as they would have."""
    errors: list[tuple[int, BaseException]] = []
    rows = batch(ROWS, check_finite=True, failed=lambda row, error: errors.append((row, error)))
    well, ids = batch(ROWS), padded(ROWS)
    for step, logits in enumerate(noises(10)):
        expected = picks(well, ids, logits)
        if step >= 3:
            logits[1, 7] = torch.nan
        chosen = picks(rows, ids, logits)
        assert [c for row, c in enumerate(chosen) if row != 1] == expected[:1] + expected[2:]
        assert 0 <= chosen[1] < 40
    [(row, error)] = errors
    assert (row, type(error)) == (1, NotFiniteError)


@pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_nan_that_nobody_looks_for_ends_nothing(rest: dict[str, Any]) -> None:
    """In bfloat16 it is not looked for: some token is chosen, and there is no endless search."""
    assert (
        0
        <= Sampler(SamplingParams(temperature=1.0, **rest)).choose(
            noise(50).numpy() * np.float32(np.nan)
        )
        < 50
    )
