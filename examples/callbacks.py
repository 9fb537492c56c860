"""Watch every token from a LangChain callback handler, and measure the answer at its end.

python examples/callbacks.py                                # the demo, a toy
python examples/callbacks.py LLM-Research/gemma-2-9b-it     # Gemma 2 itself
"""

import sys
import time
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult

from gemma2_stream import Gemma2LLM


class Meter(BaseCallbackHandler):
    """Prints each token as it comes, then why the answer ended and how fast it was."""

    def on_llm_start(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        print(token, end="", flush=True)

    def on_llm_end(self, response: LLMResult, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.start
        info = response.generations[0][0].generation_info
        tokens = info["token_usage"]["completion_tokens"]
        print(f"\n[{info['finish_reason']}: {tokens} tokens, {tokens / seconds:.1f} a second]")


llm = Gemma2LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
print(f"[loaded: {llm.engine.name}]")  # loads now, so that the meter times the answer alone

# Handlers see the same tokens on every path: here the answer comes back whole.
answer = llm.invoke("What is Gemma 2?", config={"callbacks": [Meter()]})
print(f"[{len(answer)} characters returned]")

# An answer that is cut short says so.
llm.invoke("What is Gemma 2?", max_new_tokens=5, config={"callbacks": [Meter()]})
