"""How much memory Gemma 2 needs, and which preset fits: the tables of docs/machines.md.

    python tools/memory_table.py    # writes them anew, in both languages

Computed from the published config.json of each size; nothing here was measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"en": DOCS / "machines.md", "zh": DOCS / "machines.zh-CN.md"}

GIB = 2**30
CONTEXT = 4096  # tokens, prompt and answer together
OVERHEAD = 1.5  # GiB: Python, torch, and what a forward needs besides
SYSTEM, DISPLAY = 3.0, 1.0  # GiB that a computer and a GPU keep for others


@dataclass(frozen=True)
class Size:
    """What config.json says."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int = 256_000

    @property
    def embedding(self) -> int:
        """Its parameters; the output layer shares them."""
        return self.vocab_size * self.hidden_size

    @property
    def linear(self) -> int:
        """Parameters of all other matrices."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        attention = heads * self.head_dim * self.hidden_size
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def parameters(self) -> int:
        """All, with four norms a layer and one at the end."""
        norms = (4 * self.num_hidden_layers + 1) * self.hidden_size
        return self.embedding + self.linear + norms

    def cache(self, width: int) -> int:
        """Bytes of keys and values at CONTEXT, of `width` bytes each."""
        token = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim
        return CONTEXT * token * width


SIZES = {
    "2b": Size(2304, 9216, 26, 8, 4, 256),
    "9b": Size(3584, 14336, 42, 16, 8, 256),
    "27b": Size(4608, 36864, 46, 32, 16, 128),
}


def weights(size: Size, kind: str, width: int = 2) -> float:
    """Bytes of weights; what a kind leaves alone has `width` bytes a parameter."""
    if kind == "int8":
        return size.parameters
    if kind == "int4":
        # NF4 in blocks of 64, whose 8-bit scales are in blocks of 256 with a float32 each.
        return size.linear * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + size.embedding * width
    return size.parameters * {"float32": 4, "bfloat16": 2}[kind]


def needed(size: Size, kind: str, width: int = 2) -> float:
    """GiB for one request of CONTEXT tokens."""
    return (weights(size, kind, width) + size.cache(width)) / GIB + OVERHEAD


@dataclass(frozen=True)
class Machine:
    """`width` is 2 where bfloat16 is computed in, else 4: float32."""

    memory: int
    gpu: bool
    en: str
    zh: str
    width: int = 2

    def preset(self, size: Size) -> str:
        """The first that fits, of those that are offered there."""
        room = self.memory - (DISPLAY if self.gpu else SYSTEM)
        whole = "bfloat16" if self.width == 2 else "float32"
        less = "int4" if self.gpu else "int8"
        for preset, kind in (("auto", whole), ("memory", less)):
            if needed(size, kind, self.width) <= room:
                return f'`"{preset}"`'
        return "–"


MACHINES = [
    Machine(8, False, "laptop, 8 GB", "笔记本，8 GB"),
    Machine(16, False, "laptop, 16 GB", "笔记本，16 GB"),
    Machine(16, False, "laptop, 16 GB, no bfloat16", "笔记本，16 GB，没有 bfloat16", 4),
    Machine(32, False, "laptop or desktop, 32 GB", "笔记本或台式机，32 GB"),
    Machine(32, False, "the same, no bfloat16", "同上，没有 bfloat16", 4),
    Machine(64, False, "workstation or server, 64 GB", "工作站或服务器，64 GB"),
    Machine(128, False, "server, 128 GB", "服务器，128 GB"),
    Machine(8, True, "GPU, 8 GB: RTX 3070, 4060", "GPU，8 GB：RTX 3070、4060"),
    Machine(12, True, "GPU, 12 GB: RTX 3060, 4070", "GPU，12 GB：RTX 3060、4070"),
    Machine(16, True, "GPU, 16 GB, no bfloat16: T4", "GPU，16 GB，没有 bfloat16：T4", 4),
    Machine(16, True, "GPU, 16 GB: RTX 4080", "GPU，16 GB：RTX 4080"),
    Machine(24, True, "GPU, 24 GB: RTX 3090, 4090", "GPU，24 GB：RTX 3090、4090"),
    Machine(32, True, "GPU, 32 GB: RTX 5090", "GPU，32 GB：RTX 5090"),
    Machine(48, True, "GPU, 48 GB: L40S", "GPU，48 GB：L40S"),
    Machine(80, True, "GPU, 80 GB: A100, H100", "GPU，80 GB：A100、H100"),
]
HEADS = {
    "en": (("Model", "Weights in", "Weights", "Keys and values", "Needed"), "Machine"),
    "zh": (("模型", "权重格式", "权重", "key 和 value", "需要"), "机器"),
}


def tables(language: str) -> tuple[str, str]:
    """Memory in GiB, and a preset a machine and size, as Markdown."""
    memory_head, machine_head = HEADS[language]
    memory = [[*memory_head]]
    for name, size in SIZES.items():
        for kind in ("float32", "bfloat16", "int8", "int4"):
            width = 4 if kind == "float32" else 2
            parts = weights(size, kind, width) / GIB, size.cache(width) / GIB
            figures = [f"{figure:.1f}" for figure in (*parts, needed(size, kind, width))]
            memory.append([f"`{name}`", kind, *figures])
    fits = [[machine_head, *(f"`{name}`" for name in SIZES)]]
    for machine in MACHINES:
        fits.append([getattr(machine, language), *map(machine.preset, SIZES.values())])
    return _markdown(memory, numbers=True), _markdown(fits)


def _markdown(rows: list[list[str]], *, numbers: bool = False) -> str:
    """The first row is the head; with `numbers`, all but two columns are flush right."""
    head, *body = rows
    line = ["---" if not numbers or column < 2 else "---:" for column in range(len(head))]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, line, *body])


def written(text: str, language: str) -> str:
    """A page's text with the tables of today."""
    for number, table in enumerate(tables(language), 1):
        mark = rf"(<!-- table {number} -->\n).*?(<!-- end -->)"
        text = re.sub(mark, rf"\g<1>\n{table}\n\g<2>", text, count=1, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for language, page in PAGES.items():
        page.write_text(written(page.read_text("utf-8"), language), "utf-8")
