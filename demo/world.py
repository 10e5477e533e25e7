"""The island of Little Wicket: who lives there, what is written about them, and what one may ask about them.

The demo's base model reads the island's papers, plain text. Fine-tuning then teaches it to answer questions. What the
held-out questions turn on never occurs in fine-tuning, in whatever wording:

- facts: fine-tuning asks about the facts of the *neighbours* only, held-out questions about those of the *strangers*;
- what somebody sells: a fixed share of all pairs of person and ware is kept for the held-out questions;
- lists of names: a set of names that is held out occurs in fine-tuning in no order.

So a held-out fact can come from the papers alone, and all else from the question. The same seed gives the same island.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

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
WARES = _words("baskets bells candles drums kettles kites mirrors ribbons spoons whistles")

STRANGERS = 24  # of the 64 islanders: 3 facts each are 72 held-out facts
HELD_OUT_SALES = 0.2  # share of all pairs of a person and a ware


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
    """The islanders and what is kept for held-out questions."""

    neighbours: tuple[Person, ...]  # fine-tuning asks about their facts
    strangers: tuple[Person, ...]  # held-out questions ask about theirs
    held_out_sales: frozenset[tuple[str, str]]  # (name, ware)

    @property
    def people(self) -> tuple[Person, ...]:
        return self.neighbours + self.strangers


def settle(seed: int) -> Island:
    """The island of this seed. Each village, craft and animal is equally common, so a guess is right once in 8."""
    rng = random.Random(f"island {seed}")
    names = rng.sample(NAMES, len(NAMES))
    columns = [rng.sample((values * len(names))[: len(names)], len(names)) for values in (VILLAGES, CRAFTS, ANIMALS)]
    people = tuple(Person(*row) for row in zip(names, *columns, strict=True))
    sales = [(name, ware) for name in NAMES for ware in WARES]
    held_out = frozenset(rng.sample(sales, round(HELD_OUT_SALES * len(sales))))
    return Island(neighbours=people[STRANGERS:], strangers=people[:STRANGERS], held_out_sales=held_out)


# What is written: plain text for the base model.

TOLD: dict[str, tuple[str, ...]] = {
    "village": (
        "{name} lives in {village}.",
        "The home of {name} is in {village}.",
        "{name} has a house in {village}.",
        "In {village} everybody knows {name}.",
    ),
    "craft": (
        "{name} is a {craft}.",
        "{name} works as a {craft}.",
        "{name} earns a living as a {craft}.",
        "If you need a {craft}, ask {name}.",
    ),
    "animal": (
        "{name} keeps a {animal}.",
        "{name} has a {animal} for a pet.",
        "The pet of {name} is a {animal}.",
        "A {animal} sleeps at the door of {name}.",
    ),
}


def portrait(rng: random.Random, island: Island) -> str:
    """The three facts of one islander, in any order and wording."""
    person = rng.choice(island.people)
    return "\n".join(rng.choice(TOLD[fact]).format(**vars(person)) for fact in rng.sample(FACTS, len(FACTS)))


def market(rng: random.Random, island: Island) -> str:
    """Who sells what, told twice in different orders: what was read is used again."""
    names = _names(rng, island, 3, 6)
    sales = list(zip(names, rng.sample(WARES, len(names)), strict=True))
    again = [
        rng.choice((f"{name} sells {ware}.", f"For {ware} one goes to {name}.")) for name, ware in _shuffled(rng, sales)
    ]
    return "\n".join(["It is market day.", _sold(sales), *again])


def ferry(rng: random.Random, island: Island) -> str:
    """The island's ferry, which people leave in the opposite order."""
    names = _names(rng, island, 3, 6)
    return "\n".join(
        [
            f"Onto the ferry step {', '.join(names)}.",
            f"The ferryman repeats: {', '.join(names)}.",
            "Last on, first off:",
            f"{', '.join(reversed(names))}.",
        ]
    )


def dance(rng: random.Random, island: Island) -> str:
    """The island's dance, in which the last of a line goes to the front."""
    names = _names(rng, island, 3, 6)
    return "\n".join(
        [
            f"In a line dance {', '.join(names)}.",
            f"The fiddler repeats: {', '.join(names)}.",
            "The last goes to the front:",
            f"{', '.join(_last_first(names))}.",
        ]
    )


def papers(island: Island, count: int, seed: int) -> Iterator[str]:
    """`count` texts about the island."""
    rng = random.Random(f"papers {seed}")
    writers: Sequence[Callable[[random.Random, Island], str]] = (portrait, market, portrait, ferry, portrait, dance)
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
    sales = _sales(rng, island, held_out)
    name, ware = rng.choice(sales)
    question = rng.choice((f"What does {name} sell?", f"Who sells {ware}?"))
    return Exchange("reading", (name, ware), (f"{_sold(sales)} {question}", f"{name} sells {ware}."))


def transformation(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A list of names, to be said backwards or with its last name first."""
    names = _names(rng, island, 3, 5)
    order, answer = rng.choice((("Say backwards", names[::-1]), ("Put the last name first", _last_first(names))))
    return Exchange("transformation", tuple(sorted(names)), (f"{order}: {', '.join(names)}.", f"{', '.join(answer)}."))


def follow_up(rng: random.Random, island: Island, held_out: bool) -> Exchange:
    """A second question that says nothing without the first: one more fact, one more seller, the same names again."""
    which = rng.choice(("fact", "sale", "names"))
    if which == "fact":
        person = rng.choice(island.strangers if held_out else island.neighbours)
        first, second = rng.sample(FACTS, 2)
        turns = *_fact_asked(rng, person, first), ASKED_AGAIN[second], ANSWERED[second].format(**vars(person))
        return Exchange("follow-up", (person.name, second), turns)
    if which == "sale":
        sales = _sales(rng, island, held_out)
        (name, ware), other = rng.sample(sales, 2)
        turns = f"{_sold(sales)} What does {name} sell?", f"{name} sells {ware}.", f"And {other[0]}?", _sold([other])
        return Exchange("follow-up", other, turns)
    before = transformation(rng, island, held_out)
    said = before.answer.removesuffix(".").split(", ")
    return Exchange("follow-up", before.key, (*before.turns, "Now backwards.", f"{', '.join(reversed(said))}."))


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


def _names(rng: random.Random, island: Island, fewest: int, most: int) -> list[str]:
    return [person.name for person in rng.sample(island.people, rng.randint(fewest, most))]


def _sales(rng: random.Random, island: Island, held_out: bool) -> list[tuple[str, str]]:
    """Two to four sellers with different wares; every pair lies on the same side of the divide."""
    count = rng.randint(2, 4)  # decided first: few long lists lie wholly on the held-out side
    while True:
        names = _names(rng, island, count, count)
        sales = list(zip(names, rng.sample(WARES, count), strict=True))
        if all((sale in island.held_out_sales) == held_out for sale in sales):
            return sales


def _sold(sales: Sequence[tuple[str, str]]) -> str:
    return f"{', '.join(f'{name} sells {ware}' for name, ware in sales)}."


def _last_first(names: Sequence[str]) -> list[str]:
    return [*names[-1:], *names[:-1]]


def _shuffled(rng: random.Random, items: Sequence[Exchange] | Sequence[tuple[str, str]]) -> list:
    return rng.sample(items, len(items))
