"""What a store does when the process, the disk or the file goes wrong.

Faults are seeded; each test prints its seed and its counts. HUBPEER_TEST_KILLS=200 for a long run.
"""

import asyncio
import contextlib
import inspect
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hubpeer.errors import StoreError
from hubpeer.settings import Documents
from hubpeer.store import Draft, Stores
from hubpeer.store import client as disk
from hubpeer.store.records import seal, unseal

REPO = Path(__file__).parents[2]
SEED = int(os.environ.get("HUBPEER_TEST_SEED", "20261122"))
KILLS = int(os.environ.get("HUBPEER_TEST_KILLS", "8"))
FLIPS = 150
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def child(code: str, *args: object, **kwargs: object) -> subprocess.Popen:
    """A fresh interpreter, because a killed one takes its test with it and a forked one must not hold environments."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        **kwargs,
    )


def body(n: int) -> bytes:
    return random.Random(n).randbytes(200 + n * 37 % 9000)


def draft(n: int) -> Draft:
    return Draft(filename=f"{n}.bin", media_type="text/plain", received_at="2026-11-22T10:00:00.000Z", source_id=f"s{n}")


#: The same documents in a child, which does not import pytest.
DOCUMENTS = "import random\nfrom hubpeer.store import Draft\n" + inspect.getsource(body) + inspect.getsource(draft)


async def fill(root: Path, count: int, client: str = "acme") -> dict[str, bytes]:
    stores = Stores(root, Documents())
    stores.open()
    with contextlib.closing(stores):
        puts = await asyncio.gather(*(stores.put(client, draft(n), body(n), body(n).hex()) for n in range(count)))
    return {put.stored.document_id: body(n) for n, put in enumerate(puts)}


# ── kill -9 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

PUTTING = (
    DOCUMENTS
    + """
import asyncio, os, sys
from pathlib import Path
from hubpeer.settings import Documents
from hubpeer.store import Stores

async def main(root, numbers):
    stores = Stores(root, Documents())
    stores.open()
    os.write(1, b"ready\\n")
    todo = iter(numbers)
    async def put():
        for n in todo:
            kept = await stores.put(f"c{n % 3}", draft(n), body(n), body(n).hex())
            os.write(1, f"{n} {kept.stored.document_id}\\n".encode())
    await asyncio.gather(*(put() for _ in range(12)))
    stores.close()

asyncio.run(main(Path(sys.argv[1]), [int(n) for n in sys.stdin.read().split()]))
"""
)


async def test_no_acknowledged_document_dies_with_the_process(tmp_path):
    chance = random.Random(SEED)
    acknowledged: dict[int, str] = {}
    killed = 0
    for _ in range(KILLS):
        first = max(acknowledged, default=0)
        # Some that were acknowledged come again, as a stream delivers them again.
        numbers = sorted(chance.sample(sorted(acknowledged), min(5, len(acknowledged)))) + list(range(first - 20, first + 3000))
        process = child(PUTTING, tmp_path, stdin=subprocess.PIPE)
        process.stdin.write(" ".join(str(n) for n in numbers if n >= 0))
        process.stdin.close()
        process.stdin = None
        assert process.stdout.readline() == "ready\n"
        try:
            lines, _ = process.communicate(timeout=chance.uniform(0.005, 0.4))
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
            lines, _ = process.communicate()
        for line in lines.splitlines(keepends=True):
            if line.endswith("\n"):
                n, document_id = line.split()
                assert acknowledged.setdefault(int(n), document_id) == document_id  # never another id for the same
    stores = Stores(tmp_path, Documents())
    stores.open()
    with contextlib.closing(stores):
        lost = 0
        for n, document_id in acknowledged.items():
            stored, text, _ = await stores.text(f"c{n % 3}", document_id, 0, 10**6)
            lost += (
                await stores.raw(f"c{n % 3}", document_id) != body(n) or text != body(n).hex() or stored.source_id != f"s{n}"
            )
        doubled = 0
        for client in ("c0", "c1", "c2"):
            hashes, after = [], None
            while True:
                page, total, after = await stores.list(client, limit=200, after=after)
                hashes += [stored.sha256 for stored in page]
                if after is None:
                    break
            assert total == len(hashes) == (await stores.stats(client)).documents
            doubled += len(hashes) - len(set(hashes))
    print(f"seed {SEED}: {killed} kills, {len(acknowledged)} acknowledged, {lost} lost, {doubled} doubled")
    assert killed > KILLS // 2 and len(acknowledged) > 3 * KILLS
    assert (lost, doubled) == (0, 0)


# ── damaged files ───────────────────────────────────────────────────────────────────────────────────────────────────────

FLIPPING = """
import collections, json, os, random, sys
from pathlib import Path
from hubpeer.errors import StoreError
from hubpeer.store import client as disk

