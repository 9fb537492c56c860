"""vLLM's side of throughput.py, in the environment that has vLLM and nothing of ours.

    python benchmarks/vllm_worker.py FOLDER MAX_ROWS

Answers each line of JSON on stdin, `{"prompts": [[id, ...], ...], "tokens": 48}`, with one on
stdout: `{"ids": [[id, ...], ...], "first": [seconds, ...], "last": [seconds, ...]}`, times from the
arrival of the line. The first line it prints, `{"version": ...}`, says that it is ready.
"""

import json
import os
import sys
import time

# What vLLM and its libraries print is progress, even where they print it to stdout.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

os.environ.update(
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
    VLLM_HOST_IP="127.0.0.1",
    VLLM_CPU_KVCACHE_SPACE="2",  # GB
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # all cores, as torch takes them; it would reserve one
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # no second process to wait for: `step` is all there is
    VLLM_LOGGING_LEVEL="WARNING",
)

from vllm import LLM, SamplingParams, __version__  # noqa: E402 - it reads the environment


def main() -> None:
    folder, rows = sys.argv[1:]
    engine = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        max_num_seqs=int(rows),
        enforce_eager=True,  # compiled once here; it took minutes and gained nothing
        seed=0,
    ).llm_engine
    say({"version": __version__})
    for number, line in enumerate(sys.stdin):
        say(run(engine, number, **json.loads(line)))


def run(engine, number, prompts, tokens):
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=True
    )
    began = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{row}", {"prompt_token_ids": prompt}, params)
    ids, first, last = ([None] * len(prompts) for _ in range(3))
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            row = int(output.request_id.partition("-")[2])
            first[row] = first[row] or now
            last[row], ids[row] = now, list(output.outputs[0].token_ids)
    return {"ids": ids, "first": first, "last": last}


def say(answer):
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
