"""Answer questions about this package from its own documentation, and name the sources.

The sections of README.md and docs/ lie in a Qdrant store in memory; the nearest to a question go
into the prompt, and the answer streams. Nothing leaves the machine.

pip install langchain-qdrant scikit-learn
python examples/rag.py                                      # the demo, a toy: it finds the right
                                                            # sections, and cannot read them
python examples/rag.py LLM-Research/gemma-2-9b-it           # Gemma 2 itself
"""

import re
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_qdrant import QdrantVectorStore
from sklearn.feature_extraction.text import TfidfVectorizer

from gemma2_stream import ChatGemma2


class NGrams(Embeddings):
    """Places texts by the pieces of words that they share: no weights, and any language."""

    def __init__(self, texts: list[str]) -> None:
        self.tfidf = TfidfVectorizer(
            analyzer="char", ngram_range=(2, 4), sublinear_tf=True, max_features=10_000
        ).fit(texts)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self.tfidf.transform(texts).toarray().tolist()

    def embed_query(self, text: str) -> list[float]:
        return self.embed_documents([text])[0]


root = Path(__file__).parent.parent
sections = [
    Document(
        section,
        metadata={"source": f"{path.relative_to(root).as_posix()}, {section.splitlines()[0]}"},
    )
    for path in [*root.glob("README*.md"), *root.glob("docs/**/*.md")]
    for section in re.split(r"^(?=##+ )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    if len(section) > 200  # a bare title answers nothing
]
embeddings = NGrams([section.page_content for section in sections])
# By meaning instead, with weights to download (pip install langchain-huggingface
# sentence-transformers): embeddings = HuggingFaceEmbeddings(model_name="BAAI/bge-m3")
store = QdrantVectorStore.from_documents(sections, embeddings, location=":memory:")

chat = ChatGemma2(sys.argv[1] if len(sys.argv) > 1 else "demo", max_new_tokens=300)
prompt = ChatPromptTemplate.from_template(
    "Answer in the language of the question, and from this documentation alone.\n\n"
    "{documentation}\n\nQuestion: {question}"
)


def documentation(given: dict[str, Any]) -> str:
    return "\n\n".join(document.page_content for document in given["found"])


chain = RunnablePassthrough.assign(
    found=itemgetter("question") | store.as_retriever(search_kwargs={"k": 3})
).assign(
    answer=RunnablePassthrough.assign(documentation=documentation)
    | prompt
    | chat
    | StrOutputParser()
)

for question in ("How do I cancel an answer?", "什么是前缀缓存？"):
    print(f"> {question}")
    found: list[Document] = []
    for part in chain.stream({"question": question}):
        found += part.get("found", [])
        print(part.get("answer", ""), end="", flush=True)
    print()
    for document in found:
        print(f"[{document.metadata['source']}]")
    print()