def read(root, expected):
    try:
        store = disk.ClientStore(root, "acme", 2**32)
    except StoreError:
        return "reported"
    outcome = "harmless"
    with store.reading() as view:
        try:
            page, total, _ = view.page(None, None, 1000, None)
            if total != len(expected) or {s.document_id for s in page} != set(expected):
                return "wrong"
        except StoreError:
            outcome = "reported"
        for document_id, data in expected.items():
            try:
                stored = view.named(document_id)
                if view.raw(stored) != bytes.fromhex(data) or view.text(stored, 0, 10**6) != data:
                    return "wrong"
                if view.known(stored.sha256, stored.source_id) != stored:
                    return "wrong"
            except StoreError:
                outcome = "reported"
    return outcome

root, seed, flips = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
expected = json.loads(sys.stdin.read())
file = disk.folder(root, "acme") / "data.mdb"
whole = file.read_bytes()
chance = random.Random(seed)
counts = collections.Counter()
for flip in range(flips):
    bit = chance.randrange(len(whole) * 8)
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    pid = os.fork()
    if pid == 0:
        try:
            os._exit({"harmless": 0, "reported": 1, "wrong": 2}[read(root, expected)])
        except BaseException as error:
            print(flip, repr(error), file=sys.stderr)
            os._exit(3)
    status = os.waitpid(pid, 0)[1]
    counts["died" if os.WIFSIGNALED(status) else ("harmless", "reported", "wrong", "crashed")[os.WEXITSTATUS(status)]] += 1
print(json.dumps(counts))
"""


async def test_flipped_bits_are_reported_or_harmless():
    with tempfile.TemporaryDirectory(dir=MEMORY) as root:  # a file a flip; nothing here depends on the disk
        expected = await fill(Path(root), 50)
        process = child(FLIPPING, root, SEED, FLIPS, stdin=subprocess.PIPE)
        output, _ = process.communicate(json.dumps({key: data.hex() for key, data in expected.items()}))
    counts = json.loads(output)
    print(f"seed {SEED}: {FLIPS} flips: {counts}")
    assert sum(counts.values()) == FLIPS
    assert set(counts) <= {"harmless", "reported"} and counts["reported"] > FLIPS // 4


def _overwrite(file: Path, at: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(data)


DAMAGE = {
    "half": lambda f: os.truncate(f, f.stat().st_size // 2),
    "last page gone": lambda f: os.truncate(f, f.stat().st_size - 4096),
    "zero length": lambda f: os.truncate(f, 0),
    "garbage": lambda f: f.write_bytes(random.Random(SEED).randbytes(f.stat().st_size)),
    "missing": lambda f: f.unlink(),
    "first meta page zero": lambda f: _overwrite(f, 0, bytes(4096)),
    "second meta page zero": lambda f: _overwrite(f, 4096, bytes(4096)),
    "both meta pages zero": lambda f: _overwrite(f, 0, bytes(8192)),
    "another page size": lambda f: _overwrite(f, 16 + 24, (512).to_bytes(4, "little")),
    "no client.json": lambda f: (f.parent / "client.json").unlink(),
    "another client's client.json": lambda f: (f.parent / "client.json").write_text('{"client":"bolt"}'),
    "an empty new store": lambda f: f.parent.joinpath("client.json").write_text("{}"),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_a_damaged_file_is_said_and_never_a_new_store(tmp_path, name):
    documents = await fill(tmp_path, 20)
    healthy = await fill(tmp_path, 3, "bolt")
    DAMAGE[name](disk.folder(tmp_path, "acme") / "data.mdb")
    stores = Stores(tmp_path, Documents())
    stores.open()
    with contextlib.closing(stores):
        assert {client for client, _, _ in await stores.pending()} == {"bolt"}
        for _ in range(2):
            with pytest.raises(StoreError, match="store_corrupt"):
                await stores.get("acme", next(iter(documents)))
            with pytest.raises(StoreError, match="store_corrupt"):
                await stores.put("acme", draft(99), b"new", "new")
        for document_id, data in healthy.items():
            assert await stores.raw("bolt", document_id) == data
        assert stores.status()["errors"]["store_corrupt"] >= 3
        assert await stores.drop_client("acme")
        assert (await stores.put("acme", draft(99), b"new", "new")).stored.version == 1


async def test_a_damaged_lock_file_hurts_nobody(tmp_path):
    documents = await fill(tmp_path, 5)
    (disk.folder(tmp_path, "acme") / "lock.mdb").write_bytes(b"garbage" * 100)
    stores = Stores(tmp_path, Documents())
    stores.open()
    with contextlib.closing(stores):
        for document_id, data in documents.items():
            with contextlib.suppress(StoreError):
                assert await stores.raw("acme", document_id) == data


async def test_half_made_and_half_removed_stores_are_cleaned_up(tmp_path):
    await fill(tmp_path, 1)
    shelf = disk.folder(tmp_path, "acme").parent
    for name in (".new-0123", ".gone-4567"):
        shutil.copytree(disk.folder(tmp_path, "acme"), shelf / name)
    stores = Stores(tmp_path, Documents())
    stores.open()
    stores.close()
    assert [path.name for path in shelf.iterdir()] == [disk.folder(tmp_path, "acme").name]


# ── disks, processes ────────────────────────────────────────────────────────────────────────────────────────────────────

LIMITED = (
    DOCUMENTS
    + """
