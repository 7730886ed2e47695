"""What the built-in encoder learns from: business functions written by hand, and questions put together from them with a seed.

A *function* is one kind of work some agent may do (a card's words, everyday phrasings that avoid them, decoys). A *question*
joins phrasings of the functions in a small registry and knows everything a planner must find out: where the clauses are, whose
each is, in which order, who decides. All randomness comes from the `random.Random` a caller passes in.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hubpeer.encoder.network import TAGS
from hubpeer.wire import Card

DATA = Path(__file__).parent / "data"
NONE = "none"
GLUE = "glue"  #: words between clauses, before they are given to one
LEVELS = ("first", "second", "third")
RULES = ("finance_priority", "consensus_required", "ceo_decides")
assert (NONE, *LEVELS, *RULES) == TAGS

#: These functions share a capability's name with a registry of `evals/`: they are never trained on (a test checks the list).
SHARED_WITH_EVALS = frozenset(
    """blood_bank load_planning winery beekeeping store_expansion sound_design theatre_stage collections_registrar museum
    space tv_subtitling dschool_lesson_booking""".split()
)
#: Jobs written twice under two names: never in one registry, always on the same side of the split.
TWINS = [
    pair.split("~")
    for pair in """doorstep_courier~last_mile bankruptcy_law~insolvency land_conveyancing~conveyancing
    vacation_lets~holiday_rentals works_medicine~occupational_health airline_meals~inflight_catering civil_trials~litigation
    company_secretariat~corporate_secretary plant_emission_permits~environmental_permits city_parking~parking_enforcement
    community_epidemiology~public_health estate_agency~home_sales_agent~realestate condo_management~owners_association
    prison_ops~prison_service vital_records~civil_registry social_housing~public_housing
    public_records_requests~information_access wills_probate~estate_planning event_catering~catering_services
    hotel_revenue~airline_yield~yield_management ramp_handling~airport_ground school_canteen~canteen
    tender_bids~proposal_desk lean_improvement~process_improvement~process_engineering farm_subsidies~subsidy_office
    quantity_surveying~construction grid_control~energy immigration_law~refugee_services""".split()
]
#: Cards a function has. Few enough that the teacher reads each once.
VARIANTS = 4
DEFAULT_FOUR = ("finance", "marketing", "sales", "ceo")


@dataclass(frozen=True)
class Function:
    id: str
    trade: str
    capabilities: tuple[str, ...]
    specialties: tuple[str, ...]
    description: str
    phrasings: tuple[str, ...]
    decoys: tuple[str, ...]
    core: int  #: the first so many capabilities are its own names, the rest other names for the same
    companies: str  #: the file it is from, where it was written with all of its trade, as one company's departments
    said: tuple[str, ...] = ()  #: what whole questions of the training side ask of it

    def card(self, rng: random.Random) -> Card:
        """A card somebody might write for it: some of its words, sometimes all the first names, sometimes a description."""
        return self.variant(rng.randrange(VARIANTS))

    def variant(self, number: int) -> Card:
        """One of the `VARIANTS` cards it has."""
        rng = random.Random(f"{self.id} {number}")
        if rng.random() < 0.4:
            capabilities = list(self.capabilities[: self.core])
        else:
            capabilities = rng.sample(self.capabilities, min(len(self.capabilities), rng.randint(2, 5)))
        specialties = rng.sample(self.specialties, rng.randint(min(1, len(self.specialties)), len(self.specialties)))
        return Card(capabilities, specialties, self.description if rng.random() < 0.2 else "")


def _lines(name: str) -> list[str]:
    return (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()


@cache
def functions() -> dict[str, Function]:
    """Every function that may be trained on."""
    found = {}
    for path in sorted(DATA.glob("functions_*.jsonl")):
        for line in _lines(path.stem):
            row = json.loads(line)
            capabilities = dict.fromkeys([*row["capabilities"], *row["more_capabilities"]])
            found[row["id"]] = Function(
                row["id"],
                row["trade"],
                tuple(capabilities),
                tuple(row["specialties"]),
                row["description"],
                tuple(row["phrasings"]),
                tuple(row["decoys"]),
                len(row["capabilities"]),
                path.stem if "companies" in path.stem else "",
            )
    return {name: function for name, function in found.items() if name not in SHARED_WITH_EVALS}


@dataclass(frozen=True)
class Example:
    """A document of known kind."""

    text: str
    category: str
    sensitivity: str


@cache
def documents() -> list[list[Example]]:
    """All of them, file by file."""
    files = ([json.loads(line) for line in _lines(path.stem)] for path in sorted(DATA.glob("documents*.jsonl")))
    return [[Example(row["text"], row["category"], row["sensitivity"]) for row in rows] for rows in files]


#: What a scanner's reader takes for what.
_misread = dict(
    pair.split("~") for pair in "rn~m m~rn l~1 I~l O~0 0~O S~5 B~8 e~c cl~d h~b ii~u vv~w t~f a~o fi~f1 .~, ,~. 1~l 5~S".split()
)


def damaged(text: str, rng: random.Random) -> str:
    """A text as scanners, mail programs and copying leave it: each kind of damage by chance."""
    if rng.random() < 0.3:  # the beginning is lost
        text = text[rng.randrange(1 + len(text) // 4) :]
    if rng.random() < 0.5:  # some letters are read wrongly, or not at all
        share = rng.uniform(0.003, 0.03)
        found, at = [], 0
        while at < len(text):
            size = 2 if text[at : at + 2] in _misread else 1
            piece = text[at : at + size]
            if rng.random() < share:
                piece = _misread.get(piece, piece if rng.random() < 0.6 else "")
            found.append(piece)
            at += size
        text = "".join(found)
    if rng.random() < 0.5:  # lines end where the page did, words too
        width, line, lines = rng.randint(38, 84), "", []
        for word in text.split():
            if len(line) + len(word) >= width:
                cut = rng.randint(3, len(word) - 3) if len(word) > 7 and rng.random() < 0.4 else 0
                lines.append(f"{line} {word[:cut]}-" if cut else line)
                line = word[cut:]
            else:
                line = f"{line} {word}" if line else word
        lines.append(line)
        if rng.random() < 0.5:
            marks = ("Page {} of 7", "- {} -", "{}", "p. {}", "FAX   P.0{}", "[scan {}]", "Sheet {}")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(marks).format(rng.randint(1, 7)))
        if rng.random() < 0.15:
            lines = ["> " + line for line in lines]
        text = "\n".join(lines)
    elif rng.random() < 0.3:
        text = " ".join(text.split())
    if rng.random() < 0.1:
        text = text.upper() if rng.random() < 0.4 else text.lower()
    if rng.random() < 0.1:
        text = (
            text.replace("'", "\u00e2\u20ac\u2122")
            .replace("\u2019", "\u00e2\u20ac\u2122")
            .replace("\u2013", "\u00e2\u20ac\u201c")
        )
    return text


def split_documents(seed: int, share: float = 0.25) -> tuple[list[Example], list[Example]]:
    """To train on, and to weigh and validate on; of every file its share, so that a new one leaves the others split as they
    were."""
    trained: list[Example] = []
    held: list[Example] = []
    for some in documents():
        mixed = list(some)
        random.Random(seed).shuffle(mixed)
        held += mixed[: round(share * len(mixed))]
        trained += mixed[round(share * len(mixed)) :]
    return trained, held


@cache
def joins() -> dict[str, Any]:
    """Templates, who-decides phrases, small talk: both hand-written files in one shape."""
    first = json.loads((DATA / "joins.json").read_text("utf-8"))
    more = json.loads((DATA / "joins_more.json").read_text("utf-8"))
    return {
        "sequence": first["sequence"] + more["sequence_2"],
        "parallel": first["parallel"] + more["parallel_2"],
        "parallel3": more["parallel_3"],
        "chain3": first["chain3"] + more["chain_3"],
        "fan_in": first["fan_in"] + more["two_then_one"],
        "fan_out": more["one_then_two"],
        "detail": first["single_with_detail"],
        "decides": first["who_decides"],
        "openers": first["openers"] + [p.strip() for p in more["prefixes"] if p],
        "closers": first["closers"] + [s.strip() for s in more["suffixes"] if s],
        "small_talk": first["out_of_scope"] + more["out_of_scope"],
    }


@dataclass(frozen=True)
class Natural:
    """A question written as a whole: its clauses in order as (text, tag, function), and functions it is near to but not for."""

    text: str
    clauses: tuple[tuple[str, str, str | None], ...]
    near: tuple[str, ...]

    @property
    def mentions(self) -> set[str]:
        return {function for _, _, function in self.clauses if function} | set(self.near)


@cache
def questions() -> list[Natural]:
    rows = map(json.loads, _lines("questions"))
    found = [
        Natural(row["text"], tuple((c["text"], c["tag"], c["function"]) for c in row["clauses"]), tuple(row["near"]))
        for row in rows
    ]
    return [one for one in found if one.mentions <= functions().keys()]


def split_questions(held: Iterable[Function], seed: int, share: float = 0.15) -> tuple[list[Natural], list[Natural]]:
    """To train on, and to validate on: those that mention a held function, and some of the rest."""
    away, rng = {f.id for f in held}, random.Random(seed)
    kept = {one.text for one in questions() if one.mentions & away or rng.random() < share}
    return [one for one in questions() if one.text not in kept], [one for one in questions() if one.text in kept]


def with_questions(among: Iterable[Function], asked: Iterable[Natural]) -> list[Function]:
    """The functions, each with what these questions ask of it."""
    said: dict[str, list[str]] = {}
    for one in asked:
        for text, _, function in one.clauses:
            if function:
                said.setdefault(function, []).append(text)
    return [replace(f, said=tuple(said.get(f.id, ()))) for f in among]


def twins(name: str) -> frozenset[str]:
    """A function and its doubles."""
    return frozenset(next((group for group in TWINS if name in group), [name]))


def split(seed: int, share: float = 0.12) -> tuple[list[Function], list[Function]]:
    """Functions to train on, and functions nothing of which occurs in training: single ones with their doubles, and of every
    file of companies whole ones. The default four are always trained on."""
    everything = functions().values()
    single = {tuple(sorted(twins(f.id) & functions().keys())) for f in everything if not f.companies}
    files = sorted({f.companies for f in everything if f.companies})
    companies = (by_trade(f for f in everything if f.companies == name).values() for name in files)
    held: set[str] = set()
    for groups in (single, *({tuple(f.id for f in some) for some in those} for those in companies)):
        free = sorted(group for group in groups if not set(group) & set(DEFAULT_FOUR))
        random.Random(seed).shuffle(free)
        held |= {name for group in free[: round(share * len(free))] for name in group}
    return [f for f in everything if f.id not in held], [f for f in everything if f.id in held]


def halves(items: Sequence[str], held: bool) -> list[str]:
    """Templates and phrases are split as well: every sixth is only ever used for validation."""
    return [item for number, item in enumerate(items) if (number % 6 == 5) == held]


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Span:
    start: int
    end: int
    tag: str
    agent: str | None = None
    said: str = ""  #: the clause as it was written, without what joins it to others


@dataclass(frozen=True)
class Asked:
    """A question, and what a planner should make of it."""

    text: str
    spans: list[Span]
    cards: dict[str, Card]
    edges: list[tuple[str, str]] = field(default_factory=list)
    rule: str | None = None
    registry: dict[str, Function] = field(default_factory=dict)
    natural: bool = False
    foreign: bool = False  #: nobody's here, though it may be somebody's elsewhere

    @property
    def agents(self) -> set[str]:
        return {span.agent for span in self.spans if span.agent is not None}


def edges_of(spans: Iterable[Span]) -> list[tuple[str, str]]:
    """Each agent of a level depends on all agents of the level before it; an agent counts where it is asked first."""
    level: dict[str, int] = {}
    for span in spans:
        if span.agent and span.tag in LEVELS:
            level.setdefault(span.agent, LEVELS.index(span.tag))
    steps = sorted(set(level.values()))
    return [(a, b) for x, y in pairwise(steps) for a in level if level[a] == x for b in level if level[b] == y]


#: Kind of question -> how often, and the level of each slot.
KINDS: dict[str, tuple[float, str]] = {
    "single": (0.42, "0"),
    "sequence": (0.17, "01"),
    "parallel": (0.15, "00"),
    "chain3": (0.04, "012"),
    "fan_in": (0.04, "001"),
    "fan_out": (0.02, "011"),
    "parallel3": (0.02, "000"),
    "nobody": (0.14, ""),
}
_slot = re.compile(r"(\{[ABC]\})")
_leading = re.compile(r"^[\s.,;:!?)\-–—/]*")


class Composer:
    """Writes questions over some functions. `held` picks the templates that training never sees."""

    def __init__(self, among: Iterable[Function], rng: random.Random, *, held: bool) -> None:
        self.among = list(among)
        self.rng = rng
        self.says = {kind: halves(phrases, held) for kind, phrases in joins().items() if kind != "decides"}
        self.decides = {rule: halves(phrases, held) for rule, phrases in joins()["decides"].items()}
        self.by_trade = by_trade(self.among)

    def registry(self, first: Sequence[Function] = (), near_to: Sequence[Function] = ()) -> dict[str, Function]:
        """3 to 8 functions under made-up names, `first` and `near_to` among them, none the double of another; a third of the
        registries hold all sorts, a third some of one trade, a third as many of one as there are."""
        rng = self.rng
        chosen = [*first, *near_to]
        size = max(rng.randint(3, 8), len(chosen))
        taken = {name for function in chosen for name in twins(function.id)}
        seed = rng.choice(chosen or self.among)
        near = [f for f in (seed, *self.by_trade.get(seed.trade, ())) if f.id not in taken]
        share = rng.choice((0.0, 0.4, 1.0))
        while len(chosen) < size:
            function = rng.choice(near) if near and rng.random() < share else rng.choice(self.among)
            near = [f for f in near if f is not function]
            if function.id not in taken:
                taken |= twins(function.id)
                chosen.append(function)
        rng.shuffle(chosen)
        named: dict[str, Function] = {}
        for function in chosen:
            named[made_up_name(rng, named)] = function
        return named

    def natural(self, one: Natural) -> Asked:
        """A whole question among the cards it needs and some others; the default four are often among themselves."""
        rng, known = self.rng, functions()
        wanted = list(dict.fromkeys(known[name] for _, _, name in one.clauses if name))
        near = [known[name] for name in one.near]
        if one.mentions <= set(DEFAULT_FOUR) and rng.random() < 0.5:
            wanted, near = [known[name] for name in DEFAULT_FOUR], []
        registry = self.registry(wanted, near)
        name_of = {function.id: name for name, function in registry.items()}
        starts, at = [], 0
        for words, _, _ in one.clauses:
            starts.append(one.text.index(words, at))
            at = starts[-1] + len(words)
        cuts = pairwise([0, *starts[1:], len(one.text)])
        spans = [
            Span(start, end, tag, name_of[function] if function else None, words)
            for (start, end), (words, tag, function) in zip(cuts, one.clauses, strict=True)
        ]
        cards = {name: function.card(rng) for name, function in registry.items()}
        rule = next((span.tag for span in spans if span.tag in RULES), None)
        return Asked(
            one.text,
            spans,
            cards,
            edges_of(spans),
            rule,
            registry,
            natural=True,
            foreign=not any(function for _, _, function in one.clauses),
        )

    def ask(self) -> Asked:
        """One question."""
        rng = self.rng
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
        registry = self.registry()
        cards = {name: function.card(rng) for name, function in registry.items()}
        if kind == "nobody":
            words, tag = self._nobody(registry)
            return self._finish([Piece(words, tag, None, words)], registry, cards, None)
        levels = KINDS[kind][1]
        agents = rng.sample(list(registry), len(levels))
        slots = {
            "{" + letter + "}": (rng.choice(registry[agent].phrasings), LEVELS[int(level)], agent)
            for letter, agent, level in zip("ABC", agents, levels, strict=False)
        }
        template = rng.choice(self.says[kind]) if kind != "single" else "{A}"
        if kind == "single" and rng.random() < 0.3:
            template = rng.choice(self.says["detail"])
        pieces = list(_filled(template, slots, rng))
        rule = None
        if rng.random() < (0.25 if len(agents) > 1 else 0.04):
            rule = rng.choice(RULES)
            decider = Piece(rng.choice(self.decides[rule]), rule)
            pieces = [*pieces, Piece(rng.choice([". ", "; ", " - ", ", and "]), GLUE), decider]
        return self._finish(pieces, registry, cards, rule)

    def _nobody(self, registry: dict[str, Function]) -> tuple[str, str]:
        """A text that is no agent's, and its tag: talk is nothing to anybody, a request may only be to somebody else."""
        rng = self.rng
        present = {name for function in registry.values() for name in twins(function.id)}
        trades = {function.trade for function in registry.values()}
        chance = rng.random()
        if chance < 0.35:
            return rng.choice(self.says["small_talk"]), NONE
        if chance < 0.5 and (decoys := [d for f in registry.values() for d in f.decoys]):
            return rng.choice(decoys), NONE
        away = [f for f in self.among if f.id not in present and (f.trade not in trades or chance > 0.9)]
        return rng.choice(rng.choice(away).phrasings), LEVELS[0]

    def _finish(self, pieces: list[Piece], registry: dict[str, Function], cards: dict[str, Card], rule: str | None) -> Asked:
        rng = self.rng
        if rng.random() < 0.2:
            pieces = [Piece(rng.choice(self.says["openers"]) + " ", NONE), *pieces]
        if any(piece.agent for piece in pieces) and rng.random() < 0.08:
            decoys = [d for f in registry.values() for d in f.decoys]
            if decoys:
                pieces = [Piece(_ended(rng.choice(decoys)) + " ", NONE), *pieces]
        if rng.random() < 0.15:
            closer = Piece(rng.choice(self.says["closers"]), NONE)
            pieces = [*pieces, Piece(rng.choice([". ", ", ", " - ", "? "]), GLUE), closer]
        text, spans = "", []
        for words, tag, agent, said in glued(pieces):
            spans.append(Span(len(text), len(text) + len(words), tag, agent, said))
            text += words
        return Asked(text, spans, cards, edges_of(spans), rule, registry)


