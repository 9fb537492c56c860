"""Run a LangChain agent with two tools, and stream all that it says.

The demo is a toy that cannot choose a tool: with it this shows that the tokens of an agent stream,
not that it does something sensible. Give it Gemma 2 itself for that.

pip install langchain
python examples/agent.py                                    # the demo
python examples/agent.py LLM-Research/gemma-2-9b-it         # Gemma 2 itself
"""

import sys

from langchain.agents import create_agent
from langchain_core.messages import AIMessageChunk, ToolMessage

from gemma2_stream import ChatGemma2

CITIES = {"Paris": 2_100_000, "Beijing": 21_900_000}


def population(city: str) -> str:
    """Tell how many people live in a city."""
    return f"{CITIES[city]:,}" if city in CITIES else f"I know {', '.join(CITIES)} only."


def divide(a: float, b: float) -> float:
    """Divide a by b."""
    return a / b if b else float("nan")


chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_new_tokens=200)
agent = create_agent(chat, [population, divide], system_prompt="Use the tools for figures.")
question = {"messages": [("human", "Which city has more people, Beijing or Paris?")]}

for message, _ in agent.stream(question, stream_mode="messages"):
    if isinstance(message, ToolMessage):
        print(f"\n[{message.name} returns {message.text}]")
    elif isinstance(message, AIMessageChunk):
        print(message.text, end="", flush=True)
        for part in message.tool_call_chunks:
            print(part["name"] or "", part["args"] or "", sep="", end="", flush=True)
print()
