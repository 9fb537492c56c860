"""What conversations begin with is computed once: the tree by itself, and in the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from tiny import Forwards, greedy, reference
from waiting import wait

from gemma2_stream import ChatGemma2, Gemma2Engine, Gemma2LLM, Request, SamplingParams, Usage
from gemma2_stream.kv import KVCache, States
from gemma2_stream.prefixes import PrefixCache, common_length

EACH = 2 * 2 * 3 * 4  # bytes: two layers, keys and values, three numbers in float32


def states(ids: list[int]) -> States:
    """One head of two layers whose numbers say which tokens they are of, and after which."""
    marks, mark = [], 1
    for token in ids:
        mark = (31 * mark + token) % 9973
        marks.append(float(mark))
    keys = torch.tensor(marks)[None, :, None].expand(1, -1, 3)
    return States([(keys, -keys), (keys + 0.5, keys * 2)])


def joined(pieces: list[States]) -> list[torch.Tensor]:
    return [
        torch.cat([piece.pairs[layer][at] for piece in pieces], dim=1)
        for layer in range(2)
        for at in range(2)
    ]


def leaves(cache: PrefixCache) -> int:
    return sum(leaf is not cache._root for leaf in cache._leaves())


# The tree ------------------------------------------------------------------------------------


def test_the_longest_common_beginning_is_found() -> None:
    cache = PrefixCache(10_000)
    cache.keep([1, 2, 3, 4, 5], states([1, 2, 3, 4, 5]))
    cache.keep([1, 2, 3, 9, 9], states([1, 2, 3, 9, 9]))
    for ids, known in {
        (1, 2, 3, 4, 5): 5,
        (1, 2, 3, 4, 5, 6): 5,
        (1, 2, 3, 9, 7): 4,
        (1, 2, 7): 2,
        (1,): 1,
        (2, 1): 0,
        (): 0,
    }.items():
        found, pieces = cache.find(list(ids))
        assert found == known
        if known:
            want = joined([states(list(ids[:known]))])
            assert all(map(torch.equal, joined(pieces), want))


def test_what_is_common_counts_once() -> None:
    cache = PrefixCache(10_000)
    system = list(range(100))
    for n in range(8):
        ids = [*system, 1000 + n, 2000 + n]
        cache.keep(ids, states(ids))
    assert cache.bytes == EACH * (100 + 8 * 2)
    cache.keep(system[:50], states(system[:50]))
    assert cache.bytes == EACH * (100 + 8 * 2)


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    cache = PrefixCache(EACH * 9)
    for first in (1, 2, 3):
        cache.keep([first] * 3, states([first] * 3))
    cache.find([1, 1, 1])
    cache.keep([4] * 3, states([4] * 3))
    assert [cache.find([first] * 3)[0] for first in (1, 2, 3, 4)] == [3, 0, 3, 3]


def test_of_more_than_the_limit_the_beginning_is_kept() -> None:
    cache = PrefixCache(EACH * 9)
    cache.keep(list(range(20)), states(list(range(20))))
    assert cache.find(list(range(20)))[0] == 9
    assert cache.bytes == EACH * 9


def test_a_limit_of_nothing_keeps_nothing() -> None:
    cache = PrefixCache(0)
    cache.keep([1, 2], states([1, 2]))
    assert cache.find([1, 2]) == (0, [])
    assert cache.bytes == 0


def test_what_is_kept_is_a_copy() -> None:
    """Buffers of rows are written over, and a view would hold on to all of one."""
    cache = PrefixCache(10_000)
    theirs = States([(torch.ones(1, 6, 3), torch.ones(1, 6, 3)) for _ in range(2)])
    cache.keep([1, 2, 3, 4, 5, 6], theirs)
    cache.keep([1, 2, 9, 9], theirs.part(0, 4))
    for pair in theirs.pairs:
        for tensor in pair:
            tensor.zero_()
    _, pieces = cache.find([1, 2, 3, 4, 5, 6])
    assert all(bool((tensor == 1).all()) for tensor in joined(pieces))
    for piece in pieces:
        for tensor in (tensor for pair in piece.pairs for tensor in pair):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=12)), max_size=40),
    st.integers(0, 30),
)
def test_the_tree_never_lies_and_never_outgrows_its_limit(
    actions: list[tuple[bool, list[int]]], limit: int
) -> None:
    """Whatever is kept and asked for in whatever order."""
    cache = PrefixCache(limit * EACH)
    kept: list[list[int]] = []
    for keep, ids in actions:
        if keep and ids:
            cache.keep(ids, states(ids))
            kept.append(ids)
            assert cache.find(ids)[0] >= min(len(ids), limit)
        known, pieces = cache.find(ids)
        assert known <= max((common_length(ids, other) for other in kept), default=0)
        if known:
            assert all(map(torch.equal, joined(pieces), joined([states(ids[:known])])))
        nodes = [cache._root]
        total = 0
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            total += len(node.ids) * EACH
        assert cache.bytes == total <= limit * EACH


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length_is_what_it_says(one: list[int], other: list[int]) -> None:
    length = common_length(one, other)
    assert one[:length] == other[:length]
    assert length in (len(one), len(other)) or one[length] != other[length]


# Memory that is lent -------------------------------------------------------------------------


class Playing:
    """A row as the scheduler has it: what the tree knows, and what it writes behind that."""

    def __init__(self, tree: PrefixCache, ids: list[int]) -> None:
        self.tree = tree
        self.ids: list[int] = []
        known, pieces = tree.find(ids)
        self.lent = len(pieces) == 1 and pieces[0].lent
        self.cache = KVCache()
        self.cache.load([pieces], known)
        self.say(ids[known:], ids[:known])

    def say(self, ids: list[int], before: list[int] | None = None) -> None:
        self.ids += [*(before or ()), *ids]
        for layer, (keys, values) in enumerate(states(self.ids).pairs):
            new = (keys[None, :, len(self.ids) - len(ids) :], values[None, :, -len(ids) :])
            if ids:
                self.cache.update(*new, layer)

    @property
    def states(self) -> States:
        return self.cache.row(0, len(self.ids))

    def keep(self) -> None:
        self.tree.keep(self.ids, self.states)

    def leave(self) -> None:
        self.cache.layers.clear()

    def check(self) -> None:
        assert all(map(torch.equal, joined([self.states]), joined([states(self.ids)])))


def said(tree: PrefixCache, ids: list[int]) -> None:
    """A row that has come and gone."""
    row = Playing(tree, ids)
    row.keep()
    row.leave()


TEMPLATE = [1, 2, 3, 4]
LONG = [*TEMPLATE, *range(100, 300)]


def places(found: States) -> list[int]:
    return [tensor.data_ptr() for pair in found.pairs for tensor in pair]


def say_others(tree: PrefixCache) -> None:
    for first in (1000, 2000, 3000):
        said(tree, [*TEMPLATE, *range(first, first + 150)])


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_conversation_goes_on_in_the_memory_that_it_had(before: bool, after: bool) -> None:
    """Also when others begin with the same template; and what is new is kept without a copy."""
    tree = PrefixCache(10**6)
    if before:
        say_others(tree)
    said(tree, LONG)
    at, ids = places(tree.find(LONG)[1][0]), list(LONG)
    if after:
        say_others(tree)
    for turn in range(3):
        ids += range(400 + 10 * turn, 410 + 10 * turn)
        row = Playing(tree, ids)
        row.check()
        assert row.lent
        assert places(row.states) == at
        kept = tree.bytes
        row.keep()
        row.leave()
        assert tree.bytes == kept
        assert places(tree.find(ids)[1][0]) == at


def test_memory_is_lent_to_one_at_a_time() -> None:
    tree = PrefixCache(10**6)
    said(tree, LONG)
    one = Playing(tree, [*LONG, 7])
    other = Playing(tree, [*LONG, 8])
    assert (one.lent, other.lent) == (True, False)
    for row in (one, other):
        row.check()
    one.leave()
    assert Playing(tree, [*LONG, 9]).lent


def test_a_row_that_needs_more_room_gives_back_what_it_was_lent() -> None:
    tree = PrefixCache(10**6)
    said(tree, LONG)
    row = Playing(tree, [*LONG, *range(1000, 1300)])
    row.check()
    assert tree.find(LONG)[1][0].lent
    row.keep()
    row.leave()
    assert tree.find(row.ids)[1][0].lent
    assert tree.bytes == row.tree.find(row.ids)[1][0].held


def test_an_answer_that_is_quoted_trimmed_goes_on_in_its_memory() -> None:
    """A template strips what it quotes, and tokens at its end are others then."""
    tree = PrefixCache(10**6)
    say_others(tree)
    said(tree, LONG)
    row = Playing(tree, [*LONG[:-2], 7, 8])
    assert row.lent
    row.check()
    row.keep()
    row.leave()
    other = Playing(tree, [*LONG[:100], 7, 8])  # no more than the end is ever forgotten
    assert not other.lent
    assert tree.find(row.ids)[0] == len(row.ids)
    assert tree.find(LONG)[0] == len(LONG) - 2


def test_what_conversations_have_in_common_is_not_kept_for_each() -> None:
    """A long system prompt, and what many went on from."""
    tree = PrefixCache(10**6)
    for first in (1000, 2000, 3000):
        said(tree, [*LONG, *range(first, first + 150)])
    assert tree.bytes == EACH * (len(LONG) + 3 * 150)
    ids = [*LONG, *range(2000, 2200)]
    row = Playing(tree, ids)
    assert not row.lent
    row.check()
    row.keep()
    row.leave()
    assert tree.bytes == EACH * (len(LONG) + 2 * 150 + 200)
    for first in (1000, 2000, 3000):
        known, pieces = tree.find([*LONG, *range(first, first + 150)])
        assert known == len(LONG) + 150
        assert all(
            map(torch.equal, joined(pieces), joined([states([*LONG, *range(first, first + 150)])]))
        )


def test_ways_to_go_on_stay_apart() -> None:
    """From one place or several; in rows of their own, and beside others."""
    tree = PrefixCache(10**6)
    say_others(tree)
    said(tree, LONG)
    tree.keep([*LONG, 5, 6], states([*LONG, 5, 6]))
    assert not Playing(tree, [*LONG[:-2], 7]).lent
    ways = [[*LONG, 5, 6], *([*LONG, first, 5] for first in (1000, 2000, 3000, 4000))]
    ways += [[*LONG[:length], 7] for length in (5, 100, len(LONG) - 1)]
    rows = [Playing(tree, ids) for ids in ways]
    for row in rows:
        row.keep()
        row.leave()
    for ids in ways:
        known, pieces = tree.find(ids)
        assert known == len(ids)
        assert all(map(torch.equal, joined(pieces), joined([states(ids)])))


def test_rows_of_a_batch_lend_nothing() -> None:
    """Their memory is one."""
    cache = KVCache()
    cache.load([[states(LONG)], [states(LONG[:50])]], len(LONG))
    assert [cache.row(n, length).rooms for n, length in enumerate((len(LONG), 50))] == [(), ()]
    cache.load([[states(LONG * 2)]], 2 * len(LONG))
    assert cache.row(0, 2 * len(LONG)).rooms[0].tokens == 2 * len(LONG) * 5 // 4
    assert not cache.row(0, 50).rooms


def test_memory_with_much_more_room_than_tokens_is_not_kept() -> None:
    tree = PrefixCache(10**6)
    said(tree, LONG[:30])
    assert tree.bytes == EACH * 30
    assert not tree.find(LONG[:30])[1][0].rooms


words = st.lists(st.sampled_from([3, 5, 70, 130, 200]), min_size=1, max_size=4)
actions = st.tuples(st.sampled_from(["begin", "say", "keep", "leave"]), st.integers(0, 9), words)


@settings(max_examples=400)
@given(st.lists(actions, max_size=25), st.integers(0, 2000))
def test_whoever_writes_where_nobody_reads_anything_else(
    actions: list[tuple[str, int, list[int]]], limit: int
) -> None:
    """Rows that come, grow, are kept and leave in any order, all on one tree."""
    tree = PrefixCache(limit * EACH)
    rows: list[Playing] = []
    kept: list[list[int]] = []
    for action, number, lengths in actions:
        ids = [length + n for length in lengths for n in range(length)]
        if action == "begin" or not rows:
            rows.append(Playing(tree, ids))
        else:
            row = rows[number % len(rows)]
            if action == "say":
                row.say(ids)
            else:
                row.keep()
                kept.append(list(row.ids))
            if action == "leave":
                row.leave()
                rows.remove(row)
        for row in rows:
            row.check()
        for ids in kept:
            known, pieces = tree.find(ids)
            if known:
                assert all(map(torch.equal, joined(pieces), joined([states(ids[:known])])))
        nodes, memory = [tree._root], {}
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            for part in node.states.rooms or [node.states]:
                memory[id(part)] = part.nbytes
        assert tree.bytes == sum(memory.values()) <= limit * EACH


# In the engine -------------------------------------------------------------------------------


@pytest.fixture
def fresh(random_engine: Gemma2Engine) -> Iterator[Gemma2Engine]:
    """The random weights with prefixes as they are by default."""
    with Gemma2Engine(random_engine.model, random_engine.tokenizer, name="fresh") as engine:
        yield engine


def ask(engine: Gemma2Engine, ids: list[int], **params: Any) -> tuple[str, Usage]:
    request = Request(tuple(ids), SamplingParams(**params))
    chunks = list(engine.submit([request]))
    engine.join()
    usage = chunks[-1].usage
    assert usage is not None
    return "".join(chunk.text for chunk in chunks), usage


def test_the_next_turn_pays_only_for_what_is_new(
    fresh: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """By the tokens that the model is fed, and by what usage says."""
    chat = ChatGemma2(engine=fresh, max_new_tokens=20)
    history: list[Any] = [SystemMessage("word " * 90), HumanMessage("Who are you?")]
    watch = forwards(fresh)
    history.append(chat.invoke(history))
    fed, first = sum(watch.tokens), history[-1].usage_metadata
    history.append(HumanMessage("And who am I?"))
    answer = chat.invoke(history)
    assert isinstance(answer, AIMessage)
    usage = answer.usage_metadata
    assert usage is not None
    cached = usage["input_token_details"]["cache_read"]
    # All of the prompt; of the answer what its text is tokenized to again.
    assert cached >= first["input_tokens"]
    assert sum(watch.tokens) - fed == usage["input_tokens"] - cached + usage["output_tokens"] - 1


def test_turns_of_a_conversation_share_one_memory(fresh: Gemma2Engine) -> None:
    """Nothing of the history is copied, as long as there is room."""
    ids = [2, *(5 + n * 7919 % 2000 for n in range(400))]
    seen = set()
    for turn in range(4):
        text, usage = ask(fresh, ids, max_new_tokens=5)
        assert usage.cached_tokens >= (len(ids) - 6 if turn else 0)
        seen.add(tuple(places(fresh.prefixes.find(ids)[1][0])))
        assert text == fresh.tokenizer.decode(greedy(fresh, ids, 5), skip_special_tokens=True)
        ids = [*ids, *greedy(fresh, ids, 4), 5 + turn]
    assert len(seen) == 1


@pytest.mark.parametrize("length", [1, 30, 63, 64, 65, 127, 300, 700])
def test_a_known_beginning_changes_no_token(fresh: Gemma2Engine, length: int) -> None:
    """Below, across and far beyond the sliding window (64), at every kind of cut."""
    ids = [2, *(5 + n * 7919 % 2000 for n in range(length))]
    whole = greedy(fresh, ids, 12)
    text = fresh.tokenizer.decode(whole, skip_special_tokens=True)
    assert ask(fresh, ids, max_new_tokens=12)[0] == text
    for cut in sorted({1, length // 2, length - 1, length} - {0}):
        other = [*ids[:cut], 4000, 4001]
        expected = greedy(fresh, other, 8)
        answer, usage = ask(fresh, other, max_new_tokens=8)
        assert answer == fresh.tokenizer.decode(expected, skip_special_tokens=True)
        assert usage.cached_tokens == cut
    answer, usage = ask(fresh, ids, max_new_tokens=12)
    assert answer == text
    assert usage.cached_tokens == len(ids) - 1  # one must be fed


def test_eight_conversations_at_once_compute_their_system_prompt_once(
    fresh: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """Though all eight come before the first of them is known."""
    system = "word " * 200
    prompts = [f"{system} {n}" for n in range(8)]
    expected = [reference(fresh, prompt, 5) for prompt in prompts]
    watch = forwards(fresh)
    llm = Gemma2LLM(engine=fresh, max_new_tokens=5)
    assert llm.batch(prompts) == expected
    lengths = [len(fresh.encode(prompt)) for prompt in prompts]
    fed = sum(rows * tokens for rows, tokens in zip(watch.rows, watch.tokens, strict=True))
    assert fed < lengths[0] + 8 * 30
    assert watch.count < 5 + 5


def test_a_row_that_failed_leaves_nothing_behind(
    fresh: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    watch = forwards(fresh)
    watch.fail_at[3] = OSError("gone")
    ids = fresh.encode("tell me " * 20)
    with pytest.raises(OSError, match="gone"):
        ask(fresh, ids, max_new_tokens=10)
    fresh.join()
    assert fresh.prefixes.bytes == 0
    assert ask(fresh, ids, max_new_tokens=10)[1].cached_tokens == 0


def test_what_was_cancelled_is_right_all_the_same(
    fresh: Gemma2Engine, forwards: Callable[[Gemma2Engine], Forwards]
) -> None:
    """What it left behind is found, and leads to the same tokens."""
    ids = fresh.encode("tell me " * 20)
    expected = reference(fresh, "tell me " * 20, 12)
    watch = forwards(fresh)
    reached, release = watch.gate(6)
    stream = fresh.submit([Request(tuple(ids), SamplingParams(max_new_tokens=30))])
    wait(reached)
    stream.cancel()
    release.set()
    fresh.join()
    answer, usage = ask(fresh, ids, max_new_tokens=12)
    assert answer == expected
    assert usage.cached_tokens == len(ids) - 1
    longer = [*ids, *greedy(fresh, ids, 12)]
    answer, usage = ask(fresh, longer, max_new_tokens=4)
    assert usage.cached_tokens > len(ids)
    assert answer == fresh.tokenizer.decode(greedy(fresh, longer, 4), skip_special_tokens=True)


def test_no_memory_to_keep_a_prefix_hurts_nobody(
    fresh: Gemma2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the row that has ended, nor those beside it, nor those that wait."""
    prompts = ["a", "b", "c"]
    expected = [reference(fresh, prompt, 3 + n) for n, prompt in enumerate(prompts)]
    real = torch.Tensor.clone

    def clone(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.dim() == 3 and tensor.shape[2] == 32:  # a row's keys or values
            raise OSError("no memory")
        return real(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    requests = [
        Request(tuple(fresh.encode(prompt)), SamplingParams(max_new_tokens=3 + n))
        for n, prompt in enumerate(prompts)
    ]
    streams = fresh.submit_each(requests)
    assert ["".join(chunk.text for chunk in stream) for stream in streams] == expected
    fresh.join()
    assert fresh.prefixes.bytes == 0


def test_closing_frees_what_was_kept(random_engine: Gemma2Engine) -> None:
    engine = Gemma2Engine(random_engine.model, random_engine.tokenizer)
    ask(engine, engine.encode("x"), max_new_tokens=2)
    assert engine.prefixes.bytes > 0
    engine.close()
    assert engine.prefixes.bytes == 0


turns = st.lists(st.text("ab \n", max_size=8), min_size=1, max_size=3)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(turns, min_size=1, max_size=3),
    st.sampled_from(["be brief", "be brief, and " * 40]),
    st.integers(0, 400_000),
)
def test_any_conversations_say_the_same_with_and_without(
    demo_engine: Gemma2Engine, conversations: list[list[str]], system: str, size: int
) -> None:
    """Interleaved, in batches, with little room and with much."""
    model, tokenizer = demo_engine.model, demo_engine.tokenizer
    answers: list[list[list[str]]] = []
    for limit in (0, size):
        options = {"name": "any", "prefix_cache_bytes": limit}
        with Gemma2Engine(model, tokenizer, **options) as engine:
            chat = ChatGemma2(engine=engine, max_new_tokens=6)
            histories: list[list[Any]] = [[SystemMessage(system)] for _ in conversations]
            said: list[list[str]] = []
            for number in range(3):
                active = [n for n, asked in enumerate(conversations) if number < len(asked)]
                for n in active:
                    histories[n].append(HumanMessage("q" + conversations[n][number]))
                replies = chat.batch([histories[n] for n in active])
                for n, reply in zip(active, replies, strict=True):
                    histories[n].append(AIMessage(reply.text or "-"))
                said.append([reply.text for reply in replies])
            assert engine.prefixes.bytes <= limit
            answers.append(said)
    assert answers[0] == answers[1]
