"""`python -m training --teacher FOLDER`: from hand-written data to the files in `hubpeer/encoder/`. See training/README.md."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer

from hubpeer.encoder import About, BuiltIn
from hubpeer.encoder.decide import Calibration
from hubpeer.encoder.network import write_weights
from training.bert import Bert, average, open_tokenizer, pruned, rows_of, teacher
from training.calibrate import calibrate
from training.data import functions, split, split_documents, split_questions, with_questions
from training.learn import Known, clause_to_card, distil, texts_to_imitate, tune

log = logging.getLogger("training")


def teacher_vectors(path: Path, network: Bert, tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """What the teacher says of texts; what it was asked before is kept."""
    kept = torch.load(path) if path.exists() else {"texts": [], "vectors": torch.zeros(0, network.shape.width)}
    read = set(kept["texts"])
    new = [text for text in texts if text not in read]
    for start in range(0, len(new), 2048):
        some = new[start : start + 2048]
        kept = {"texts": [*kept["texts"], *some], "vectors": torch.cat([kept["vectors"], network.encode(some, tokenizer)])}
        torch.save(kept, path)
        log.info("the teacher has read %d of %d texts", len(kept["texts"]), len(texts))
    return Known(kept["texts"], kept["vectors"]).of(texts)


def begin_as(network: Bert, checkpoint: Path) -> None:
    """Take over all but the words from a student that was trained before, maybe with another vocabulary."""
    stored = torch.load(checkpoint)["network"]
    own = network.state_dict()
    network.load_state_dict({name: own[name] if name == "words.weight" else stored[f"0.{name}"] for name in own})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="caches, checkpoints, log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", default="012345", help="which of the teacher's layers the student begins with")
    parser.add_argument("--vocabulary", type=int, default=21000, help="rows of the word table that are kept")
    parser.add_argument("--tune", type=int, default=400, help="steps of the teacher on our labels")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the student")
    parser.add_argument("--rate", type=float, default=1.5e-4, help="its highest learning rate; the teacher's is half of it")
    parser.add_argument("--orders", default="1", help="seeds of the order of examples, as 1,2: a student each, then averaged")
    parser.add_argument("--begin", type=Path, help="a student's checkpoint that the teacher begins as, but for the words")
    parser.add_argument("--out", type=Path, default=Path("hubpeer/encoder"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(name)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.work / "log.txt")],
    )
    # One thread is as fast as two on blocks of this size, and two wait for each other where others work on the same machine.
    torch.set_num_threads(1)
    trained, held = split(args.seed)
    asked, away = split_questions(held, args.seed)
    trained = with_questions(trained, asked)
    papers, kept = split_documents(args.seed)
    log.info("seed %d: %d functions, %d to train on, %d held", args.seed, len(functions()), len(trained), len(held))
    log.info("%d questions and %d documents to train on, %d and %d held", len(asked), len(papers), len(away), len(kept))

    full = open_tokenizer(args.teacher / "tokenizer.json")
    texts = texts_to_imitate(trained, asked, papers)
    tokenizer, rows = pruned(full, args.vocabulary, texts)
    network = teacher(args.teacher)
    if args.begin:
        begin_as(network, args.begin)
    tuned, vectors = args.work / "tuned.pt", args.work / "teacher.pt"
    if not tuned.exists():
        log.info("the teacher, held functions, nearest card of five: %s", clause_to_card(network, full, held))
    tune(network, full, trained, args.tune, args.seed, args.rate / 2, checkpoint=tuned)
    if not vectors.exists():
        log.info("the same, tuned: %s", clause_to_card(network, full, held))
    known = Known(texts, teacher_vectors(vectors, network, full, texts))

    students = []
    for order in args.orders.split(","):
        torch.manual_seed(args.seed)
        student = network.student([int(n) for n in args.layers], rows)
        path = args.work / f"student-{order}.pt"
        distil(student, tokenizer, known, trained, asked, papers, args.steps, int(order), args.rate, checkpoint=path)
        log.info("student %s, held functions, nearest card of five: %s", order, clause_to_card(student, tokenizer, held))
        students.append(student)
    student = average(students)
    if len(students) > 1:
        log.info("all together, held functions, nearest card of five: %s", clause_to_card(student, tokenizer, held))

    args.out.mkdir(parents=True, exist_ok=True)
    write_weights(args.out / "model.safetensors", student.weights())
    (args.out / "encoder.json").write_bytes(msgspec.json.encode(About(student.shape, Calibration())))
    tokenizer.save(str(args.out / "tokenizer.json"), pretty=False)
    with torch.no_grad():
        gap = np.abs(student(rows_of(texts[:50], tokenizer)).numpy() - BuiltIn.open(args.out).network.encode(texts[:50])).max()
    log.info("the runtime's vectors differ from the student's by at most %.4f (int8, bf16)", gap)
    calibrate(args.out, args.seed)


if __name__ == "__main__":
    main()
