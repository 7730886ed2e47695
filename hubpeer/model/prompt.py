"""Between texts and tokens: the tokenizer with data kept apart from markers, and the prompt layouts."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import llguidance
import msgspec
from tokenizers import Tokenizer

from hubpeer.errors import SettingsError
from hubpeer.model.load import Shape


class Words:
    """The model's tokenizer.

    The tokenizer proper knows no special tokens at all, so `<|eot_id|>` in a query is nine letters and some signs. Markers of
    the layout are cut at their special tokens first; there is no second tokenizer for them, as one with the 280,000 merges of
    Llama 3 takes some 50 MiB.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        path = folder / "tokenizer.json"
        try:
            raw = path.read_text("utf-8")
            settings = json.loads(raw)
            self._special = {str(token["content"]): int(token["id"]) for token in settings.get("added_tokens") or []}
            bare = settings | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._plain = Tokenizer.from_str(json.dumps(bare))
        except OSError as exc:
            raise SettingsError(f"{path} cannot be read: {exc.strerror}") from exc
        except Exception as exc:  # the tokenizers package raises bare Exception for whatever is wrong with the file
            raise SettingsError(f"{path} is not a tokenizer this version can use: {exc}") from exc
        self.specials = frozenset(self._special.values())
        names = sorted(self._special, key=len, reverse=True)  # where one begins like another, the longer one is meant
        self._cut = re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")
        if max(self._plain.get_vocab_size() - 1, *self.specials, 0) >= shape.vocab:
            raise SettingsError(f"{path} has more tokens than config.json's vocab_size")
        self.stops = frozenset(shape.stops)
        if not self.stops:
            raise SettingsError(f"{folder}: neither config.json nor generation_config.json names an eos_token_id")
        self.compiled: dict[str, Any] = {}  # grammar -> its matcher, kept by `grammar.Line`
        # Without slices, which are made for JSON strings: our one grammar is as fast without them, and they take 56 MiB.
        self.grammar = llguidance.LLTokenizer(raw, n_vocab=shape.vocab, eos_token=sorted(self.stops), slices=[])

    def data(self, text: str) -> list[int]:
        """`text` as tokens, none of them special."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        # Second fence, for vocabularies that hold their special tokens as ordinary words too.
        return ids if self.specials.isdisjoint(ids) else [i for i in ids if i not in self.specials]

    def marker(self, text: str) -> list[int]:
        """A marker of the layout as tokens; special tokens in it must exist."""
        parts = self._cut.split(text)
        return [token for part in parts for token in ([self._special[part]] if part in self._special else self.data(part))]

    def text(self, ids: Iterable[int]) -> str:
        """Tokens as text, without special ones; half characters at the ends fall away."""
        decoded: str = self._plain.decode([i for i in ids if i not in self.specials])
        return decoded.strip("\ufffd")


class Chat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    begin: str
    system: str
    user: str
    answer: str
    end: str


class PlanTexts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    system: str
    card: str
    user: str
    context: str
    plan: str
    agent: str
    together: str
    then: str
    done: str
    rule: str
    needs: str
    all: str
    task: str
    data: str
    why: str
    task_tokens: int
    data_tokens: int
    why_tokens: int


Lines: TypeAlias = Annotated[list[str], msgspec.Meta(min_length=1)]


#: Leads of short texts that are written side by side.
Leads: TypeAlias = Annotated[list[str], msgspec.Meta(min_length=1)]


class DocumentTexts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    system: str
    category: str
    user: str
    left_out: str
    answer: str
    option: str
    sensitivity: str
    agent: str
    yes: str
    no: str
    summary: Leads
    entities: Leads
    summary_tokens: int
    entities_tokens: int


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every text the model is spoken to with; see layouts/llama3.toml."""

    chat: Chat
    plan: PlanTexts
    document: DocumentTexts


def read_layout(name: str, words: Words) -> Layout:
    """The layout `name`: one that is shipped, or a path. Raises `SettingsError` where it does not suit the tokenizer."""
    shipped = resources.files("hubpeer.model") / "layouts" / f"{name}.toml"
    source: Any = shipped if "/" not in name and shipped.is_file() else Path(name)
    try:
        layout = msgspec.convert(tomllib.loads(source.read_text("utf-8")), Layout)
    except OSError as exc:
        raise SettingsError(f"model.layout = {name!r}: no such layout is shipped, and no file: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise SettingsError(f"model.layout = {name!r}: {exc}") from exc
    chat = layout.chat
    if not words.specials.intersection(words.marker(chat.end)):
        raise SettingsError(
            f"model.layout = {name!r} does not suit this model: its tokenizer has no special token in {chat.end!r}; "
            "write a layout of the model's own chat format (see hubpeer/model/layouts/llama3.toml)"
        )
    return layout


def filled(template: str, **values: object) -> str:
    """`template` with its {names} filled in. Values are put in as they are: braces in them stay braces."""
    parts: list[str] = []
    rest = template
    while True:
        before, brace, after = rest.partition("{")
        parts.append(before)
        if not brace:
            return "".join(parts)
        name, _, rest = after.partition("}")
        parts.append(str(values[name]))


def system_part(words: Words, chat: Chat, text: str) -> list[int]:
    """The start of every prompt: what the prefix cache keeps."""
    return [*words.marker(chat.begin + chat.system), *words.data(text.strip()), *words.marker(chat.end + chat.user)]


def user_part(words: Words, chat: Chat, texts: Sequence[str]) -> list[int]:
    """What comes behind it: the user's texts, and the turn handed to the model."""
    ids = [token for text in texts for token in words.data(text)]
    return [*ids, *words.marker(chat.end + chat.answer)]
