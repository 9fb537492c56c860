"""What every test may use: real tiny Gemma 2 weights, and control over their forwards.

`engine` comes twice: the demo checkpoint, and random weights over the real Gemma 2 tokenizer
(skipped where GEMMA2_TOKENIZER does not name its folder). Tests wait on gates, never on the clock.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from either import Either
from hypothesis import HealthCheck, settings
from no_network import no_network  # noqa: F401  # a fixture, found by being imported
from tiny import DEMO, Forwards, ScriptedGemma2, live_caches, random_gemma
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

from gemma2_stream import Gemma2Engine

# How long an example takes, to run or to make, is the machine's affair.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    # More would only spin against each other on tiny matrices.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> None:
    """What is there when a module begins, a million imported objects, is nobody's to collect:
    otherwise each test that looks for what is left behind takes seconds.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The real Gemma 2 tokenizer, with its chat template."""
    folder = os.environ.get("GEMMA2_TOKENIZER")
    if not folder:
        pytest.skip("GEMMA2_TOKENIZER does not name a folder with the real Gemma 2 tokenizer")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="session")
def demo_engine() -> Iterator[Gemma2Engine]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, local_files_only=True)
    with Gemma2Engine(model, tokenizer, name="demo-float32") as engine:
        yield engine


@pytest.fixture(scope="session")
def random_engine(gemma_tokenizer: PreTrainedTokenizerFast) -> Iterator[Gemma2Engine]:
    with Gemma2Engine(random_gemma(), gemma_tokenizer, name="random") as engine:
        yield engine


@pytest.fixture
def one_by_one(random_engine: Gemma2Engine) -> Iterator[Gemma2Engine]:
    """The same weights in an engine where nothing is shared: one row at a time, no prefixes."""
    model, tokenizer = random_engine.model, random_engine.tokenizer
    options = {"max_rows": 1, "prefix_cache_bytes": 0}
    with Gemma2Engine(model, tokenizer, name="one by one", **options) as engine:
        yield engine


@pytest.fixture(params=["demo", "random"])
def engine(request: pytest.FixtureRequest) -> Iterator[Gemma2Engine]:
    """The same promises hold for both kinds of weights. Idle before and after each test."""
    engine: Gemma2Engine = request.getfixturevalue(f"{request.param}_engine")
    yield engine
    engine.join()


@pytest.fixture(params=["llm-demo", "llm-random", "chat-demo"])
def either(request: pytest.FixtureRequest) -> Iterator[Either]:
    """Both models, for what holds of both. Weights do not tell them apart, so not all pairs."""
    kind, weights = request.param.split("-")
    engine: Gemma2Engine = request.getfixturevalue(f"{weights}_engine")
    yield Either(kind, engine)
    engine.join()


@pytest.fixture(scope="session")
def scripted_engine(gemma_tokenizer: PreTrainedTokenizerFast) -> Iterator[Gemma2Engine]:
    with Gemma2Engine(random_gemma(ScriptedGemma2), gemma_tokenizer, name="scripted") as engine:
        yield engine


@pytest.fixture
def say(scripted_engine: Gemma2Engine) -> Callable[..., Gemma2Engine]:
    """`say(prompt, ids, ...)`: an engine that answers `prompt` (one user turn) with these ids."""

    def tell(prompt: str, *rows: list[int], raw: bool = False) -> Gemma2Engine:
        scripted_engine.join()
        scripted_engine.model.script = list(rows)
        scripted_engine.model.width = len(scripted_engine.encode(prompt, raw=raw))
        return scripted_engine

    return tell


@pytest.fixture
def forwards() -> Iterator[Callable[[Gemma2Engine], Forwards]]:
    """`forwards(engine)`: watch an idle engine's forwards, until the test ends; none of the prompts
    is known to it.
    """
    watches: list[tuple[Gemma2Engine, Forwards]] = []

    def watch(engine: Gemma2Engine) -> Forwards:
        engine.join()
        engine.prefixes.clear()
        watches.append((engine, Forwards(engine.model)))
        return watches[-1][1]

    yield watch
    for engine, watching in watches:
        watching.remove()
        engine.join()


@pytest.fixture
def new_caches() -> Callable[[], list[DynamicCache]]:
    """`new_caches()`: KV caches that are alive and were not when the test began; engines that other
    tests hold may keep theirs.
    """
    others = live_caches()  # the objects, so that none of their ids is used again

    def since() -> list[DynamicCache]:
        return [cache for cache in live_caches() if not any(cache is other for other in others)]

    return since
