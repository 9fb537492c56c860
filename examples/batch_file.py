"""Answer a file of prompts into a file of answers, many at a time; killed, it goes on where it was.

prompts.jsonl has a line for each prompt, {"prompt": "..."}; answers.jsonl gets one for each, in the
order in which they are done: {"line": 1, "prompt": "...", "answer": "..."}, or "error" instead of
"answer". Run it again and it does what is missing; delete an error's line to have it tried again.

python examples/batch_file.py prompts.jsonl answers.jsonl                               # the demo
python examples/batch_file.py prompts.jsonl answers.jsonl LLM-Research/gemma-2-9b-it    # Gemma 2
"""

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from tqdm import tqdm

from gemma2_stream import Gemma2LLM


def prompts_in(source: str) -> dict[int, Any]:
    """The prompts by line, from 1."""
    with open(source, encoding="utf-8") as lines:
        return {
            number: json.loads(line)["prompt"]
            for number, line in enumerate(lines, 1)
            if line.strip()
        }


def done_in(out: BinaryIO) -> dict[int, Any]:
    """The prompts that have been dealt with, by line; half a line at the end is cut off."""
    out.seek(0)
    whole, newline, _ = out.read().rpartition(b"\n")
    out.truncate(len(whole + newline))
    return {record["line"]: record["prompt"] for record in map(json.loads, whole.splitlines())}


async def answer(
    model: str, prompts: dict[int, Any], write: Callable[[dict[str, Any]], None]
) -> None:
    """Have each prompt's record written as soon as its answer is there."""
    lines = list(prompts)
    # As many as the model decodes together; when one is done, the next joins the others.
    answers = Gemma2LLM(model).abatch_as_completed(
        list(prompts.values()), {"max_concurrency": 32}, return_exceptions=True
    )
    async for index, said in answers:
        record = {"line": lines[index], "prompt": prompts[lines[index]]}
        if isinstance(said, Exception):
            write(record | {"error": f"{type(said).__name__}: {said}"})
        else:
            write(record | {"answer": said})


def main(source: str, target: str, model: str = "demo") -> None:
    prompts = prompts_in(source)
    with open(target, "a+b") as out:
        done = done_in(out)
        if any(line not in prompts or prompts[line] != prompt for line, prompt in done.items()):
            sys.exit(f"{target} has answers to other prompts than {source}: name another file")
        todo = {line: prompt for line, prompt in prompts.items() if line not in done}
        with tqdm(total=len(prompts), initial=len(done), unit="prompt") as progress:

            def write(record: dict[str, Any]) -> None:
                out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                out.flush()
                progress.update()

            asyncio.run(answer(model, todo, write))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
