"""Detokenizers against `decode` of all ids at once: the same text, as early as it is certain."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import DEMO
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gemma2_stream.detokenizer import PieceDetokenizer, WholeDetokenizer, detokenizer_for

TEXTS = [
    "The quick brown fox,   jumps over\n\n\nthe lazy dog's tail…",
    "你好,世界!我是一个语言模型。龘靐齉爩",
    "東京でラーメンを食べました。𠮷野家",
    "안녕하세요, 반갑습니다. 뷁",
    "สวัสดีครับ กำลังทำอะไรอยู่ น้ำใจ",
    "مرحبا بالعالم، كيف حالك؟ لُغَةٌ",
    "שָׁלוֹם नमस्ते क्षत्रिय বাংলা தமிழ் ქართული ⵣ 𓀀𓂀",
    "😀😃 👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇨🇳🇯🇵🇹🇭 ❤️‍🔥 1️⃣ 🫨🪿",
    "e\u0301a\u0308o\u0302\u0301 Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́Ǫ̵̹̻̝̳͂̌̌͘!",
    '{"name": "Zoë", "tags": ["a", null, 1.5e-7], "say": "\\u4f60\\n"}',
    "def f(x):\n\tif x:\n\t\treturn {**x, 'é': \"\\x00\"}\n\n\n# ▁ <0xE4> <unused7>\n",
    "<table><tr><td>x</td></tr></table>\x00\x01\x7f\u200b\u2028\ufeff\u00a0\u3000 ▁▁",
    "\ufffd in the middle \ufffd and at the end \ufffd",
]
TEXTS += [text[:cut] for text in TEXTS for cut in (1, 7)]


@pytest.fixture(scope="module", params=["gemma", "demo"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Both tokenizers that decode as Gemma's does."""
    if request.param == "gemma":
        tokenizer: PreTrainedTokenizerFast = request.getfixturevalue("gemma_tokenizer")
        return tokenizer
    if not (DEMO / "tokenizer.json").is_file():
        pytest.skip("this checkout has no demo checkpoint yet")
    return AutoTokenizer.from_pretrained(DEMO, local_files_only=True)


def feed(tokenizer: Any, ids: list[int], make: Any = None) -> list[str]:
    """What each id gives, and at the end what flush gives."""
    detokenizer = (make or detokenizer_for(tokenizer))()
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


def whole(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def byte_ids(tokenizer: Any, data: bytes) -> list[int]:
    find = tokenizer.backend_tokenizer.token_to_id
    found = [(find(f"<0x{byte:02X}>"), find(chr(byte))) for byte in data]
    # Gemma has no <0x09>: a tab is a token of its own.
    return [spelled if byte is None else byte for byte, spelled in found]


def random_ids(tokenizer: Any, number: int) -> Iterator[list[int]]:
    """Sequences of all kinds of ids, mixed at random: where decoders go wrong."""
    draw = random.Random(number)
    special = list(tokenizer.all_special_ids)
    size = len(tokenizer)
    kinds = [
        lambda: [draw.randrange(size)],
        lambda: byte_ids(tokenizer, draw.choice("é你𠮷😀ก\x00a").encode()),
        lambda: byte_ids(tokenizer, draw.choice("你😀").encode()[: draw.randrange(1, 3)]),
        lambda: byte_ids(tokenizer, draw.randbytes(draw.randrange(1, 4))),
        lambda: [draw.choice(special)],
        lambda: [size + draw.randrange(100)],
    ]
    for _ in range(2_000):
        weights = [draw.random() for _ in kinds]
        chosen = draw.choices(kinds, weights, k=draw.randrange(12))
        yield [token_id for kind in chosen for token_id in kind()]


def test_random_ids_give_exactly_what_decode_gives(tokenizer: Any) -> None:
    """Any ids: valid, broken and unfinished bytes, special ids among them, ids nobody knows."""
    make = detokenizer_for(tokenizer)
    for ids in random_ids(tokenizer, 0):
        assert "".join(feed(tokenizer, ids, make)) == whole(tokenizer, ids), ids


def test_every_id_alone_and_between_bytes(tokenizer: Any) -> None:
    """All of the vocabulary, after an unfinished character and before the rest of it."""
    make = detokenizer_for(tokenizer)
    first, *rest = byte_ids(tokenizer, "你".encode())
    sequences = [[first, token_id, *rest] for token_id in range(len(tokenizer) + 2)]
    expected = tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=True)
    for ids, text in zip(sequences, expected, strict=True):
        assert "".join(feed(tokenizer, ids, make)) == text, ids


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(tokenizer: Any, text: str) -> None:
    """Languages, emoji, combining marks, JSON and code: encoded, fed, and the same again."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    given = feed(tokenizer, ids)
    assert "".join(given) == whole(tokenizer, ids) == text.replace("▁", " ")


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_back(tokenizer: Any, text: str) -> None:
    """The same texts spelled in bytes alone, as a model may choose to."""
    ids = byte_ids(tokenizer, text.encode())
    assert "".join(feed(tokenizer, ids)) == whole(tokenizer, ids) == text


def test_never_half_a_character(tokenizer: Any) -> None:
    """What was fed so far is at every moment a prefix of what decode says at the end."""
    make = detokenizer_for(tokenizer)
    for ids in random_ids(tokenizer, 1):
        text, sofar = whole(tokenizer, ids), ""
        for piece in feed(tokenizer, ids, make):
            sofar += piece
            assert text.startswith(sofar), ids


def test_a_token_that_is_no_byte_arrives_with_itself(tokenizer: Any) -> None:
    """Nothing waits for the next word: after such a token all text so far has been given."""
    make = detokenizer_for(tokenizer)
    data = re.compile(r"<0x[0-9A-F]{2}>")
    waiting = {i for token, i in tokenizer.get_vocab().items() if data.fullmatch(token)}
    waiting |= {*tokenizer.all_special_ids}
    for ids in random_ids(tokenizer, 2):
        given = feed(tokenizer, ids, make)
        for end, token_id in enumerate(ids, 1):
            if token_id not in waiting and token_id < len(tokenizer):
                assert "".join(given[:end]) == whole(tokenizer, ids[:end]), ids


def test_flush_ends_a_run_of_bytes_once(tokenizer: Any) -> None:
    """An unfinished character becomes one U+FFFD a byte, and a second flush is empty."""
    detokenizer = detokenizer_for(tokenizer)()
    assert [detokenizer.feed(i) for i in byte_ids(tokenizer, b"\xf0\x9f")] == ["", ""]
    assert [detokenizer.flush(), detokenizer.flush()] == ["\ufffd\ufffd", ""]


def test_answers_do_not_mix(tokenizer: Any) -> None:
    """Two detokenizers of one tokenizer share what ids mean, and no state."""
    make = detokenizer_for(tokenizer)
    one, other = make(), make()
    first, *rest = byte_ids(tokenizer, "你".encode())
    assert one.feed(first) == other.feed(byte_ids(tokenizer, b"a")[0]) == ""
    assert [one.feed(i) for i in rest] == ["", ""]
    assert [one.flush(), other.flush()] == ["你", "a"]


def gemma_like(*vocabulary: str) -> PreTrainedTokenizerFast:
    """A tokenizer with Gemma's decoder and these tokens, the first of which is special."""
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, []))
    backend.add_special_tokens([vocabulary[0]])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "odd", ["<0xZZ>", "<0x 1>", "<0xe4>", "<0xE>>", "<0x 4>", "<0x4>", "é0x4>"]
)
def test_tokens_that_only_look_like_bytes(odd: str) -> None:
    """Only two hexadecimal digits make a byte, whatever a vocabulary contains."""
    tokenizer = gemma_like("<eos>", "<0xC3>", "<0xA9>", odd, "▁b")
    for ids in ([3], [1, 3], [1, 3, 2], [1, 2, 3, 4], [3, 3], [1, 0, 2, 3]):
        assert "".join(feed(tokenizer, ids)) == whole(tokenizer, ids), ids


