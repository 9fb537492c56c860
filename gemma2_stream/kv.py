"""The KV cache of rows that decode together: room to grow, and rows that come and go.

Knows torch and transformers' cache; nothing of requests.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

# transformers 5.24 renamed it, for all models: a model's own `forward` may be `*args, **kwargs`.
_RENAMED = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if _RENAMED else "past_key_values"


class Room:
    """Memory of one layer for keys and values, each (rows, heads, tokens and more, head size)."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values
        self._layer: weakref.ref[KVLayer] | None = None

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def tokens(self) -> int:
        """For how many there is room."""
        return self.keys.shape[2]

    @property
    def free(self) -> bool:
        """Whether no layer writes into it."""
        layer = self._layer() if self._layer else None
        return layer is None or layer.room is not self

    def give(self, layer: KVLayer) -> None:
        """Let `layer`, and nobody else, write into it."""
        self._layer = weakref.ref(layer)


@dataclass(frozen=True, slots=True)
class States:
    """Keys and values of some tokens of one row: a pair a layer, each (heads, tokens, head size).

    They may be what `rooms`, one a layer, begin with. Who has a room to himself can go on writing
    behind them, without a copy.
    """

    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
    rooms: Sequence[Room] = ()

    @property
    def tokens(self) -> int:
        return self.pairs[0][0].shape[1] if self.pairs else 0

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for pair in self.pairs for tensor in pair)

    @property
    def held(self) -> int:
        """Bytes that are free when nobody has them any more."""
        return sum(room.nbytes for room in self.rooms) if self.rooms else self.nbytes

    @property
    def lent(self) -> bool:
        """Whether another may write behind them."""
        return bool(self.rooms) and all(room.free for room in self.rooms)

    def part(self, start: int, end: int) -> States:
        """The tokens from `start` to `end`, as views."""
        if (start, end) == (0, self.tokens):
            return self
        return States([(keys[:, start:end], values[:, start:end]) for keys, values in self.pairs])

    def copy(self) -> States:
        return States([(keys.clone(), values.clone()) for keys, values in self.pairs])


class KVLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values, each (rows, heads, tokens, head size), views of a `room` with more of it:
    a new token is written behind the others, which transformers' own layer copies for each.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self.room: Room | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (rows, heads, new tokens, head size); returns all there are."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None:
            self._move(key_states, value_states, 0, with_more(end))
        else:
            self.reserve(end)
        keys, values = self.show(end)
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        return keys, values

    def reserve(self, tokens: int) -> Room:
        """Its room, which it must have, with place for so many in all."""
        assert self.room is not None
        if tokens > self.room.tokens:
            self._move(self.room.keys, self.room.values, self.get_seq_length(), with_more(tokens))
        return self.room

    def load(self, rows: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], width: int) -> None:
        """Hold `rows`, each in pieces (heads, tokens, head size) that follow one another, all of
        them ending at the column `width`; the columns before a row are zero.
        """
        like = next(pair for row in rows for pair in row)
        # A row that joins others is often copied again soon.
        columns = with_more(width) if len(rows) == 1 else width + 64
        buffers = tuple(
            states.new_empty(len(rows), states.shape[0], columns, states.shape[2])
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
        self.take(Room(*buffers), width)

    def take(self, room: Room, width: int) -> None:
        """Hold the first `width` columns of `room`, and write behind them."""
        room.give(self)
        self.room = room
        self.show(width)

    def _move(self, keys: torch.Tensor, values: torch.Tensor, used: int, columns: int) -> None:
        """Take a room of `columns` like `keys` and `values`, and with the first `used` of them."""
        room = Room(
            *(like.new_empty(*like.shape[:2], columns, like.shape[3]) for like in (keys, values))
        )
        for new, old in ((room.keys, keys), (room.values, values)):
            new[:, :, :used] = old[:, :, :used]
            new[:, :, used:] = 0
        self.take(room, used)

    def show(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let so many count as there, whose states are in the room."""
        assert self.room is not None
        keys, values = (_shown(buffer, tokens) for buffer in (self.room.keys, self.room.values))
        self.device, self.is_initialized = keys.device, True
        self.keys, self.values = keys, values
        return keys, values


def with_more(tokens: int) -> int:
    """How many a row of `tokens` gets room for."""
    return tokens + max(64, tokens // 4)


def _shown(buffer: torch.Tensor, tokens: int) -> torch.Tensor:
    shown = buffer.narrow(2, 0, tokens)
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
        pairs = [(at.keys[number, :, start:], at.values[number, :, start:]) for at in self.layers]
        alone = start == 0 and all(at.keys.shape[0] == 1 for at in self.layers)
        return States(pairs, [at.room for at in self.layers] if alone else ())

    def load(self, rows: Sequence[Sequence[States]], width: int) -> None:
        """Hold `rows` instead, each in pieces that follow one another, right-aligned in `width`;
        a lone piece that is lent is not copied.

        A layer's old states are free before the next layer's new ones are made, unless `rows` are
        views of others.
        """
        pieces = [states for row in rows for states in row]
        if not pieces:
            self.layers.clear()
            return
        lent = len(rows) == len(pieces) == 1 and pieces[0].tokens == width and pieces[0].lent
        for layer in range(len(pieces[0].pairs)):
            if layer == len(self.layers):
                self.layers.append(KVLayer())
            if lent:
                self.layers[layer].take(pieces[0].rooms[layer], width)
            else:
                self.layers[layer].load([[s.pairs[layer] for s in row] for row in rows], width)


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
