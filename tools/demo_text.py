"""The demo model's text: read the questions, and vary them so that a tiny model generalises.

`demo_questions.toml` holds a few phrasings per topic.  People ask in many more ways, so each
training question is drawn afresh: a pattern is expanded, reworded, mistyped, punctuated and framed
("please ...") at random.  A draw that equals a held-out phrasing (case, spaces and punctuation
ignored) is thrown away, so what the exam asks was never trained on, by construction.
"""

from __future__ import annotations

import random
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

QUESTIONS = Path(__file__).with_name("demo_questions.toml")
LANGUAGES = ("en", "zh")
PUNCTUATION = {
    "en": ["?"] * 6 + [""] * 6 + [".", "!", "??", " ?", "...", "?!"],
    "zh": ["？"] * 6 + [""] * 6 + ["。", "！", "?", "??", "？！", "～"],
}
UNKNOWN_SHARE = 0.16  # "I don't know that" is the widest class by far: one turn in six practises it
NOISE_SLOTS = ("animal_zh", "place_zh", "food_zh", "life_zh", "concept_zh", "word_zh", "person_zh")
SYLLABLE = (  # a pseudo-word is made of an onset, a vowel and a coda, one to three times
    [*"bcdfghklmnprstvwz", "br", "cl", "dr", "st", "tr", "ch", "sh", "qu"],
    list("aeiou"),
    ["", "", "", "n", "r", "s", "l", "t", "m", "ck", "ng", "x"],
)

Groups = dict[str, list[list[str]]]
Lists = dict[str, list[str]]


@dataclass(frozen=True)
class Topic:
    """One thing the model knows: per language its answer, the phrasings to learn and to examine."""

    name: str
    answer: dict[str, str]
    train: Lists
    test: Lists


@dataclass(frozen=True)
class Turn:
    """A question, and the only answer that counts as right."""

    topic: str
    language: str
    question: str
    answer: str


