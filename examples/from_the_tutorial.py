"""The last script of the tutorial that has you write a Gemma2_LLM by hand, on ours; then streamed.

python examples/from_the_tutorial.py                                        # the demo, a toy
python examples/from_the_tutorial.py /root/autodl-tmp/LLM-Research/gemma-2-9b-it    # your folder
"""

import sys

from gemma2_stream import Gemma2_LLM  # where it says: from LLM import Gemma2_LLM

llm = Gemma2_LLM(sys.argv[1] if len(sys.argv) > 1 else "demo")
print(llm("你是谁"))  # as it stands there; a warning tells that this is `invoke` today

# What the class written by hand could not do:
for token in llm.stream("你是谁"):
    print(token, end="", flush=True)
print()
print(llm.invoke("What is a token?", stop=[":"]))  # ends before the first colon
