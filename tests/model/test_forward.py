"""Our forward pass against transformers' own, and against itself read in other pieces."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from hubpeer.model import forward, stand_in
from hubpeer.model.forward import Feed, Forward, Memory, Node
from hubpeer.model.load import Weights, load_weights


def reference(folder: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


def in_pieces(weights: Weights, tokens: list[int], sizes: list[int]) -> torch.Tensor:
    """The last logits after reading `tokens` in pieces, each a node behind the one before; other rows ride along."""
    memory = Memory(weights, 4096)
    run = Forward(weights, memory).run
    other = Node(2048, 1024)
    node: Node | None = None
    at = free = 0
    with torch.inference_mode():
        for size in sizes:
            piece = tokens[at : at + size]
            at += size
            node = Node(free, len(piece) + 3, node)
            free += -(-(len(piece) + 3) // 16) * 16
            logits = run([Feed(other, [5, 6], True), Feed(node, piece, True)])
        assert at >= len(tokens)
    return logits[1]


def sizes_of(rng: random.Random, total: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(rng.choice([1, 2, 7, 16, 17, 40, 100]), total - sum(sizes)))
    return sizes


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(tmp_path: Path, tied: bool) -> None:
    config = stand_in.TINY | {"tie_word_embeddings": tied, "num_hidden_layers": 3}
    folder = stand_in.make(tmp_path, config, seed=3, spread=0.1)
    rng = random.Random(1)
    tokens = [rng.randrange(1000) for _ in range(150)]
    theirs = reference(folder, tokens)
    # Relative L2 distance. Random weights exaggerate: nothing in them is redundant.
    for kind, allowed in (("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.09)):
        weights = load_weights(folder, kind)
        assert error(in_pieces(weights, tokens, [150]), theirs) < allowed, kind
        assert error(in_pieces(weights, tokens, sizes_of(rng, 150)), theirs) < allowed, kind


@pytest.mark.parametrize("seed", range(8))
def test_pieces_and_company_change_nothing(weights: Weights, seed: int) -> None:
    rng = random.Random(seed)
    tokens = [rng.randrange(1000) for _ in range(rng.randint(2, 200))]
    whole = in_pieces(weights, tokens, [len(tokens)])
    assert error(in_pieces(weights, tokens, sizes_of(rng, len(tokens))), whole) < 1e-5


def test_rows_of_several_roots_in_one_pass_are_what_each_is_alone(weights: Weights) -> None:
    """Two roots, one with two branches of which one has a leaf of its own; a long row and short ones of several tokens."""
    rng = random.Random(8)
    together, alone = (Forward(weights, Memory(weights, 1024)) for _ in range(2))
    read: dict[Node, list[int]] = {}

    def feed(node: Node, count: int, wants: bool = True) -> Feed:
        tokens = [rng.randrange(1000) for _ in range(count)]
        read[node] = read.get(node, []) + tokens
        return Feed(node, tokens, wants)

    with torch.inference_mode():
        one, two, long = Node(0, 64), Node(64, 48), Node(112, 64)
        together.run([feed(one, 33), feed(two, 20)])
        left, right = Node(192, 16, one), Node(208, 32, one)
        together.run([feed(left, 3), feed(right, 17)])
        leaf = Node(240, 16, left)
        rows = [feed(right, 2), feed(leaf, 5), feed(two, 1), feed(long, forward.SHORT + 3), feed(one, 4)]
        found = together.run(rows)
        for row, logits in zip(rows, found, strict=True):
            tokens = [token for node, seen in row.node.path() for token in read[node][:seen]]
            expected = alone.run([Feed(Node(0, 128), tokens, True)])
            assert error(logits, expected[0]) < 1e-5


def test_siblings_share_their_parent_and_nothing_else(weights: Weights) -> None:
    forward = Forward(weights, Memory(weights, 1024))
    alone = Forward(weights, Memory(weights, 1024))
    with torch.inference_mode():
        root = Node(0, 64)
        forward.run([Feed(root, list(range(40)), False)])
        left, right = Node(64, 32, root), Node(96, 32, root)
        forward.run([Feed(root, [1], False), Feed(left, [2], False), Feed(right, [3], False)])  # the parent goes on by itself
        both = forward.run([Feed(left, [4], True), Feed(right, [4], True)])
        for row, first in ((0, 2), (1, 3)):
            expected = alone.run([Feed(Node(0, 64), [*range(40), first, 4], True)])
            assert error(both[row], expected[0]) < 1e-5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux how much is resident")
def test_memory_is_resident_once_it_is_used(weights: Weights) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    memory = Memory(weights, (32 << 20) // weights.shape.kv_bytes_per_token)
    assert memory.nbytes >= 64 << 20
    assert resident() - before < 16 << 20
    assert not memory.k[:, :, 5].any()
    memory.k.fill_(1)
    assert resident() - before > 16 << 20
