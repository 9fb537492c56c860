"""The KV cache of rows that decode together: room to grow, and rows that come and go.

Knows torch and transformers' cache; nothing of requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# transformers 5.24 renamed it, for all models: a model's own `forward` may be `*args, **kwargs`.
_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if _RENAMED else "past_key_values"

States = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of some tokens of one row: a pair a layer, each (heads, tokens, head size)."""


def part(states: States, start: int, end: int) -> States:
    """The tokens from `start` to `end`, as views."""
    return [(keys[:, start:end], values[:, start:end]) for keys, values in states]


def size(states: States) -> int:
    """Bytes."""
    return sum(tensor.nbytes for pair in states for tensor in pair)


class KVLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values, each (rows, heads, tokens, head size), views of buffers with room for more:
    a new token is written behind the others, which transformers' own layer copies for each.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (rows, heads, new tokens, head size); returns all there are."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._buffers is None or end > self._buffers[0].shape[-2]:
            self._grow(key_states, value_states, start, end + max(64, end // 4))
        keys, values = self._show(end)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def load(self, rows: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], width: int) -> None:
        """Hold `rows`, each in pieces (heads, tokens, head size) that follow one another, all of
        them ending at the column `width`; the columns before a row are zero.
        """
        like = next(pair for row in rows for pair in row)
        buffers = tuple(
            states.new_empty(len(rows), states.shape[0], width + 64, states.shape[2])
            for states in like
        )
        for number, pieces in enumerate(rows):
            end = width
            for pair in reversed(pieces):
                start = end - pair[0].shape[1]
                for buffer, states in zip(buffers, pair, strict=True):
                    buffer[number, :, start:end] = states
                end = start
            for buffer in buffers:
                buffer[number, :, :end] = 0
                buffer[number, :, width:] = 0
        self._buffers = buffers  # type: ignore[assignment]  # two of two
        self._show(width)

    def _grow(self, keys: torch.Tensor, values: torch.Tensor, used: int, room: int) -> None:
        old = self._buffers
        grown = [like.new_empty(*like.shape[:2], room, like.shape[3]) for like in (keys, values)]
        for new in grown:
            new[:, :, used + keys.shape[-2] :] = 0
        if old is not None:
            for new, before in zip(grown, old, strict=True):
                new[:, :, :used] = before[:, :, :used]
        self._buffers = (grown[0], grown[1])

    def _show(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._buffers is not None
        keys, values = (_shown(buffer, tokens) for buffer in self._buffers)
        self.device, self.is_initialized = keys.device, True
        self.keys, self.values = keys, values
        return keys, values


def _shown(buffer: torch.Tensor, tokens: int) -> torch.Tensor:
    shown = buffer[:, :, :tokens]
    shown.buffer = buffer  # type: ignore[attr-defined]  # for `with_room`
    return shown


def with_room(states: torch.Tensor) -> torch.Tensor:
    """`states` as a layer gave them, and behind them the room for more, which is finite and whose
    tokens are nobody's; without gaps between heads, for which torch would make a copy.
    """
    buffer: torch.Tensor = getattr(states, "buffer", states)
    return buffer


class SteppedCache(DynamicCache):
    """A cache with which `generate` asks whether it is over before it goes on: for Apple's GPUs
    transformers 5.24 asks one forward later, and takes back what that has left in a cache of which
    it may. Nor does it compile for this one.
    """

    is_croppable = False
    is_compileable = False


class KVCache(SteppedCache):
    """A `KVLayer` for every layer, sliding windows too: what is cut off can't be gone back to."""

    layers: list[Any]

    def __init__(self) -> None:
        Cache.__init__(self, layer_class_to_replicate=KVLayer)

    def row(self, number: int, length: int) -> States:
        """The last `length` tokens of a row, as views."""
        start = self.get_seq_length() - length
        return [(at.keys[number, :, start:], at.values[number, :, start:]) for at in self.layers]

    def load(self, rows: Sequence[Sequence[States]], width: int) -> None:
        """Hold `rows` instead, each in pieces that follow one another, right-aligned in `width`.

        A layer's old states are free before the next layer's new ones are made, unless `rows` are
        views of others.
        """
        first = next((states for row in rows for states in row), None)
        if first is None:
            self.layers.clear()
            return
        for layer in range(len(first)):
            if layer == len(self.layers):
                self.layers.append(KVLayer())
            self.layers[layer].load([[s[layer] for s in row] for row in rows], width)


def can_join(config: Any) -> bool:
    """Whether a model of this `config` keeps keys and values of tokens and nothing else, so that
    rows can be put together and gone back in; recurrent states can't.
    """
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in plain for layer in DynamicCache(config=config).layers)


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize)