def test_a_token_without_text_ends_a_run_of_bytes() -> None:
    """An empty token that is not special is a token to `decode`, so bytes do not join over it."""
    tokenizer = gemma_like("<eos>", "<0xC3>", "<0xA9>", "")
    assert "".join(feed(tokenizer, [1, 3, 2])) == whole(tokenizer, [1, 3, 2])


CORPUS = [*TEXTS, "low lower lowest newer newest wide wider widest", "don't, I'm 'fine' . ok ?"]


def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def metaspace() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[CLS]"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]")


def llama_like() -> PreTrainedTokenizerFast:
    """Byte fallback, and a space in front that is stripped: Llama's and Mistral's decoder."""
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁he", "llo", "▁▁", "你", "é", "\ufffd", ".", "▁."]
    tokens = ["<unk>", "<s>", *data, *words]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>"])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def bare() -> PreTrainedTokenizerFast:
    """No decoder at all: tokens joined by spaces."""
    tokens = {"<s>": 0, "a": 1, "b": 2, "你": 3}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<s>"))
    backend.add_special_tokens(["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


others = pytest.mark.parametrize(
    "make",
    [byte_level, metaspace, word_piece, llama_like, bare],
    ids=lambda f: f.__name__,
)


@others
def test_other_tokenizers_are_exact_on_random_ids(make: Any) -> None:
    """WholeDetokenizer says what decode says, for ids in any order."""
    tokenizer, draw = make(), random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(len(tokenizer)), k=draw.randrange(12))
        assert "".join(feed(tokenizer, ids)) == whole(tokenizer, ids), ids


@others
def test_other_tokenizers_are_exact_on_texts(make: Any) -> None:
    """The same for what they make of real texts."""
    tokenizer = make()
    for text in CORPUS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(feed(tokenizer, ids)) == whole(tokenizer, ids), text


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_never_gives_half_a_character(text: str) -> None:
    """A character of several tokens comes with its last one."""
    tokenizer = byte_level()
    ids, sofar = tokenizer.encode(text, add_special_tokens=False), ""
    for piece in feed(tokenizer, ids):
        sofar += piece
        assert text.startswith(sofar)


def test_a_lost_character_does_not_swallow_the_answer() -> None:
    """Whatever bytes a model invents, the words after them arrive."""
    tokenizer = llama_like()
    ids = byte_ids(tokenizer, "你".encode() + b"\xff") + tokenizer.convert_tokens_to_ids(
        ["▁he", "llo"]
    )
    assert "".join(feed(tokenizer, ids)).endswith(" hello")


def test_nothing_is_lost_to_cleaning_up() -> None:
    """A tokenizer that joins words once the next is there is asked not to: the rest still comes."""
    tokenizer = word_piece()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer.encode("he said ' hello ' , and i 'm fine", add_special_tokens=False)
    assert "".join(feed(tokenizer, ids)) == tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_gemma_gets_the_quick_one(tokenizer: Any) -> None:
    """Tokenizers with Gemma's decoder decode by pieces."""
    assert isinstance(detokenizer_for(tokenizer)(), PieceDetokenizer)


@others
def test_others_get_the_slow_one(make: Any) -> None:
    """Every other decoder, and none, is decoded whole."""
    assert isinstance(detokenizer_for(make())(), WholeDetokenizer)
