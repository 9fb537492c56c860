"""llama.cpp as an arm of decode.py: a line of prompt ids comes in, a line of times goes out.

    PYTHON benchmarks/llama_worker.py FILE.gguf THREADS TOKENS [plain]

Run by an interpreter that has llama-cpp-python, and nothing of this project. Ids go in and out, so
the file needs no tokenizer; greedy, like the others, and what ends a turn ends nothing.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path


def main() -> None:
    import llama_cpp as llama  # decode.py has it not, and wants what is below

    path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    began = time.perf_counter()
    llama.llama_backend_init()
    loading = llama.llama_model_default_params()
    loading.use_extra_bufts = "plain" not in sys.argv[4:]
    model = llama.llama_model_load_from_file(path.encode(), loading)
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
    params.n_threads = params.n_threads_batch = threads
    context = llama.llama_init_from_model(model, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    print(json.dumps({"load_s": time.perf_counter() - began}), flush=True)

    def step(ids: list[int]) -> int:
        """The likeliest id after `ids`."""
        held = (llama.llama_token * len(ids))(*ids)  # the batch only points at it
        batch = llama.llama_batch_get_one(held, len(ids))
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = llama.llama_get_logits_ith(context, -1)
        found = memoryview(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocabulary))[0])
        return largest(found)

    for line in sys.stdin:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        times, ids = [time.perf_counter()], json.loads(line)
        answer = []
        for _ in range(tokens):
            ids = [step(ids)]
            times.append(time.perf_counter())
            answer += ids
        print(json.dumps({"times": times, "ids": answer, **memory()}), flush=True)


def largest(values: memoryview) -> int:
    import numpy as np  # it comes with llama-cpp-python

    return int(np.argmax(np.frombuffer(values, dtype=np.float32)))


def memory() -> dict[str, float]:
    """GB of this process, in all and without what is a mapped file's; Linux only."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    text = status.read_text()
    found = [int(text.partition(name)[2].split()[0]) / 1e6 for name in ("VmRSS:", "RssAnon:")]
    return {"rss_gb": found[0], "anonymous_gb": found[1]}


if __name__ == "__main__":
    main()
