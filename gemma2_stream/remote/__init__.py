"""An engine on another machine: vLLM, or `gemma2-stream serve`, asked by OpenAI's protocol.

Knows the `openai` client, a tokenizer and a checkpoint's configuration; no weights, no LangChain. A
prompt goes over as token ids, so that the template, the one BOS and forged control tokens are our
affair; the text that comes back is read by our own stops, and an answer counts only with a verdict.

    engine = remote_engine(RemoteSpec(base_url="http://gpu:8000/v1", model="google/gemma-2-27b-it"))
"""

from .engine import RemoteEngine, remote_engine
from .spec import RemoteSpec

__all__ = ["RemoteEngine", "RemoteSpec", "remote_engine"]
