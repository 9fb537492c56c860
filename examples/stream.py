"""Ask two questions, and print each answer as it is made.

python examples/stream.py                                   # the demo, a toy
python examples/stream.py LLM-Research/gemma-2-9b-it        # Gemma 2 itself
"""

import sys

from gemma2_stream import Gemma2LLM

llm = Gemma2LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")

for question in ("你是谁", "What is a token?"):
    print(f"> {question}")
    for token in llm.stream(question):
        print(token, end="", flush=True)
    print("\n")
