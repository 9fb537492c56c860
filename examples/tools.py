"""Let the model use a tool: it calls, Python answers, and it goes on with what it was told.

python examples/tools.py                                    # the demo, a toy: it cannot choose
python examples/tools.py LLM-Research/gemma-2-9b-it         # Gemma 2 itself
"""

import sys

from langchain_core.messages import AIMessageChunk, BaseMessage, HumanMessage
from langchain_core.tools import tool

from gemma2_stream import ChatGemma2


@tool
def count_letter(word: str, letter: str) -> int:
    """Count how often a letter occurs in a word."""
    return word.count(letter)


real = len(sys.argv) > 1
chat = ChatGemma2(sys.argv[1] if real else "demo", max_new_tokens=150)
# The toy would never call by itself. Its call is well-formed all the same: the grammar sees to it.
asking = chat.bind_tools([count_letter], tool_choice="auto" if real else "count_letter")
messages: list[BaseMessage] = [HumanMessage("How many r are there in strawberry?")]

call = AIMessageChunk("")
for chunk in asking.stream(messages):
    print(chunk.text, end="", flush=True)
    for part in chunk.tool_call_chunks:
        print(part["name"] or "", part["args"] or "", sep="", end="", flush=True)
    call += chunk
print()

messages.append(call)
for tool_call in call.tool_calls:
    messages.append(count_letter.invoke(tool_call))  # a ToolMessage
    print(f"[{tool_call['name']} returns {messages[-1].text}]")

if call.tool_calls:
    for chunk in chat.stream(messages):
        print(chunk.text, end="", flush=True)
    print()
