"""The store against a dict: whatever the order of operations, it says what a dict would say."""

import asyncio
import hashlib
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hubpeer.settings import Documents
from hubpeer.store import Draft, Stores
from hubpeer.wire import Categorization

NOW = "2026-11-22T10:00:00.000Z"
BODIES = st.sampled_from([b"", b"one", b"two", b"three"])
SOURCES = st.sampled_from([None, "s1", "s2", "s3"])


class Documentary(RuleBasedStateMachine):
    """One client. The model: documents by id as [bytes, version, state, category], source ids, refused bytes."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        self.root = Path(tempfile.mkdtemp(dir=memory))
        self.runner = asyncio.Runner()
        self.stores = Stores(self.root, Documents())
        self.stores.open()
        self.documents: dict[str, list] = {}
        self.sources: dict[str, str] = {}
        self.order: list[str] = []
        self.changed = True

    def teardown(self) -> None:
        self.stores.close()
        self.runner.close()
        shutil.rmtree(self.root)

    def run_(self, work):
        self.changed = True
        return self.runner.run(work)

    def having(self, body: bytes, state: str) -> str | None:
        failed = state == "failed"
        return next(
            (i for i in self.order if self.documents[i][0] == body and (self.documents[i][2] == "failed") == failed), None
        )

    @rule(body=BODIES, source=SOURCES)
    def put(self, body, source):
        put = self.run_(
            self.stores.put("acme", Draft(filename="f", media_type="t", received_at=NOW, source_id=source), body, body.decode())
        )
        document_id = put.stored.document_id
        owner = self.sources.get(source)
        if owner is None:
            twin = self.having(body, "good")
            owner = twin or self.having(body, "failed")
            duplicate = twin is not None
        else:
            duplicate = self.documents[owner][0] == body
        assert put.duplicate == duplicate
        if owner is None:
            assert document_id not in self.documents
            self.order.append(document_id)
            self.documents[document_id] = [body, 1, "committed", None]
        else:
            assert document_id == owner
            if not duplicate:
                self.documents[owner] = [body, self.documents[owner][1] + 1, "committed", None]
        if source is not None:
            self.sources[source] = document_id
        assert put.stored.version == self.documents[document_id][1]

    @rule(body=BODIES, source=SOURCES)
    def reject(self, body, source):
        kept = self.run_(
            self.stores.reject("acme", hashlib.sha256(body).hexdigest(), len(body), "f", source, NOW, "bad_pdf", "broken")
        )
        known = self.having(body, "failed")
        if known is None:
            self.order.append(kept.document_id)
            self.documents[kept.document_id] = [body, 1, "failed", None]
        else:
            assert kept.document_id == known

    @precondition(lambda self: self.order)
    @rule(data=st.data(), category=st.sampled_from(["invoice", "contract"]), late=st.booleans())
    def categorize(self, data, category, late):
        document_id = data.draw(st.sampled_from(self.order))
        document = self.documents[document_id]
        label = Categorization(category, 0.5, "s", "internal", [], [], "rules")
        done = self.run_(self.stores.categorize("acme", document_id, document[1] - late, label))
        assert (done is None) == (late or document[2] == "failed")
        if done is not None:
            document[2:] = ["categorized", category]

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def delete(self, data):
        document_id = data.draw(st.sampled_from(self.order))
        assert self.run_(self.stores.delete("acme", document_id))
        self.order.remove(document_id)
        del self.documents[document_id]
        self.sources = {source: i for source, i in self.sources.items() if i != document_id}

    @rule()
    def restart(self):
        self.stores.close()
        self.stores.open()
        self.changed = True

    @rule()
    def drop(self):
        assert self.run_(self.stores.drop_client("acme")) in (True, False)
        self.documents, self.sources, self.order = {}, {}, []

    @invariant()
    def the_store_says_what_the_model_says(self):
        if self.changed:
            self.changed = False
            self.runner.run(self.compare())

    async def compare(self) -> None:
        page, total, _ = await self.stores.list("acme", limit=200)
        assert [stored.document_id for stored in page] == self.order[::-1] and total == len(self.order)
        for stored in page:
            body, version, state, category = self.documents[stored.document_id]
            assert (stored.version, stored.state) == (version, state)
            assert (stored.categorization.category if stored.categorization else None) == category
            if state != "failed":
                assert await self.stores.raw("acme", stored.document_id) == body
        good = [d for d in self.documents.values() if d[2] != "failed"]
        stats = await self.stores.stats("acme")
        assert (stats.documents, stats.failed) == (len(good), len(self.documents) - len(good))
        assert stats.bytes == stats.text_chars == sum(len(d[0]) for d in good)
        assert stats.pending == len(await self.stores.pending()) == sum(d[2] == "committed" for d in good)
        for category in ("invoice", "contract"):
            ids = [i for i in self.order[::-1] if self.documents[i][3] == category]
            found, total, _ = await self.stores.list("acme", category=category)
            assert [stored.document_id for stored in found] == ids and total == len(ids) == stats.categories.get(category, 0)


TestStoreAgainstADict = Documentary.TestCase
TestStoreAgainstADict.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
