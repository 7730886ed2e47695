"""`python -m training --teacher FOLDER`: from hand-written data to the files in `hubpeer/encoder/`. See training/README.md."""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from hubpeer import taxonomy
from hubpeer.encoder import About, BuiltIn
from hubpeer.encoder.decide import Calibration
from hubpeer.encoder.network import WINDOW, Network, Shape, card_text, write_weights
from training import words as bags
from training.calibrate import calibrate, halves_of
from training.data import Function, clause_to_card, documents, functions, halves, joins, split
from training.student import Student, Texts, padded, train
from training.teacher import Teacher

log = logging.getLogger("training")


def texts_to_distil(among: list[Function], seed: int) -> list[str]:
    """What the student imitates the teacher on: phrasings, decoys, cards and their single words, templates' talk."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for function in among:
        found |= dict.fromkeys(
            [*function.phrasings, *function.decoys, card_text(function.card(rng)), card_text(function.card(rng))]
        )
        found |= dict.fromkeys(word.replace("_", " ") for word in [*function.capabilities, *function.specialties])
        if function.description:
            found[function.description] = None
    found |= dict.fromkeys(halves(joins()["small_talk"], held=False))
    found |= dict.fromkeys(f"{name.replace('_', ' ')}: {c.definition}" for name, c in taxonomy.DEFAULT.items())
    found |= dict.fromkeys(document.text for document in documents())
    return list(found)


def cached(path: Path, teacher: Teacher, texts: list[str], batch: int, chunk: int = 4096) -> np.ndarray:
    """The teacher's vectors of some texts; what an interrupted run already has is kept."""
    done = np.load(path) if path.exists() else np.empty((0, 384), np.float16)
    while len(done) < len(texts):
        more = teacher.encode(texts[len(done) : len(done) + chunk], batch=batch).astype(np.float16)
        done = np.concatenate([done, more])
        np.save(path, done)
        log.info("%s: %d of %d", path.name, len(done), len(texts))
    return done.astype(np.float32)


def word_list(tokenizer: Tokenizer) -> tuple[list[int], list[str]]:
    """The entries of the vocabulary worth asking the teacher about: whole words in plain letters or digits. Word ends say
    nothing alone; what they do is left to the trunk."""
    pairs = sorted((n, word) for word, n in tokenizer.get_vocab().items())
    kept = [(n, word) for n, word in pairs if n >= 1000 and word.isascii() and not word.startswith("##")]
    return [n for n, _ in kept], [word for _, word in kept]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="caches, checkpoints, log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tune-seconds", type=float, default=900, help="how long the teacher is tuned on the labels first")
    parser.add_argument("--word-seconds", type=float, default=600, help="how long the word table is fitted")
    parser.add_argument("--seconds", type=float, default=6000, help="how long the student is trained")
    parser.add_argument("--layers", type=int, default=2, help="transformer layers of the trunk; 0: words alone, in minutes")
    parser.add_argument("--out", type=Path, default=Path("hubpeer/encoder"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(name)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.work / "log.txt")],
    )
    torch.set_num_threads(torch.get_num_threads())
    trained, held = split(args.seed)
    log.info("seed %d: %d functions, %d to train on, %d held", args.seed, len(functions()), len(trained), len(held))

    teacher = Teacher(args.teacher)
    tuned = args.work / "teacher.pt"
    if tuned.exists():
        teacher.model.load_state_dict(torch.load(tuned))
    elif args.tune_seconds > 0:
        teacher.tune(trained, args.tune_seconds, args.seed)
        torch.save(teacher.model.state_dict(), tuned)
    tokenizer = Tokenizer.from_file(str(args.teacher / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    shape = Shape(layers=args.layers)

    ids, words = word_list(tokenizer)
    texts = texts_to_distil(trained, args.seed)
    of_words = cached(args.work / "words.npy", teacher, words, batch=1024)
    of_texts = cached(args.work / "texts.npy", teacher, texts, batch=128)
    del teacher

    # The directions that matter most for texts: 256 of the teacher's 384, angles nearly kept.
    both = np.concatenate([of_texts, of_words[::8]])
    basis = np.linalg.eigh(both.T @ both)[1][:, ::-1][:, : shape.width]
    wanted = of_texts @ basis
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    table = np.zeros((tokenizer.get_vocab_size(), shape.width), np.float32)
    # The vocabulary is in order of frequency: rare words say more.
    table[ids] = (of_words @ basis) * np.log1p(np.asarray(ids))[:, None].astype(np.float32) / 10
    rows = [e.ids[:WINDOW] for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    choosing = halves_of(held, args.seed)[0]

    def bag_score(candidate: np.ndarray) -> float:
        return clause_to_card(lambda lines: bags.encode(candidate, tokenizer, lines), choosing, 7)

    fitted = args.work / "table.npy"
    if not fitted.exists():
        np.save(fitted, bags.fit(table, rows, wanted, trained, tokenizer, args.word_seconds, args.seed, bag_score))
    student = Student(shape, np.load(fitted))

    def validate() -> str:
        write_weights(args.work / "model.safetensors", student.weights())
        network = Network(shape, student.weights(), tokenizer)
        return f"clause to card of five, held functions: {clause_to_card(network.encode, choosing, 7, 150):.3f}"

    distilled = Texts(rows, wanted, random.Random(args.seed))
    train(student, distilled, trained, tokenizer, args.seconds, args.seed, args.work / "student.pt", validate)

    args.out.mkdir(parents=True, exist_ok=True)
    write_weights(args.out / "model.safetensors", student.weights())
    (args.out / "encoder.json").write_bytes(msgspec.json.encode(About(shape, Calibration())))
    plain = json.loads(tokenizer.to_str()) | {"post_processor": None}
    (args.out / "tokenizer.json").write_text(json.dumps(plain, ensure_ascii=False, separators=(",", ":")), "utf-8")
    network = BuiltIn.open(args.out).network
    with torch.no_grad():
        gap = np.abs(student(*padded(rows[:8])).numpy() - network.encode(texts[:8])).max()
    log.info("the runtime's vectors differ from the student's by at most %.4f (int8)", gap)
    calibrate(args.out, args.seed)


if __name__ == "__main__":
    main()