class DemoText:
    """All of `demo_questions.toml`, with the random generator that turns it into training text."""

    def __init__(self, path: Path = QUESTIONS, seed: int = 0) -> None:
        """Read the file; the seed fixes all that is drawn later."""
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        self.slots: Lists = tables.pop("slots")
        self.framing: dict[str, Lists] = tables.pop("framing")
        self.groups: Groups = tables.pop("rewording")["groups"]
        self.topics = [Topic(name, **table) for name, table in tables.items()]
        self.rng = random.Random(seed)
        self.held_out = {normalise(turn.question) for turn in self.exam()}

    def exam(self) -> list[Turn]:
        """The held-out phrasings, in the order of the file."""
        return [
            Turn(topic.name, language, question, topic.answer[language])
            for topic in self.topics
            for language in LANGUAGES
            for question in topic.test[language]
        ]

    def framed_exam(self) -> list[Turn]:
        """One held-out phrasing per topic and language, in a frame that was not trained either."""
        turns: list[Turn] = []
        for topic in self.topics:
            for language in LANGUAGES:
                frames = self.framing["test"][language]
                frame = frames[len(turns) // 2 % len(frames)]
                question = frame.replace("{q}", topic.test[language][0])
                turns.append(Turn(topic.name, language, question, topic.answer[language]))
        return turns

    def conversation(self) -> list[Turn]:
        """One or two turns on unrelated topics, mostly in one language."""
        language = self.rng.choice(LANGUAGES)
        turns = []
        for _ in range(self.rng.choice((1, 1, 1, 2))):
            if self.rng.random() < 0.1:
                language = self.rng.choice(LANGUAGES)
            turns.append(self.turn(language))
        return turns

    def turn(self, language: str) -> Turn:
        """Draw a topic and one way to ask about it, never one that the exam asks."""
        known = self.rng.random() > UNKNOWN_SHARE
        topic = self.rng.choice(self.topics[:-1]) if known else self.topics[-1]
        question = self.ask(topic, language)
        while normalise(question) in self.held_out:
            question = self.ask(topic, language)
        if self.rng.random() < 0.3:
            framed = self.rng.choice(self.framing["train"][language]).replace("{q}", question)
            if normalise(framed) not in self.held_out:
                question = framed
        return Turn(topic.name, language, question, topic.answer[language])

    def ask(self, topic: Topic, language: str) -> str:
        """One phrasing: expanded, reworded, mistyped, cased and punctuated at random."""
        question = self.expand(self.rng.choice(topic.train[language]))
        for _ in range(self.rng.choice((0, 0, 0, 1, 1, 2))):
            question = self.reword(question, language)
        if self.rng.random() < 0.15:
            question = self.mistype(question)
        return self.recase(question) + self.rng.choice(PUNCTUATION[language])

    def expand(self, pattern: str) -> str:
        """Choose among [a|b] and fill {slots} until none is left; the slots may hold slots."""
        while found := re.search(r"\[([^\[\]]*)\]|\{(\w+)\}", pattern):
            choices, slot = found.groups()
            filler = self.rng.choice(choices.split("|")) if slot is None else self.fill(slot)
            pattern = pattern[: found.start()] + filler + pattern[found.end() :]
        return pattern.strip()

    def fill(self, slot: str) -> str:
        """A filler for {slot}; noise is made up, so that unheard-of words are met in training."""
        if slot == "noise":
            return " ".join(self.pseudo_word() for _ in range(self.rng.randint(1, 3)))
        if slot == "noise_zh":
            return self.pseudo_characters()
        return self.rng.choice(self.slots[slot])

    def pseudo_characters(self) -> str:
        """One to four Chinese characters, of known words or of all there are (mostly bytes)."""
        common = self.rng.random() < 0.6
        known = "".join(self.slots[self.rng.choice(NOISE_SLOTS)]) if common else ""
        length = self.rng.randint(1, 4)
        return "".join(self.character(known) for _ in range(length))

    def character(self, known: str) -> str:
        """One of the known characters; when there are none, any of Unicode's first 20902."""
        return self.rng.choice(known) if known else chr(self.rng.randint(0x4E00, 0x9FA5))

    def pseudo_word(self) -> str:
        """Syllables that sound like a word and mean nothing, such as "tralomi"."""
        count = self.rng.randint(1, 3)
        return "".join(self.rng.choice(part) for _ in range(count) for part in SYLLABLE)

    def reword(self, question: str, language: str) -> str:
        """Replace one wording by another of its group, where the question holds one."""
        groups = self.groups[language]
        present = [(w, group) for group in groups for w in group if w and holds(question, w)]
        if not present:
            return question
        word, group = self.rng.choice(present)
        other = self.rng.choice(group)
        question = re.sub(boundary(word), lambda _: other, question, count=1)
        return re.sub(" +", " ", question).strip()

    def mistype(self, question: str) -> str:
        """Drop, double or swap one character, as hurried fingers do."""
        if len(question) < 4:
            return question
        i = self.rng.randrange(1, len(question) - 1)
        a, b = question[i], question[i + 1]
        return question[:i] + self.rng.choice((b, a + a + b, b + a)) + question[i + 2 :]

    def recase(self, question: str) -> str:
        """Most people write a capital first, some none, a few SHOUT."""
        dice = self.rng.random()
        if dice < 0.04:
            return question.upper()
        if dice < 0.2:
            return question.lower()
        return question[:1].upper() + question[1:] if dice < 0.75 else question

    def corpus(self) -> list[str]:
        """Every text once, patterns flattened: what the tokenizer's vocabulary is made from."""
        texts = [text for topic in self.topics for text in topic.answer.values() for _ in range(3)]
        for language in LANGUAGES:
            patterns = [p for topic in self.topics for p in topic.train[language]]
            wordings = [word for group in self.groups[language] for word in group]
            texts += patterns + wordings + self.framing["train"][language]
        texts += [text for fillers in self.slots.values() for text in fillers]
        return [re.sub(r"\{\w+\}|[\[\]|]", " ", text).strip() for text in texts]


def normalise(text: str) -> str:
    """Only letters, digits and signs that carry meaning: how two phrasings are compared."""
    return "".join(char for char in text.lower() if char.isalnum() or char in "+<>_")


def boundary(word: str) -> str:
    """A regular expression for the wording, in English for whole words only."""
    return rf"\b{re.escape(word)}\b" if word[0].isascii() else re.escape(word)


def holds(question: str, word: str) -> bool:
    """Whether the wording occurs in the question."""
    return word in question and re.search(boundary(word), question) is not None
