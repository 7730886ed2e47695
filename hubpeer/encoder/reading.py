"""What a document is about: its parts compared with the categories' definitions, beside the words the rules look for.

Three things speak for a category: the document is like its definition, it holds its words (`hubpeer.taxonomy`), and, for the
categories we ship, a linear head learned from examples says so. An operator's own taxonomy does without the third and needs no
training. The rules find names and the markers of sensitivity; where there is no marker, a second head decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np

from hubpeer import taxonomy
from hubpeer.encoder.decide import Calibration, shares
from hubpeer.encoder.network import Floats, unit
from hubpeer.model import DocAsk
from hubpeer.taxonomy import Taxonomy
from hubpeer.wire import Categorization, Sensitivity

Encode: TypeAlias = Callable[[list[str]], Floats]

#: A part is about as much as the network reads at once, in characters.
PART: Final = 450
#: Parts read of a document, however long it is: the beginning, and from there to the end in even steps.
PARTS: Final = 10
_sentence = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


class Heads(NamedTuple):
    """What linear heads make of a document's vector with a one behind it: (width + 1, labels), and the labels."""

    category: Floats
    categories: list[str]
    sensitivity: Floats
    sensitivities: list[Sensitivity]


def no_heads(width: int) -> Heads:
    return Heads(np.zeros((width + 1, 0), np.float32), [], np.zeros((width + 1, 0), np.float32), [])


def parts(text: str) -> list[str]:
    """Stretches of a text to read, the beginning most of all."""
    pieces = [text[n : n + PART] for n in range(0, len(text), PART) if text[n : n + PART].strip()]
    if len(pieces) <= PARTS:
        return pieces
    head, rest = pieces[: PARTS // 2], pieces[PARTS // 2 :]
    return [*head, *(rest[n * len(rest) // (PARTS - len(head))] for n in range(PARTS - len(head)))]


def evidence(vectors: Floats, rules: Categorization, known: Taxonomy, encode: Encode, heads: Heads) -> Floats:
    """What speaks for each category of a taxonomy: its definition, its words and, where it is the one we ship, the head, as
    (3 or 2, categories)."""
    near = vectors @ encode(meanings(known)).T
    found = {str(other["category"]): float(other["score"]) for other in rules.alternatives}
    found[rules.category] = max(0.0, 1 - sum(found.values())) if rules.confidence else 0.0
    speaks = [0.5 * near.mean(0) + 0.5 * near.max(0), np.array([found.get(name, 0.0) for name in known])]
    if shipped(known) and set(known) <= set(heads.categories):
        learned = extended(whole(vectors)) @ heads.category
        speaks.append(learned[[heads.categories.index(name) for name in known]])
    return np.array(speaks, np.float32)


def meanings(known: Taxonomy) -> list[str]:
    """What of each category is compared with a document."""
    return [f"{name.replace('_', ' ')}: {category.definition}" for name, category in known.items()]


def shipped(known: Taxonomy) -> bool:
    """Whether these are categories of ours, meant as we mean them."""
    return all(name in taxonomy.DEFAULT and taxonomy.DEFAULT[name].definition == c.definition for name, c in known.items())


def extended(vector: Floats) -> Floats:
    """With a one behind it."""
    return np.append(vector, np.float32(1))


def whole(vectors: Floats) -> Floats:
    """A document's one vector."""
    return unit(vectors.mean(0))


def categorize(ask: DocAsk, encode: Encode, known: Encode, heads: Heads, fitted: Calibration) -> Categorization:
    """The category most speaks for, with summary, sensitivity and names. `known` encodes what comes again and again."""
    rules = taxonomy.by_rules(ask.text, ask.title, ask.filename, ask.headings, ask.taxonomy, ask.agents)
    fitting = {name: c for name, c in ask.taxonomy.items() if name != taxonomy.OTHER} or ask.taxonomy
    about = " ".join(filter(None, [ask.title, re.sub(r"[_\-.]+", " ", ask.filename), *ask.headings[:8]]))
    read = parts(ask.text)
    if not fitting or not read:
        return rules
    vectors = encode([*read, about] if about else read)
    speaks = evidence(vectors, rules, fitting, known, heads)
    worth = np.array(fitted.category if len(speaks) == 3 else fitted.own_category)
    found = shares(dict(zip(fitting, (worth @ speaks).tolist(), strict=True)))
    ranked = sorted(found, key=lambda name: -found[name])
    return msgspec.structs.replace(
        rules,
        category=ranked[0],
        confidence=round(found[ranked[0]], 3),
        summary=_summary(ask.text, vectors, encode) or rules.summary,
        sensitivity=rules.sensitivity if rules.sensitivity != "internal" else _sensitivity(whole(vectors), heads),
        relevant_agents=[agent for agent in ask.agents if agent in fitting[ranked[0]].agents],
        method="builtin_encoder",
        alternatives=[{"category": name, "score": round(found[name], 3)} for name in ranked[1:4]],
        read_chars=sum(map(len, read)),
    )


def _sensitivity(vector: Floats, heads: Heads) -> Sensitivity:
    """What the head says; "internal" without one."""
    if not heads.sensitivities:
        return "internal"
    return heads.sensitivities[int((extended(vector) @ heads.sensitivity).argmax())]


def _summary(text: str, vectors: Floats, encode: Encode) -> str:
    """The two sentences of the beginning that are most like the document as a whole, in their order."""
    sentences = [s for raw in _sentence.split(text[:4000]) if 30 <= len(s := " ".join(raw.split())) <= 190]
    sentences = list(dict.fromkeys(sentences))[:12]
    if not sentences:
        return ""
    near = encode(sentences) @ whole(vectors)
    return " ".join(sentences[n] for n in sorted(np.argsort(-near)[:2].tolist()))
