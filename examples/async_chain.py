"""Stream chains in asyncio: two questions at once, and a task that is cancelled halfway.

python examples/async_chain.py                              # the demo, a toy
python examples/async_chain.py LLM-Research/gemma-2-9b-it   # Gemma 2 itself
"""

import asyncio
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate

from gemma2_stream import Gemma2LLM

llm = Gemma2LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
chain = PromptTemplate.from_template("{question}?") | llm | StrOutputParser()


async def answer(name: str, question: str) -> None:
    """Print an answer line by line, with the name of who asked in front."""
    line = ""
    async for token in chain.astream({"question": question}):
        line += token
        *lines, line = line.split("\n")
        for finished in lines:
            print(f"{name}: {finished}")
    print(f"{name}: {line}")


async def give_up(question: str, after: int) -> None:
    """Start an answer in a task, and cancel the task after some tokens."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def listen() -> None:
        async for token in chain.astream({"question": question}):
            await heard.put(token)

    task = asyncio.create_task(listen())
    tokens = [await heard.get() for _ in range(after)]
    task.cancel()  # the model stops within a step, and is free for the next caller
    await asyncio.gather(task, return_exceptions=True)
    print(f"cancelled: {task.cancelled()}, after {''.join(tokens)!r}")


async def main() -> None:
    # One model serves both, one after the other; meanwhile the loop is free.
    await asyncio.gather(answer("甲", "你是谁"), answer("B", "What is LangChain"))
    await give_up("What is Gemma 2", after=4)


asyncio.run(main())
