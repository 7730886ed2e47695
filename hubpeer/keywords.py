"""The last rung of the routing ladder: the specification's keyword rule, mended. Pure.

Two mends against the specification: a keyword matches a word, not any substring ("onboarding" is not "board"), and the asker
is never handed its own question back, not even as the default agent. Agents the rule has no keywords for are found by the
words of their cards.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Final

from hubpeer.plan import Draft, DraftStep
from hubpeer.wire import Alternative, Card

#: In the specification's order, which is the order of a plan with several.
KEYWORDS: Final[dict[str, tuple[str, ...]]] = {
    "finance": ("budget", "cost", "revenue", "financial", "roi", "profit"),
    "marketing": ("campaign", "marketing", "customer", "acquisition", "conversion"),
    "sales": ("sales", "pipeline", "deal", "quota", "forecast"),
    "ceo": ("strategy", "board", "executive", "strategic", "competitive"),
}
#: What a keyword may end in and still be that keyword.
_ENDINGS: Final = ("", "s", "es", "ed", "d", "ing", "ly", "ally")
#: Another word, though it looks like a keyword with an ending.
_OTHER_WORDS: Final = frozenset({"boarding", "boarded", "dealing"})
#: Words of cards that say nothing about whose job it is.
_GENERAL: Final = frozenset(
    "analysis analytics planning management manager reporting review support service services development operations "
    "strategy data information and or of the for to in on a an with by from general other team work".split()
)
_word = re.compile(r"[^\W_]+")


def forms(keyword: str) -> frozenset[str]:
    """A keyword with its plural and simple endings: budget, budgets, budgeting, ...; strategy, strategies."""
    found = {keyword + ending for ending in _ENDINGS}
    if keyword.endswith("y"):
        found.add(keyword[:-1] + "ies")
    if keyword.endswith("e"):
        found.add(keyword[:-1] + "ing")
    return frozenset(found - _OTHER_WORDS)


_FORMS: Final = {agent: {form: k for k in words for form in forms(k)} for agent, words in KEYWORDS.items()}


def words(text: str) -> list[str]:
    return _word.findall(unicodedata.normalize("NFKC", text).casefold())


def card_words(card: Card) -> dict[str, str]:
    """Form -> word, for every telling word of a card."""
    telling = {w for name in (*card.capabilities, *card.specialties) for w in words(name.replace("_", " "))} - _GENERAL
    return {form: w for w in telling if len(w) > 2 for form in forms(w)}


def matches(query: str, cards: Mapping[str, Card]) -> dict[str, list[str]]:
    """Agent -> the keywords the query holds, in the specification's order, then by number of words matched."""
    said = words(query)
    found: dict[str, list[str]] = {}
    for agent, card in cards.items():
        table = _FORMS.get(agent) or card_words(card)
        hit = list(dict.fromkeys(table[w] for w in said if w in table))
        if hit:
            found[agent] = hit
    rank = {agent: number for number, agent in enumerate(KEYWORDS)}
    return dict(sorted(found.items(), key=lambda item: (rank.get(item[0], len(rank)), -len(item[1]), item[0])))


def draft(query: str, asker: str, cards: Mapping[str, Card], defaults: Sequence[str], max_agents: int) -> Draft | None:
    """A plan by keywords over `cards` (agents that may be asked). None: nothing matched and no default agent is left.

    One agent -> single; several -> a chain in the specification's order, `consensus_required`; none -> the first of
    `defaults` that can be asked and is not the asker, and the reasoning says so.
    """
    others = {name: card for name, card in cards.items() if name != asker}
    found = matches(query, others)
    if found:
        chosen = list(found)[:max_agents]
        reasoning = "Keywords matched: " + "; ".join(f"{a}: {', '.join(found[a])}" for a in chosen) + "."
    else:
        chosen = [name for name in defaults if name in others][:1]
        if not chosen:
            return None
        reasoning = f"No keyword matched; {chosen[0]} is the default agent."
        if asker in defaults and defaults.index(asker) < defaults.index(chosen[0]):
            reasoning += f" {asker} comes before it but asked the question itself."
    return Draft(
        agents=[
            DraftStep(
                agent=agent,
                task=f"Answer for {agent}: {query}",
                depends_on=[chosen[number - 1]] if number else [],
                data_needed=found.get(agent, []),
            )
            for number, agent in enumerate(chosen)
        ],
        conflict_resolution="consensus_required",
        reasoning=reasoning,
    )


def runners_up(query: str, cards: Mapping[str, Card]) -> list[Alternative]:
    """For an answer of `no_match`: who came nearest, by the share of the query's words found in the card."""
    said = set(words(query))
    scored = []
    for agent, card in cards.items():
        hit = said & {w for name in (*card.capabilities, *card.specialties) for w in words(name.replace("_", " "))}
        scored.append(Alternative(agent, round(len(hit) / max(1, len(said)), 3)))
    return sorted(scored, key=lambda a: (-a.score, a.agent))[:3]
