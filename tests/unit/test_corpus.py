"""Real files that nobody of this project wrote: each ends as text or as one coded error, soon."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import pytest

from hubpeer.documents import Extractor
from hubpeer.errors import STATUS, DocumentRejected
from hubpeer.settings import Documents

FILES = sorted(path for path in Path(os.environ.get("TEST_CORPUS", os.devnull)).glob("**/*") if path.is_file())


@pytest.mark.skipif(not FILES, reason="TEST_CORPUS names no folder with documents")
async def test_every_file_ends_in_one_way() -> None:
    extractor = Extractor(Documents(timeout_s=12.0))
    await extractor.start()
    ends: Counter[tuple[str, str]] = Counter()
    slowest = (0.0, "")
    for path in FILES:
        began = time.monotonic()
        try:
            extracted = await extractor.extract(path.read_bytes(), path.name)
            end = extracted.outcome
            assert extracted.text.strip()
        except DocumentRejected as exc:
            end = exc.code
            assert end in STATUS
        ends[path.suffix, end] += 1
        slowest = max(slowest, (time.monotonic() - began, path.name))
    await extractor.close()
    for (suffix, end), count in sorted(ends.items()):
        print(f"{suffix:6} {end:16} {count:4}")
    print(f"slowest {slowest[0]:.2f} s {slowest[1]}")
    assert ends.total() == len(FILES)
    # What the corpus of 22 November 2026 gave; it may only rise.
    assert ends[".docx", "ok"] + ends[".docx", "partial"] >= 32
    assert ends[".pdf", "ok"] + ends[".pdf", "partial"] >= 21
