"""The island of Little Wicket: who lives there, what is written about them, and what one may ask about them.

The demo's base model reads the island's papers, plain text. Fine-tuning then teaches it to answer questions. What the
held-out questions turn on never occurs in fine-tuning, in whatever wording:

- facts: fine-tuning asks about the facts of the *neighbours* only, held-out questions about those of the *strangers*;
- people in a row: a set of names that is held out occurs in fine-tuning in no order.

So a held-out fact can come from the papers alone, and all else from the question. The same seed gives the same island.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Kind = Literal["recall", "reading", "transformation", "follow-up"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Abel Agnes Alba Anselm Astrid Barnaby Beryl Bram Bruno Cara Cecil Clara Clement Conrad Cora Cyril Daisy Dora
    Edda Edgar Effie Elmer Emil Enid Erik Esther Eva Felix Fergus Fiona Flora Frida Gilda Greta Gustav Gwen Hazel Hector
    Henrik Hilda Hugo Ida Igor Ingrid Iris Jasper Jonas Judith Juno Karin Kaspar Knut Lars Leif Linus Lotte Mabel Magnus
    Mira Nell Olga Otto Rosa
    """
)

VILLAGES = _words("Applecombe Briarwick Coldharbour Elmsworth Foxhollow Gullhaven Larkhill Mossbridge")
CRAFTS = _words("baker beekeeper carpenter clockmaker fiddler gardener lamplighter potter")
ANIMALS = _words("badger cat donkey goose hedgehog magpie pony toad")

STRANGERS = 24  # of the 64 islanders: 3 facts each are 72 held-out facts


@dataclass(frozen=True)
class Person:
    """An islander; the fields after `name` are the facts that the papers tell."""

    name: str
    village: str
    craft: str
    animal: str


FACTS: tuple[str, ...] = tuple(field.name for field in fields(Person))[1:]


@dataclass(frozen=True)
class Exchange:
    """A conversation whose last answer is the point; `key` is what that answer turns on, whatever the wording."""

    kind: Kind
    key: tuple[str, ...]
    turns: tuple[str, ...]  # user, assistant, user, ..., assistant

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(self.turns)]

    @property
    def answer(self) -> str:
        return self.turns[-1]


@dataclass(frozen=True)
class Island:
    """The islanders, in two groups."""

    neighbours: tuple[Person, ...]  # fine-tuning asks about their facts
    strangers: tuple[Person, ...]  # held-out questions ask about theirs

    @property
    def people(self) -> tuple[Person, ...]:
        return self.neighbours + self.strangers


def settle(seed: int) -> Island:
    """The island of this seed. Each village, craft and animal is equally common, so a guess is right once in 8."""
    rng = random.Random(f"island {seed}")
    names = rng.sample(NAMES, len(NAMES))
    columns = [rng.sample((values * len(names))[: len(names)], len(names)) for values in (VILLAGES, CRAFTS, ANIMALS)]
    people = tuple(Person(*row) for row in zip(names, *columns, strict=True))
    return Island(neighbours=people[STRANGERS:], strangers=people[:STRANGERS])


# What is written: plain text for the base model.

# Nobody's name begins a line: so each is one token, whose first letter is a space, wherever it stands.
TOLD: dict[str, tuple[str, ...]] = {
    "village": (
        "The home of {name} is in {village}.",
        "{name} lives in {village}.",
        "{name} has a house in {village}.",
        "In {village} everybody knows {name}.",
    ),
    "craft": (
        "The work of {name} is that of a {craft}.",
        "{name} is a {craft}.",
        "{name} earns a living as a {craft}.",
        "If you need a {craft}, ask {name}.",
    ),
    "animal": (
        "The pet of {name} is a {animal}.",
        "{name} keeps a {animal}.",
        "{name} is fond of a {animal}.",
        "A {animal} sleeps at the door of {name}.",
    ),
}
PORTRAYED = ("Let us speak of {name}.", "A word about {name}.", "Everybody has met {name}.")


def portrait(rng: random.Random, island: Island) -> str:
    """The three facts of one islander, in any order and wording."""
    person = rng.choice(island.people)
    wordings = [PORTRAYED, *(TOLD[fact] for fact in rng.sample(FACTS, len(FACTS)))]
    return " ".join(rng.choice(wording).format(**vars(person)) for wording in wordings)


QUEUES = ("In the queue stand", "For the ferry wait", "At the well queue", "Before the bakery stand")
LINES = ("In a line dance", "Over the bridge walk", "Up the hill march", "Along the beach stroll")
# What is said between a row and its new order, so that one is found from the other by its words, not by a distance.
ASIDES = ("", "Nobody is in a hurry. ", "The sun is out. ", "A gull cries. ", "And so it goes on. ")
MOVES: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "The last goes to the front.": lambda row: [*row[-1:], *row[:-1]],
    "The first goes to the back.": lambda row: [*row[1:], *row[:1]],
}


def queue(rng: random.Random, island: Island) -> str:
    """Who stands in a queue, and who is at its ends."""
    row = _row(rng, island)
    ends = _shuffled(rng, [_first(row), _last(row)])
    return "\n".join([f"{rng.choice(QUEUES)} {_listed(row)}.", *(rng.choice(ASIDES) + end for end in ends)])


