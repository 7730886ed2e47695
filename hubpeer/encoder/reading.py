"""What a document is about: its parts compared with the categories' definitions, beside the words the rules look for.

Three things speak for a category: the document is like its definition, it holds its words (`hubpeer.taxonomy`), and, for the
categories we ship, it is like the examples of it that we wrote. An operator's own taxonomy does without the third and needs no
training. The rules find names and the markers of sensitivity; where there is no marker, the nearest examples decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

import msgspec
import numpy as np

from hubpeer import taxonomy
from hubpeer.encoder.decide import Calibration, shares
from hubpeer.encoder.network import Floats
from hubpeer.model import DocAsk
from hubpeer.taxonomy import Taxonomy
from hubpeer.wire import Categorization, Sensitivity

Encode: TypeAlias = Callable[[list[str]], Floats]

#: A part is about as much as the network reads at once, in characters.
PART: Final = 450
#: Parts read of a document, however long it is: the beginning, and from there to the end in even steps.
PARTS: Final = 10
_sentence = re.compile(r"(?<=[.!?])\s+|\n\s*\n")


class Examples(NamedTuple):
    """Documents of known kind, as vectors, with category and sensitivity."""

    vectors: Floats
    labels: list[tuple[str, Sensitivity]]


def parts(text: str) -> list[str]:
    """Stretches of a text to read, the beginning most of all."""
    pieces = [text[n : n + PART] for n in range(0, len(text), PART) if text[n : n + PART].strip()]
    if len(pieces) <= PARTS:
        return pieces
    head, rest = pieces[: PARTS // 2], pieces[PARTS // 2 :]
    return [*head, *(rest[n * len(rest) // (PARTS - len(head))] for n in range(PARTS - len(head)))]


def evidence(vectors: Floats, rules: Categorization, known: Taxonomy, encode: Encode, examples: Examples) -> Floats:
    """What speaks for each category of a taxonomy, as (3, categories): its definition, its words, its examples."""
    near = vectors @ encode([f"{name.replace('_', ' ')}: {category.definition}" for name, category in known.items()]).T
    found = {str(other["category"]): float(other["score"]) for other in rules.alternatives}
    found[rules.category] = max(0.0, 1 - sum(found.values())) if rules.confidence else 0.0
    shipped = all(name in taxonomy.DEFAULT and taxonomy.DEFAULT[name].definition == c.definition for name, c in known.items())
    alike = examples.vectors @ whole(vectors)
    by_example = [
        float(np.sort(alike[of])[-2:].mean())
        if shipped and (of := [n for n, (category, _) in enumerate(examples.labels) if category == name])
        else 0.0
        for name in known
    ]
    words = [found.get(name, 0.0) for name in known]
    return np.array([0.5 * near.mean(0) + 0.5 * near.max(0), words, by_example], np.float32)


def whole(vectors: Floats) -> Floats:
    """A document's one vector."""
    mean: Floats = vectors.mean(0)
    return mean / np.float32(np.linalg.norm(mean) + 1e-9)


def categorize(ask: DocAsk, encode: Encode, known: Encode, examples: Examples, fitted: Calibration) -> Categorization:
    """The category most speaks for, with summary, sensitivity and names. `known` encodes what comes again and again."""
    rules = taxonomy.by_rules(ask.text, ask.title, ask.filename, ask.headings, ask.taxonomy, ask.agents)
    fitting = {name: c for name, c in ask.taxonomy.items() if name != taxonomy.OTHER} or ask.taxonomy
    about = " ".join(filter(None, [ask.title, re.sub(r"[_\-.]+", " ", ask.filename), *ask.headings[:8]]))
    read = parts(ask.text)
    if not fitting or not read:
        return rules
    vectors = encode([*read, about] if about else read)
    speaks = evidence(vectors, rules, fitting, known, examples)
    found = shares(dict(zip(fitting, (np.array(fitted.category) @ speaks).tolist(), strict=True)))
    ranked = sorted(found, key=lambda name: -found[name])
    return msgspec.structs.replace(
        rules,
        category=ranked[0],
        confidence=round(found[ranked[0]], 3),
        summary=_summary(ask.text, vectors, encode) or rules.summary,
        sensitivity=rules.sensitivity if rules.sensitivity != "internal" else _sensitivity(whole(vectors), examples),
        relevant_agents=[agent for agent in ask.agents if agent in fitting[ranked[0]].agents],
        method="builtin_encoder",
        alternatives=[{"category": name, "score": round(found[name], 3)} for name in ranked[1:4]],
        read_chars=sum(map(len, read)),
    )


def _sensitivity(vector: Floats, examples: Examples) -> Sensitivity:
    """That of the examples most like the document, the near ones counting most."""
    votes: dict[Sensitivity, float] = {"internal": 1e-6}
    for (_, sensitivity), alike in zip(examples.labels, (examples.vectors @ vector).tolist(), strict=True):
        votes[sensitivity] = votes.get(sensitivity, 0.0) + float(np.exp(12 * (alike - 1)))
    return max(votes, key=votes.__getitem__)


def _summary(text: str, vectors: Floats, encode: Encode) -> str:
    """The two sentences of the beginning that are most like the document as a whole, in their order."""
    sentences = [s for raw in _sentence.split(text[:4000]) if 30 <= len(s := " ".join(raw.split())) <= 190]
    sentences = list(dict.fromkeys(sentences))[:12]
    if not sentences:
        return ""
    near = encode(sentences) @ whole(vectors)
    return " ".join(sentences[n] for n in sorted(np.argsort(-near)[:2].tolist()))
