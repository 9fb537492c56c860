"""What benchmarks say to a model: questions and texts, and the tokenizer that spells them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from report import say

import gemma2_stream

QUESTIONS = ("你是谁", "What is a token?", "What is Gemma 2?", "How do I stream?", "Hello")

TEXTS = {
    "English": "Streaming shows each word as soon as the model has chosen it, so that nobody has "
    "to wait for the end of a long answer before reading its extraordinarily short beginning.",
    "Chinese": "流式输出让读者在模型选定每个词的同时就能看到它，因此没有人需要等到一个很长的回答"
    "结束之后才开始阅读。标点符号、数字（比如 2024 年）和少见的字，例如饕餮与魑魅魍魉，也一样。",
    "Japanese": "ストリーミングでは、モデルが選んだ言葉がすぐに画面に表示されるので、"
    "長い回答が終わるまで待つ必要はありません。ひらがな、カタカナ、漢字のどれでも同じです。",
    "Korean": "스트리밍은 모델이 단어를 고르는 즉시 보여 주기 때문에 긴 답변이 끝날 때까지 "
    "아무도 기다릴 필요가 없습니다. 한글과 숫자, 문장 부호도 마찬가지입니다.",
    "Thai": "การสตรีมแสดงแต่ละคำทันทีที่แบบจำลองเลือกคำนั้นดังนั้นจึงไม่มีใครต้องรอจนกว่า"
    "คำตอบยาวจะจบลงก่อนที่จะเริ่มอ่านตอนต้น",
    "emoji": "🚀🌍👩‍🚀👨‍👩‍👧‍👦🎉🏳️‍🌈🇨🇳🇯🇵✨🫠🪿🥹👍🏽🤹🏿‍♀️🐙🍜🏯🎎🧋",
    "JSON": '{"model":"gemma-2","stream":true,"stop":["\\nHuman:"],"usage":{"prompt_tokens":12,'
    '"completion_tokens":345,"total_tokens":357},"url":"https://example.org/v1/chat?q=1&lang=zh"}',
    "code": "def fold(chunks):\n    total = 0\n    for index, chunk in enumerate(chunks):\n"
    "        if chunk.text and not chunk.done:\n            total += len(chunk.text) * index\n"
    "    return {'total': total, 'mean': total / max(1, len(chunks))}\n",
}


def load_tokenizer() -> Any:
    """Gemma 2's own tokenizer where GEMMA2_TOKENIZER names its folder, else the demo's."""
    from transformers import AutoTokenizer  # here, for those who only want a text

    return AutoTokenizer.from_pretrained(tokenizer_folder(), local_files_only=True)


def tokenizer_folder() -> Path:
    folder = os.environ.get("GEMMA2_TOKENIZER")
    if folder is not None:
        return Path(folder)
    say("GEMMA2_TOKENIZER is not set: the demo's small vocabulary stands in for Gemma 2's")
    return Path(gemma2_stream.__file__).with_name("demo")