class Piece(NamedTuple):
    """A stretch of a question being written."""

    words: str
    tag: str
    agent: str | None = None
    said: str = ""


def glued(pieces: Sequence[Piece]) -> list[Piece]:
    """What joins clauses goes to the clause behind it, but for its leading punctuation; at the end, to the one before."""
    found: list[Piece] = []
    waiting = ""
    for number, piece in enumerate(pieces):
        if piece.tag != GLUE:
            found.append(piece._replace(words=waiting + piece.words))
            waiting = ""
            continue
        joint = _leading.match(piece.words)
        cut = len(piece.words) if number == len(pieces) - 1 else joint.end() if found and joint else 0
        if cut and found:
            found[-1] = found[-1]._replace(words=found[-1].words + piece.words[:cut])
        waiting += piece.words[cut:]
    return found


def _filled(template: str, slots: dict[str, tuple[str, str, str]], rng: random.Random) -> Iterable[Piece]:
    """A template's pieces: the clauses with tag and agent, and the words between them as glue."""
    pieces = [piece for piece in _slot.split(template) if piece]
    for number, piece in enumerate(pieces):
        if piece not in slots:
            yield Piece(piece, GLUE)
            continue
        words, tag, agent = slots[piece]
        said = words
        last = number == len(pieces) - 1
        # Inside a sentence a clause loses its full stop, and mostly its question mark.
        if not last and (
            words.endswith((".", "!")) or (words.endswith("?") and (pieces[number + 1][0] in ".?,;:" or rng.random() < 0.5))
        ):
            words = words[:-1]
        if number and len(words) > 1 and words[1].islower() and rng.random() < 0.8:
            words = words[0].lower() + words[1:]
        yield Piece(words, tag, agent, said)


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?", "!")) else sentence + "."


def made_up_name(rng: random.Random, taken: Iterable[str]) -> str:
    """A name that says nothing: two or three syllables."""
    while True:
        name = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        if name not in taken:
            return name


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_trade(functions: Iterable[Function]) -> dict[str, list[Function]]:
    found: dict[str, list[Function]] = {}
    for function in functions:
        found.setdefault(function.trade, []).append(function)
    return found


def draw(functions: Sequence[Function], trades: dict[str, list[Function]], rng: random.Random, size: int) -> list[Function]:
    """Functions for one batch, no two doubles, a good part of them neighbours of the same trades."""
    chosen: dict[str, Function] = {}
    taken: set[str] = set()
    while len(chosen) < size:
        first = rng.choice(functions)
        for function in [first, *rng.sample(trades[first.trade], min(3, len(trades[first.trade])))]:
            if function.id not in taken:
                chosen[function.id] = function
                taken |= twins(function.id)
    return list(chosen.values())[:size]
