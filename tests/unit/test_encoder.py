"""The built-in encoder: with random weights it must be right in form whatever they say; the weights we ship must load."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from hubpeer import plan, taxonomy
from hubpeer.encoder import HERE, BuiltIn, Declined
from hubpeer.encoder.decide import Calibration, Clause, Weighed, clauses, decide, joined, named, probabilities, requests
from hubpeer.encoder.network import (
    TAGS,
    WINDOW,
    Network,
    Shape,
    Tagged,
    card_text,
    gelu,
    packed,
    quantized,
    read_weights,
    unpacked,
    write_weights,
)
from hubpeer.encoder.reading import PARTS, parts
from hubpeer.model import DocAsk, PlanAsk
from hubpeer.settings import Category
from hubpeer.wire import Card

ROOT = Path(__file__).parents[2]
RULES = ["finance_priority", "consensus_required", "ceo_decides"]
SMALL = Shape(width=32, heads=2, layers=2, inner=64)
CARDS = {
    "vela": Card(["fuel_planning", "route_weather"], ["storms"]),
    "orka": Card(["crew_rosters", "shore_leave"], [], "Knows who is on board and who may leave."),
    "tamo": Card(["cargo_claims"], ["water_damage", "insurers"]),
}


def random_weights(shape: Shape, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}

    def keep(name: str, rows: int, columns: int) -> None:
        matrix = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(rows**-0.5)
        found[name], found[f"{name}.scale"] = quantized(matrix)

    def norm(name: str) -> None:
        found[f"{name}.gain"] = np.ones(shape.width, np.float32)
        found[f"{name}.bias"] = np.zeros(shape.width, np.float32)

    found["words"], found["words.scale"] = packed(rng.standard_normal((vocabulary, shape.width)).astype(np.float32))
    keep("positions", WINDOW + 2, shape.width)
    norm("norm")
    width, inner = shape.width, shape.inner
    for name in (f"layers.{n}" for n in range(shape.layers)):
        for part, rows, columns in (
            ("qkv", width, 3 * width),
            ("out", width, width),
            ("up", width, inner),
            ("down", inner, width),
        ):
            keep(f"{name}.{part}", rows, columns)
            found[f"{name}.{part}.bias"] = rng.standard_normal(columns).astype(np.float32) * np.float32(0.1)
        norm(f"{name}.norm1")
        norm(f"{name}.norm2")
    found["tags"] = rng.standard_normal((width, 1 + len(TAGS))).astype(np.float32)
    found["tags.bias"] = np.zeros(1 + len(TAGS), np.float32)
    for part in ("now", "before", "text"):
        keep(f"tags.{part}", width, 8)
    found["tags.now.bias"] = np.zeros(8, np.float32)
    found["tags.out"] = rng.standard_normal((8, 1 + len(TAGS))).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(HERE / "tokenizer.json"))


@pytest.fixture(scope="module")
def network(tokenizer):
    return Network(SMALL, random_weights(SMALL, tokenizer.get_vocab_size(), seed=5), tokenizer)


@pytest.fixture(scope="module")
def builtin(network):
    return BuiltIn(network, Calibration(in_scope=0.2, bias=0.0))


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_four_bits_keep_a_word_recognisable_and_are_packed_again_without_loss():
    words = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32) * np.linspace(0.01, 2, 64, dtype=np.float32)
    pairs, scale = packed(words)
    assert (pairs.shape, pairs.dtype, scale.shape) == ((50, 32), np.uint8, (50, 2))
    again = unpacked(pairs, scale)
    assert np.linalg.norm(again - words) < 0.12 * np.linalg.norm(words)
    assert np.array_equal(unpacked(*packed(again)), again)


def test_vectors_are_of_length_one_and_no_text_has_none(network):
    found = network.encode(["how much fuel is left", "", "  ", "storm " * 1000])
    assert found.shape == (4, 32)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 0, 0, 1], abs=1e-5)


def test_a_vector_does_not_depend_on_its_neighbours(network):
    texts = ["how much fuel is left", "who goes ashore tonight", "the insurer asks for photographs of the wet crates"]
    together = network.encode(texts)
    assert together == pytest.approx(np.concatenate([network.encode([text]) for text in texts]), abs=1e-5)


def test_a_long_question_is_read_to_its_end(network):
    text = "how much fuel is left and who goes ashore; " * 60
    windows, vector = network.read(text)
    assert vector == pytest.approx(network.encode([text])[0], abs=1e-5)
    assert len(windows) > 1
    assert all(len(window.offsets) == len(window.boundary) == len(window.tags) <= WINDOW for window in windows)
    assert windows[-1].offsets[-1][1] == len(text.rstrip())
    assert network.read("")[0] == []


def test_weights_survive_the_file(tmp_path, tokenizer):
    weights = random_weights(SMALL, 100, seed=1)
    write_weights(tmp_path / "model.safetensors", weights)
    found = read_weights(tmp_path / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all((found[name] == weights[name]).all() and found[name].dtype == weights[name].dtype for name in weights)


def test_the_runtime_is_the_network_that_was_trained(tokenizer):
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(ROOT))  # `training` is no part of the package
    from training.bert import Bert, means, rows_of

    torch.manual_seed(11)
    trained = Bert(SMALL, tokenizer.get_vocab_size())
    texts = [
        "how much fuel is left",
        "Who goes ashore tonight? The insurer asks for photographs of the wet crates, once they are dry.",
    ]
    with torch.no_grad():
        torch.nn.init.normal_(trained.positions, std=0.1)
        torch.nn.init.normal_(trained.tags.out.weight)
        trained.eval()
        trained.words.weight.data = torch.from_numpy(unpacked(*packed(trained.words.weight.numpy())))  # as `Bert.student` does
        states, cuts = trained.states(rows_of(texts, tokenizer))
        vectors = means(states, [(cuts[0], cuts[1]), (cuts[1], cuts[2])]).numpy()
        logits = trained.tags(states, cuts).numpy()[cuts[1] + 1 : cuts[2] - 1]
    runtime = Network(SMALL, trained.weights(), tokenizer)
    assert (runtime.encode(texts) * vectors).sum(1) == pytest.approx([1, 1], abs=2e-3)
    (window,), vector = runtime.read(texts[1])
    assert vector == pytest.approx(runtime.encode(texts)[1], abs=1e-5)
    assert window.tags == pytest.approx(logits[:, 1:], abs=0.1)  # int8 here, bf16 there
    assert window.boundary == pytest.approx(1 / (1 + np.exp(-logits[:, 0])), abs=0.03)


def test_the_fast_gelu_is_near_the_true_one():
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    true = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x.tolist()], np.float32)
    assert np.abs(gelu(x) - true).max() < 5e-4


def test_int8_keeps_a_matrix_to_within_half_a_step():
    matrix = np.random.default_rng(3).standard_normal((40, 60)).astype(np.float32)
    whole, scale = quantized(matrix)
    assert np.abs(whole * scale.astype(np.float32)[:, None] - matrix).max() <= 0.51 * scale.max() + 1e-2


def test_importing_the_encoder_loads_no_torch():
    code = "import sys, hubpeer.encoder; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in loaded
    assert {"torch", "transformers", "nats", "lmdb"} & set(loaded) == set()


# ── from scores to a plan ───────────────────────────────────────────────────────────────────────────────────────────────


def tagged(text: str, *spans: tuple[str, str]) -> list[Tagged]:
    """What a perfect tagger says: one token per character."""
    assert "".join(words for words, _ in spans) == text
    boundary, tags = [], []
    for words, tag in spans:
        boundary += [1.0] + [0.0] * (len(words) - 1)
        tags += [TAGS.index(tag)] * len(words)
    offsets = [(n, n + 1) for n in range(len(text))]
    logits = np.eye(len(TAGS), dtype=np.float32)[tags]
    return [Tagged(offsets, np.array(boundary, np.float32), logits, np.eye(len(text), dtype=np.float32))]


def test_a_question_is_cut_where_the_tagger_says():
    text = "Who leaves? Then, what does it cost. The boss decides."
    spans = [
        ("Who leaves", "first"),
        ("? Then, ", "none"),
        ("what does it cost", "second"),
        (". ", "none"),
        ("The boss decides.", "ceo_decides"),
    ]
    said = clauses(text, tagged(text, *spans), 0.5)
    assert [(clause.text(text), clause.tag) for clause in said] == [
        ("Who leaves", "first"),
        ("Then", "none") if said[1].text(text) == "Then" else ("? Then", "none"),
        ("what does it cost", "second"),
        ("The boss decides", "ceo_decides"),
    ]
    assert [(clause.text(text), clause.level) for clause in requests(said)] == [("Who leaves", 0), ("what does it cost", 1)]
    both = said[0] + said[2]
    assert both.text(text) == "Who leaves? Then, what does it cost"
    assert both.tokens == both.state.sum() == 27


def test_where_the_tagger_sees_no_request_the_whole_question_is_one():
    text = "anything at all"
    said = clauses(text, tagged(text, ("anything ", "none"), ("at all", "none")), 0.5)
    assert len(said) == 2
    assert [clause.text(text) for clause in requests(said)] == [text]
    assert requests([]) == []


def clause(text: str, tag: str, question: str, boundary: float = 0.9) -> Clause:
    start = question.index(text)
    return Clause(
        start, start + len(text), 1, boundary, np.eye(len(TAGS), dtype=np.float32)[TAGS.index(tag)], np.ones(1, np.float32)
    )


@pytest.mark.parametrize(("boundary", "kept"), [(0.9, 2), (0.2, 1)])
def test_neighbours_that_are_not_clearly_two_become_one(boundary, kept):
    question = "count the crates and weigh them"
    asked = [clause("count the crates", "first", question), clause("and weigh them", "second", question, boundary)]
    fitted = Calibration(apart=(0.0, 1.0, 0.0, 0.0))
    found, speaks = joined(asked, lambda some: [[float(c.start), 1.0] for c in some], fitted)
    assert len(found) == len(speaks) == kept
    assert (found[0] if kept == 1 else found[0] + found[1]).text(question) == question
    unlike = Calibration(apart=(-8.0, 0.0, 1.0, 1.0))
    rows = {0: [5.0, 0.0], 17: [0.0, 5.0]}
    assert len(joined(asked, lambda some: [rows[c.start] for c in some], unlike)[0]) == 2
    rows[17] = [1.0, 2.0]
    assert len(joined(asked, lambda some: [rows[c.start] for c in some], unlike)[0]) == 1


def test_probabilities_leave_room_for_nobody():
    assert sum(probabilities([0.0, 0.0, 0.0])) == pytest.approx(0.75)
    assert max(probabilities([-20.0, -30.0])) < 1e-8
    assert probabilities([1000.0, 0.0])[0] == pytest.approx(1.0)


def draft_of(*asked: tuple[str, str, list[float]], rule: str | None = None, max_agents: int = 6):
    """The draft for clauses given as (text, tag, what speaks for a, b and c)."""
    question = " ".join(text for text, _, _ in asked)
    weighed = Weighed([clause(text, tag, question) for text, tag, _ in asked], [row for _, _, row in asked], rule)
    return decide(question, weighed, "abc", max_agents, Calibration(in_scope=0.3, weak=0.3))


YES, NO = 4.0, -4.0
A, B, C, NOBODY = [YES, NO, NO], [NO, YES, NO], [NO, NO, YES], [NO, NO, NO]


@pytest.mark.parametrize(
    ("asked", "edges", "kind"),
    [
        ([("x", "first", A)], {"a": []}, "single"),
        ([("x", "first", A), ("y", "first", B)], {"a": [], "b": []}, "parallel"),
        ([("x", "second", A), ("y", "first", B)], {"a": ["b"], "b": []}, "sequential"),
        ([("x", "first", A), ("y", "second", B), ("z", "third", C)], {"a": [], "b": ["a"], "c": ["b"]}, "sequential"),
        ([("x", "first", A), ("y", "first", B), ("z", "second", C)], {"a": [], "b": [], "c": ["a", "b"]}, "parallel"),
        ([("x", "third", A)], {"a": []}, "single"),  # nobody goes before it
        ([("x", "first", A), ("y", "second", A)], {"a": []}, "single"),  # one agent, one step
        ([("x", "first", A), ("y", "second", NOBODY)], {"a": []}, "single"),
    ],
)
def test_clauses_become_a_graph(asked, edges, kind):
    draft = draft_of(*asked)
    graph = {step.agent: step.depends_on for step in draft.agents}
    assert {agent: sorted(needs) for agent, needs in graph.items()} == edges
    assert plan.workflow_type(graph) == kind


def test_a_step_does_its_own_clauses():
    draft = draft_of(("count the crates", "first", A), ("call Mr Baum", "first", B), ("weigh them", "first", A))
    assert {step.agent: step.task for step in draft.agents} == {"a": "count the crates. weigh them", "b": "call Mr Baum"}


def test_who_decides_comes_with_the_draft():
    assert draft_of(("x", "first", A), rule="ceo_decides").conflict_resolution == "ceo_decides"
    assert draft_of(("x", "first", A)).conflict_resolution is None


def test_nothing_said_is_nothing_asked():
    assert decide(" ", Weighed([], []), "abc", 6, Calibration()).reason == "empty"


def test_what_fits_nobody_is_declined_with_the_nearest():
    declined = draft_of(("x", "first", [-3.0, -2.0, -9.0]))
    assert isinstance(declined, Declined)
    assert declined.reason == "nobody_fits"
    assert declined.confidence > 0.8
    assert [a.agent for a in declined.alternatives] == ["b", "a", "c"]


def test_the_surest_agents_stay_where_too_many_fit():
    draft = draft_of(("x", "first", A), ("y", "first", [NO, 9.0, NO]), ("z", "first", [NO, NO, 8.0]), max_agents=2)
    assert {step.agent for step in draft.agents} == {"b", "c"}
    assert [a.agent for a in draft.alternatives] == ["a"]


def test_names_and_figures_of_a_clause_are_the_data_it_needs():
    found = named(['check the "blue file" of Baum & Sohn for the 40 pallets and 12 % of May'])
    assert found == ["blue file", "Baum & Sohn", "May", "40 pallets", "12 %"]


def test_every_draft_of_a_random_network_is_a_plan(builtin):
    seed = 20261122
    print(f"seed {seed}")
    rng = random.Random(seed)
    words = "fuel storm crew leave crate wet insurer and then ; , . ? before once who decides 3 Ünï 日本 \u200b \x00 '\"".split(
        " "
    )
    known = 0
    for _ in range(60):
        names = [f"agent{n}" for n in range(rng.randint(1, 8))]
        cards = {
            name: Card(rng.choices(words[:8], k=rng.randint(1, 4)), rng.choices(words, k=rng.randint(0, 2))) for name in names
        }
        query = " ".join(rng.choices(words, k=rng.randint(1, 60)))
        limit = rng.randint(1, 4)
        found = builtin.plan(PlanAsk("asker", query, cards, RULES, limit))
        if isinstance(found, Declined):
            continue
        known += 1
        question = plan.Question("asker", query, RULES, RULES[1], limit)
        made = plan.build(found, question, cards, "builtin_encoder", "p1", "2026-11-22T00:00:00Z")
        assert not isinstance(made, plan.Rejected), (query, made)
    assert known > 8


def test_cards_read_ahead_are_not_read_for_the_question(network):
    builtin = BuiltIn(network, Calibration(in_scope=0.2, bias=0.0))
    assert builtin.unread([]) == []
    builtin.known(builtin.unread(CARDS.values()))
    assert builtin.unread(CARDS.values()) == []
    read = builtin.status()["cached_texts"]
    assert read == len(CARDS) + sum(len(card.capabilities) + len(card.specialties) for card in CARDS.values())
    builtin.plan(PlanAsk("x", "how much fuel is left", CARDS, RULES))
    assert builtin.status()["cached_texts"] == read


@pytest.mark.parametrize("ask", [PlanAsk("x", "fuel?", {}, RULES), PlanAsk("x", " \n", CARDS, RULES)])
def test_without_agents_or_words_there_is_nothing_to_plan(builtin, ask):
    assert builtin.plan(ask).reason == "empty"


def test_cards_are_encoded_once(network):
    builtin = BuiltIn(network, Calibration())
    builtin.plan(PlanAsk("x", "how much fuel is left", CARDS, RULES))
    before = builtin.status()["cached_texts"]
    builtin.plan(PlanAsk("x", "who goes ashore", CARDS, RULES))
    assert builtin.status()["cached_texts"] == before == len({card_text(c) for c in CARDS.values()} | {"cargo claims"} | {
        word.replace("_", " ") for c in CARDS.values() for word in [*c.capabilities, *c.specialties]
    })  # fmt: skip


def test_threads_share_one_encoder(builtin):
    asks = [PlanAsk("x", f"how much fuel is left for leg {n % 5}", CARDS, RULES) for n in range(16)]
    alone = [builtin.plan(ask) for ask in asks]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(builtin.plan, asks)) == alone


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_long_document_is_read_from_beginning_to_end():
    text = "".join(f"{n:05}" + "x" * 445 for n in range(200))
    read = parts(text)
    assert len(read) == PARTS
    assert read[0].startswith("00000")
    assert int(read[-1][:5]) > 150


@pytest.mark.parametrize("text", ["", "   ", "The crates were wet. " * 400, "日本語" * 50])
def test_any_text_gets_a_category_of_the_taxonomy(builtin, text):
    own = {"claim": Category("Somebody wants money for a damage.", ["tamo"]), "roster": Category("Who works when.", ["orka"])}
    found = builtin.categorize(DocAsk("c", text, own, ["tamo", "orka"], filename="a.txt"))
    assert found.category in own
    assert set(found.relevant_agents) <= set(own[found.category].agents)
    assert found.method == ("builtin_encoder" if text.strip() else "rules")  # nothing to read, nothing to compare
    assert 0 <= found.confidence <= 1


def test_markers_of_sensitivity_count_in_the_whole_document(builtin):
    text = "Crates and ropes. " * 300 + "This is strictly confidential."
    assert builtin.categorize(DocAsk("c", text, taxonomy.DEFAULT, ["ceo"])).sensitivity == "restricted"


# ── what we ship ────────────────────────────────────────────────────────────────────────────────────────────────────────

shipped = pytest.mark.skipif(not (HERE / "model.safetensors").exists(), reason="no weights in this tree")


@shipped
def test_the_shipped_files_are_small_and_say_what_they_are():
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) <= 16_000_000
    about = json.loads((HERE / "encoder.json").read_text("utf-8"))
    assert msgspec.convert(about["fitted"], Calibration).card > 0
    card = (HERE / "MODEL_CARD.md").read_text("utf-8")
    assert "Apache-2.0" in card
    assert "all-MiniLM-L6-v2" in card


@shipped
def test_the_shipped_encoder_routes_and_declines():
    builtin = BuiltIn.open()
    ask = PlanAsk("x", "the crates came out of the hold soaked and the insurer wants to know why", CARDS, RULES)
    found = builtin.plan(ask)
    assert "tamo" in [step.agent for step in found.agents]
    assert found == BuiltIn.open().plan(ask)
    near, far = (
        builtin.network.encode(["when will we get our money for the wet crates", "a recipe for pancakes"])
        @ (builtin.network.encode([card_text(CARDS["tamo"])])[0])
    )
    assert near > far
