"""A LangGraph graph that remembers each conversation, and pays for each of its tokens once.

What was said is kept by a checkpointer under the id of a thread; what the model has read already
is kept by the prefix cache, so that the next turn starts where the last one ended.

pip install langgraph
python examples/langgraph_memory.py                             # the demo, a toy
python examples/langgraph_memory.py LLM-Research/gemma-2-9b-it  # Gemma 2 itself
"""

import sys

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from gemma2_stream import ChatGemma2

chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_new_tokens=200)


def answer(state: MessagesState) -> dict[str, list[BaseMessage]]:
    """The one node; its `invoke` streams, since the graph is read as messages."""
    return {"messages": [chat.invoke(state["messages"])]}


builder = StateGraph(MessagesState)
builder.add_node(answer)
builder.add_edge(START, "answer")
# SqliteSaver (pip install langgraph-checkpoint-sqlite) in its place outlives the program.
graph = builder.compile(checkpointer=InMemorySaver())


def say(thread: str, text: str) -> None:
    print(f"{thread} > {text}")
    config: RunnableConfig = {"configurable": {"thread_id": thread}}
    asked = {"messages": [HumanMessage(text)]}
    for chunk, _ in graph.stream(asked, config, stream_mode="messages"):
        print(chunk.text, end="", flush=True)
    *_, last = graph.get_state(config).values["messages"]
    usage = last.usage_metadata
    read = usage["input_token_details"]["cache_read"]
    print(f"\n[{read} of {usage['input_tokens']} tokens of the prompt were read before]")


say("甲", "你是谁")
say("B", "What is LangChain?")
say("甲", "你会说什么语言？")  # with all that 甲 said before, and nothing of B
