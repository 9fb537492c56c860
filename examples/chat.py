"""Chat in the terminal: every answer is streamed, and the model sees all that was said before.

python examples/chat.py                                     # the demo, a toy
python examples/chat.py LLM-Research/gemma-2-9b-it          # Gemma 2 itself
"""

import sys

from langchain_core.messages import AIMessageChunk, BaseMessage, HumanMessage, SystemMessage

from gemma2_stream import ChatGemma2

chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo")
history: list[BaseMessage] = [SystemMessage("You are a helpful assistant.")]

while True:
    try:
        history.append(HumanMessage(input("> ")))
    except EOFError:  # Ctrl-D, or Ctrl-Z on Windows
        break
    answer = AIMessageChunk("")
    for chunk in chat.stream(history):
        print(chunk.text, end="", flush=True)
        answer += chunk
    print()
    history.append(answer)