import asyncio, os, resource, signal, sys
from pathlib import Path
from hubpeer.errors import StoreError
from hubpeer.settings import Documents
from hubpeer.store import Stores

async def main(root):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    stores = Stores(root, Documents())
    stores.open()
    kept = [(await stores.put("acme", draft(n), body(n), "t")).stored.document_id for n in range(5)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 2**20, resource.RLIM_INFINITY))
    errors = []
    for n in range(5, 25):
        try:
            await stores.put("acme", draft(n), os.urandom(300_000), "t")
        except StoreError as error:
            errors.append(error.code)
    assert set(errors) == {"store_io_error"} and len(errors) > 10, errors
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    stores._handles["acme"].rests_until = 0
    assert not (await stores.put("acme", draft(99), b"after", "t")).duplicate
    for n, document_id in enumerate(kept):
        assert await stores.raw("acme", document_id) == body(n)
    stores.close()

asyncio.run(main(Path(sys.argv[1])))
print("done")
"""
)


def test_a_disk_that_fails_in_the_middle_of_a_commit(tmp_path):
    assert child(LIMITED, tmp_path).communicate()[0] == "done\n"


HOLDING = """
import sys
from pathlib import Path
from hubpeer.settings import Documents
from hubpeer.store import Stores
stores = Stores(Path(sys.argv[1]), Documents())
stores.open()
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_locked_out_until_the_first_is_gone(tmp_path):
    first = child(HOLDING, tmp_path, stdin=subprocess.PIPE)
    assert first.stdout.readline() == "open\n"
    stores = Stores(tmp_path, Documents())
    with pytest.raises(StoreError, match="store_locked"):
        stores.open()
    stores.close()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    stores.open()
    stores.close()


def test_a_new_clients_directory_is_on_disk_before_its_first_answer(tmp_path, monkeypatch):
    synced: list[Path] = []
    inner = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink()), inner(fd))[1])
    stores = Stores(tmp_path / "root", Documents())
    stores.open()
    with contextlib.closing(stores):
        synced.clear()
        asyncio.run(stores.put("acme", draft(1), b"x", ""))
        path = disk.folder(tmp_path / "root", "acme")
        assert {path, path.parent, tmp_path / "root"} <= set(synced)


def test_the_seal_covers_table_key_and_payload():
    value = seal(b"doc", b"key", b"payload")
    assert unseal(b"doc", b"key", value) == b"payload"
    for table, key, damaged in [
        (b"old", b"key", value),
        (b"doc", b"kez", value),
        (b"doc", b"key", value[:-1]),
        (b"doc", b"key", b""),
    ]:
        with pytest.raises(StoreError, match="store_corrupt"):
            unseal(table, key, damaged)
