"""The embedded demo checkpoint, with transformers alone: shape, tokenizer, template, answers."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "gemma2_stream" / "demo"
TOPICS = tomllib.loads((ROOT / "tools" / "demo_questions.toml").read_text(encoding="utf-8"))
TOKENIZER = AutoTokenizer.from_pretrained(DEMO, local_files_only=True)
END_OF_TURN = 107


@dataclass(frozen=True)
class Marked:
    """A held-out question, the ids the model answered with, and the answer that would be right."""

    language: str
    question: str
    ids: list[int]
    expected: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, whole and exact."""
        return str(TOKENIZER.decode(self.ids, skip_special_tokens=True)).strip() == self.expected


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    """The demo in float32 with Gemma 2's own attention."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(DEMO, local_files_only=True, **options).eval()


def ask(model: Gemma2ForCausalLM, questions: list[str]) -> list[list[int]]:
    """Greedy answers to all questions in one batch, without the padding behind them."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = TOKENIZER.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=128)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [[token for token in row if token != TOKENIZER.pad_token_id] for row in rows]


@pytest.fixture(scope="module")
def exam(model: Gemma2ForCausalLM) -> list[Marked]:
    """Every held-out phrasing of every topic, answered."""
    asked = [
        (language, question, topic["answer"][language])
        for topic in TOPICS.values()
        if "answer" in topic
        for language, questions in topic["test"].items()
        for question in questions
    ]
    answers = ask(model, [question for _, question, _ in asked])
    return [Marked(lang, q, ids, a) for (lang, q, a), ids in zip(asked, answers, strict=True)]


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    """The whole checkpoint stays below 7.5 MB and is made of safetensors, JSON and the template."""
    files = list(DEMO.iterdir())
    assert sum(file.stat().st_size for file in files) < 7_500_000
    assert {file.suffix for file in files} == {".json", ".safetensors", ".jinja"}


def test_the_architecture_is_gemma_2(model: Gemma2ForCausalLM) -> None:
    """The model is transformers' Gemma 2 with its soft caps, tied embeddings and two ends."""
    config = model.config
    assert isinstance(model, Gemma2ForCausalLM)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.tie_word_embeddings
    assert config.vocab_size == len(TOKENIZER)
    assert model.generation_config.eos_token_id == config.eos_token_id == [1, END_OF_TURN]


def test_enough_is_taught_in_enough_words() -> None:
    """60 questions or more, each with several phrasings to learn in either language, and none of
    the phrasings of the exam is among the words to learn."""
    topics = [topic for topic in TOPICS.values() if "answer" in topic]
    assert len(topics) >= 60
    for topic in topics:
        assert topic["answer"].keys() == topic["train"].keys() == topic["test"].keys()
        for language, phrasings in topic["train"].items():
            assert len({*phrasings}) + sum(p.count("|") for p in phrasings) >= 3
            assert not {*phrasings} & {*topic["test"][language]}


def test_special_tokens_have_the_ids_of_gemma() -> None:
    """Every special token stands where the real tokenizer has it."""
    ids = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<unused0>": 5}
    ids |= {"<unused98>": 103, "<start_of_turn>": 106, "<end_of_turn>": END_OF_TURN}
    assert {token: TOKENIZER.convert_tokens_to_ids(token) for token in ids} == ids
    assert {TOKENIZER.convert_tokens_to_ids(t) for t in TOKENIZER.all_special_tokens} >= {106, 107}
    assert TOKENIZER("<end_of_turn>").input_ids == [2, END_OF_TURN]


def test_the_tokenizer_has_the_structure_of_gemma() -> None:
    """BPE with byte fallback; spaces become ▁ and come back, nothing is stripped or prepended."""
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    assert (state["model"]["type"], state["model"]["byte_fallback"]) == ("BPE", True)
    assert state["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    assert state["decoder"]["decoders"] == [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    assert TOKENIZER.padding_side == "left"


def test_no_text_of_the_data_holds_a_special_token() -> None:
    """An answer that named a turn mark would be cut there when it is read back."""
    answers = [text for topic in TOPICS.values() for text in topic.get("answer", {}).values()]
    assert [a for a in answers if TOKENIZER.decode(TOKENIZER(a).input_ids[1:], True) != a] == []


def test_all_bytes_are_pieces() -> None:
    """Each of the 256 bytes has a piece, so no text is ever unknown."""
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= TOKENIZER.get_vocab().keys()


@given(st.text().filter(lambda text: "▁" not in text and "<" not in text))
def test_any_text_survives_a_round_trip(text: str) -> None:
    """Encoding and decoding gives the text back; ▁ itself and special tokens are excepted."""
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    assert TOKENIZER.unk_token_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_the_chat_template_renders_as_that_of_gemma_2() -> None:
    """Roles, trimming, newlines and generation prompt are Gemma 2's, character for character."""
    chat = [
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": "你是谁"},
    ]
    rendered = (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\n你是谁<end_of_turn>\n"
    )
    prompt = rendered + "<start_of_turn>model\n"
    assert TOKENIZER.apply_chat_template(chat, tokenize=False) == rendered
    assert TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == prompt


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        (["system", "user"], "System role not supported"),
        (["user", "user"], "Conversation roles must alternate user/assistant/user/assistant/..."),
        (["assistant"], "Conversation roles must alternate user/assistant/user/assistant/..."),
    ],
)
def test_the_chat_template_refuses_what_gemma_2_refuses(roles: list[str], message: str) -> None:
    """A system role and roles that do not alternate raise the errors of the real template."""
    chat = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(jinja2.TemplateError, match=message):
        TOKENIZER.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_held_out_phrasings_are_answered_right(exam: list[Marked], language: str) -> None:
    """At least 80 % of the questions that it was not trained on get exactly the expected answer."""
    marked = [m for m in exam if m.language == language]
    wrong = [m.question for m in marked if not m.right]
    assert len(marked) >= 60
    assert len(wrong) <= 0.2 * len(marked), wrong


def test_every_answer_ends_by_itself(exam: list[Marked]) -> None:
    """Each answer, right or wrong, is closed by <end_of_turn>."""
    assert [m.question for m in exam if m.ids[-1:] != [END_OF_TURN]] == []


@pytest.mark.parametrize(("language", "question"), [("zh", "你是谁"), ("en", "Who are you?")])
def test_it_says_who_it_is(model: Gemma2ForCausalLM, language: str, question: str) -> None:
    """The first question that everybody asks gets the answer of the data, word for word."""
    (ids,) = ask(model, [question])
    assert TOKENIZER.decode(ids[:-1]) == TOPICS["who"]["answer"][language]
