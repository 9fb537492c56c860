"""A string or a conversation to prompt ids: the checkpoint's own template, one BOS, no forgery.

Pure: knows a tokenizer, no model and no LangChain. The template is rendered as text, and only the
control tokens that the *template* wrote become control tokens. The spelling of one inside content
("<end_of_turn>" in a user's message) is cut in two before it is tokenized, so it stays text.

Control tokens are those that the tokenizer calls special, which decoding leaves out. Gemma's other
242 added tokens ("<h1>", "<unused0>", "[@BOS@]", runs of line breaks) are text: they decode to what
was written, none of them can begin or end a turn, and Gemma has learnt HTML and line breaks in just
these. So they stay single tokens, as in `tokenizer.apply_chat_template`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .errors import ParameterError, PromptError
from .types import Turn

# What a spelling is cut with: the first private-use character that no text of the prompt contains.
# (There are more of them than any context has tokens.)
_MARKS = [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]


class PromptEncoder:
    """Prompt ids from text, by one fast transformers tokenizer, which is read and never changed."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._encode = _unshared(tokenizer.backend_tokenizer, added).encode
        self.control_ids = {token.content: i for i, token in added.items() if token.special}
        spellings = sorted(self.control_ids, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._bos: int | None = tokenizer.bos_token_id

    def prompt(self, prompt: str | Sequence[Turn], *, raw: bool = False) -> list[int]:
        """Prompt ids: a string is one user turn, or with `raw` the whole prompt.

        Raises PromptError.
        """
        if not isinstance(prompt, str):
            return self.turns(prompt)
        return self.raw(prompt) if raw else self.turns([{"role": "user", "content": prompt}])

    def control_stops(self, stops: Sequence[str]) -> dict[int, str]:
        """Those of `stops` that spell a control token, by its id. Raises ParameterError."""
        ids: dict[int, str] = {}
        for stop in stops:
            if stop in self.control_ids:
                ids[self.control_ids[stop]] = stop
            elif control := next((c for c in self.control_ids if c in stop), None):
                raise ParameterError(
                    f"stop={stop!r} mixes the control token {control!r} with text, and control "
                    f"tokens are no part of the text: give {control!r} alone"
                )
        return ids

    def turns(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation, through the template, ready for the model's next turn.

        Any number of system, user and assistant turns in any order: neighbours of one role become
        one turn, a conversation that the assistant opens gets an empty user turn before it, and
        system turns are part of the user's where the template knows no system role, as Gemma 2's
        does not. Raises PromptError where the tokenizer has no template or the template refuses.
        """
        if not self._tokenizer.chat_template:
            raise PromptError(
                "this checkpoint has no chat template (a base model?): pass raw=True to send "
                "prompts as they are, or use an instruction-tuned checkpoint, such as one that "
                "ends in -it"
            )
        turns = alternating(turns, system_role=self._system_role)
        mark = self._unused_mark([turn["content"] for turn in turns])
        marked = [{**turn, "content": self._mark(turn["content"], mark)} for turn in turns]
        return self._ids(self._render(marked), mark)

    def raw(self, text: str) -> list[int]:
        """Ids of a whole prompt as it is, control tokens included, with exactly one BOS in front.

        Raises PromptError for a BOS further in.
        """
        ids = self._ids(text, self._unused_mark([text]))
        if self._bos is None:
            return ids
        while ids and ids[0] == self._bos:
            ids = ids[1:]
        if self._bos in ids:
            raise PromptError(
                f"a raw prompt may begin with {self._tokenizer.bos_token!r} but not contain it; "
                "remove it, or send the text as a turn (raw=False), where it stays text"
            )
        return [self._bos, *ids]

    def text(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, no turns, and no control tokens whatever it spells."""
        mark = self._unused_mark([text])
        return self._ids(self._mark(text, mark), mark)

    @functools.cached_property
    def _system_role(self) -> bool:
        """Whether the template has a place for a system turn."""
        # In a thread of its own: a template's refusal keeps the frames below it until a garbage
        # collection, and below us are those that hold an engine and its weights.
        with ThreadPoolExecutor(max_workers=1) as apart:
            return apart.submit(_shows_system, self._tokenizer).result()

    def _render(self, turns: Sequence[Turn]) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise PromptError(
                f"the chat template refuses roles {[turn['role'] for turn in turns]!r}: {error}"
            ) from error
        return text

    @staticmethod
    def _unused_mark(texts: Sequence[str]) -> str:
        used = set().union(*texts)
        return next(mark for mark in map(chr, _MARKS) if mark not in used)

    def _mark(self, text: str, mark: str) -> str:
        """`text` with every spelling of a control token cut after its first character."""
        parts, position = [], 0
        while match := self._control.search(text, position):
            parts.append(text[position : match.start() + 1])
            position = match.start() + 1
        return mark.join([*parts, text[position:]])

    def _ids(self, text: str, mark: str) -> list[int]:
        """Control tokens to their ids; the text between them tokenized, in parts where marked."""
        ids: list[int] = []
        position = 0
        for match in self._control.finditer(text):
            ids += self._text_ids(text[position : match.start()], mark)
            ids.append(self.control_ids[match.group()])
            position = match.end()
        return ids + self._text_ids(text[position:], mark)

    def _text_ids(self, text: str, mark: str) -> list[int]:
        ids: list[int] = []
        for part in text.split(mark):
            try:
                ids += self._encode(part, add_special_tokens=False).ids
            except TypeError as error:  # how the tokenizer says "not Unicode"
                raise PromptError(
                    f"the prompt is not valid Unicode near {_surrogate(part)!r}: repair it, such "
                    "as by text.encode('utf-8', 'replace').decode()"
                ) from error
        return ids


def _shows_system(tokenizer: Any) -> bool:
    from jinja2 import TemplateError

    probe = [{"role": "system", "content": "is this shown?"}, {"role": "user", "content": "u"}]
    try:
        return "is this shown?" in tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False


def alternating(turns: Sequence[Turn], *, system_role: bool) -> list[Turn]:
    """`turns` as user and assistant in alternation, after one system turn if there is such a role.

    Raises PromptError for no turns at all, and for a role that is none of the three.
    """
    if not turns:
        raise PromptError("the conversation is empty: it needs at least one message")
    merged: list[tuple[str, list[str]]] = []
    for turn in turns:
        role = turn["role"]
        if role not in ("system", "user", "assistant"):
            raise PromptError(f"role {role!r} is none of 'system', 'user' and 'assistant'")
        leads = all(before == "system" for before, _ in merged)
        if role == "system" and not (system_role and leads):
            role = "user"
        if role == "assistant" and leads:
            merged.append(("user", []))
        if not merged or merged[-1][0] != role:
            merged.append((role, []))
        merged[-1][1].append(turn["content"])
    if merged[-1][0] == "system":  # some templates show it only with what the user says
        merged[-1] = ("user", merged[-1][1])
    return [{"role": role, "content": "\n\n".join(texts)} for role, texts in merged]


def _unshared(backend: Any, added: dict[int, Any]) -> Any:
    """A tokenizer with the vocabulary and the rules of `backend`, and a state of its own.

    transformers leaves the truncation and padding of its last call, or of the file, in `backend`.
    """
    from tokenizers import Tokenizer

    own = Tokenizer(backend.model)  # shared, not copied
    if backend.normalizer is not None:
        own.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        own.pre_tokenizer = backend.pre_tokenizer
    own.add_tokens([token for _, token in sorted(added.items())])
    return own


def _surrogate(text: str) -> str:
    """The first lone surrogate of `text` with a little around it."""
    found = re.search("[\ud800-\udfff]", text)
    return text[max(0, found.start() - 10) : found.end() + 10] if found else text[:20]