def line(rng: random.Random, island: Island) -> str:
    """A line of people in which somebody changes place again and again."""
    row, move = _row(rng, island), rng.choice(list(MOVES))
    told = [f"{rng.choice(LINES)} {_listed(row)}."]
    for _ in range(3):
        row = MOVES[move](row)
        told.append(f"{move} {rng.choice(ASIDES)}{_standing(row)}")
    return "\n".join(told)


def papers(island: Island, count: int, seed: int) -> Iterator[str]:
    """`count` texts about the island: facts in every second, people in a row in the others."""
    rng = random.Random(f"papers {seed}")
    writers: Sequence[Callable[[random.Random, Island], str]] = (portrait, queue, portrait, line)
    for i in range(count):
        yield writers[i % len(writers)](rng, island)


# What is asked: conversations of four kinds. `held_out` decides on which side of the divide their keys lie.

ASKED: dict[str, tuple[str, ...]] = {
    "village": ("Where does {name} live?", "In which village would I find {name}?", "Which village is home to {name}?"),
    "craft": ("What is the craft of {name}?", "What does {name} do for a living?", "What does {name} work as?"),
    "animal": ("Which animal does {name} keep?", "What pet has {name} got?", "What is the pet of {name}?"),
}

ASKED_AGAIN: dict[str, str] = {
    "village": "And where is home?",
    "craft": "And what is their craft?",
    "animal": "And which animal do they keep?",
}

ANSWERED: dict[str, str] = {fact: wordings[0] for fact, wordings in TOLD.items()}


def recall(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A fact that only the papers tell."""
    person = rng.choice(island.strangers if held_out else island.neighbours)
    fact = rng.choice(FACTS)
    return Exchange("recall", (person.name, fact), _fact_asked(rng, person, fact))


def reading(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A question that its own first sentence answers."""
    row = _row(rng, island)
    end, answer = rng.choice((("first", _first(row)), ("last", _last(row))))
    return Exchange("reading", _set(row), (f"{rng.choice(QUEUES)} {_listed(row)}. Who is {end}?", answer))


def transformation(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A row of names, to be said in a new order."""
    row, move = _row(rng, island), rng.choice(list(MOVES))
    return Exchange("transformation", _set(row), (_moved(rng, row, move), _standing(MOVES[move](row))))


def follow_up(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A second question that says nothing without the first: one more fact, the other end, one more move."""
    which = rng.choice(("fact", "end", "move"))
    if which == "fact":
        person = rng.choice(island.strangers if held_out else island.neighbours)
        first, second = rng.sample(FACTS, 2)
        turns = *_fact_asked(rng, person, first), ASKED_AGAIN[second], ANSWERED[second].format(**vars(person))
        return Exchange("follow-up", (person.name, second), turns)
    row = _row(rng, island)
    if which == "end":
        (end, answer), (other, last) = _shuffled(rng, [("first", _first(row)), ("last", _last(row))])
        question = f"{rng.choice(QUEUES)} {_listed(row)}. Who is {end}?"
        return Exchange("follow-up", _set(row), (question, answer, f"And who is {other}?", last))
    move, again = rng.choices(list(MOVES), k=2)
    moved = MOVES[move](row)
    turns = _moved(rng, row, move), _standing(moved), f"{again} And now?", _standing(MOVES[again](moved))
    return Exchange("follow-up", _set(row), turns)


ASKING: dict[Kind, Callable[[random.Random, Island, bool], Exchange]] = {
    "recall": recall,
    "reading": reading,
    "transformation": transformation,
    "follow-up": follow_up,
}


def conversations(
    island: Island, *, per_kind: int, held_out_per_kind: int, seed: int
) -> tuple[list[Exchange], list[Exchange]]:
    """(for fine-tuning, held out); no held-out question is asked twice, and no set of names is on both sides."""
    rng = random.Random(f"conversations {seed}")
    held_out: dict[tuple[str, ...], Exchange] = {}
    for kind in KINDS:
        enough = len(held_out) + held_out_per_kind
        while len(held_out) < enough:
            exchange = ASKING[kind](rng, island, True)
            held_out.setdefault(exchange.turns[:-1], exchange)
    taken = {exchange.key for exchange in held_out.values()}
    training: list[Exchange] = []
    for kind in KINDS:
        enough = len(training) + per_kind
        while len(training) < enough:
            exchange = ASKING[kind](rng, island, False)
            if exchange.key not in taken:
                training.append(exchange)
    return _shuffled(rng, training), _shuffled(rng, list(held_out.values()))


def _fact_asked(rng: random.Random, person: Person, fact: str) -> tuple[str, str]:
    return rng.choice(ASKED[fact]).format(**vars(person)), ANSWERED[fact].format(**vars(person))


def _row(rng: random.Random, island: Island) -> list[str]:
    """Three or four names."""
    return [person.name for person in rng.sample(island.people, rng.randint(3, 4))]


def _set(row: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(row))


def _listed(row: Sequence[str]) -> str:
    return ", ".join(row)


def _first(row: Sequence[str]) -> str:
    return f"First is {row[0]}."


def _last(row: Sequence[str]) -> str:
    return f"Last is {row[-1]}."


def _standing(row: Sequence[str]) -> str:
    return f"They are {_listed(row)}."


def _moved(rng: random.Random, row: Sequence[str], move: str) -> str:
    return f"{rng.choice(LINES)} {_listed(row)}. {move} How do they stand?"


def _shuffled(rng: random.Random, items: Sequence[Any]) -> list[Any]:
    return rng.sample(items, len(items))
