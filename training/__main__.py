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
from training.bert import Bert, open_tokenizer, pruned, rows_of, teacher
from training.calibrate import calibrate
from training.data import functions, split, split_questions, with_questions
from training.learn import Known, clause_to_card, distil, texts_to_imitate

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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--work", type=Path, default=Path("build/training"), help="caches, checkpoints, log")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", default="0135", help="which of the teacher's layers the student begins with")
    parser.add_argument("--vocabulary", type=int, default=21000, help="rows of the word table that are kept")
    parser.add_argument("--steps", type=int, default=3000, help="steps of the student")
    parser.add_argument("--rate", type=float, default=3e-4, help="its learning rate at the highest")
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
    log.info("seed %d: %d functions, %d to train on, %d held", args.seed, len(functions()), len(trained), len(held))
    log.info("%d whole questions to train on, %d held", len(asked), len(away))

    full = open_tokenizer(args.teacher / "tokenizer.json")
    texts = texts_to_imitate(trained, asked)
    tokenizer, rows = pruned(full, args.vocabulary, texts)
    network = teacher(args.teacher)
    torch.manual_seed(args.seed)
    student = network.student([int(n) for n in args.layers], rows)
    known = Known(texts, teacher_vectors(args.work / "teacher.pt", network, full, texts))
    del network

    def validate(step: int) -> None:
        log.info("step %d, held functions, nearest card of five: %s", step, clause_to_card(student, tokenizer, held))

    keep = args.work / "student.pt"
    distil(student, tokenizer, known, trained, asked, args.steps, args.seed, args.rate, checkpoint=keep, validate=validate)

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
