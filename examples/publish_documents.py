"""Give the hub documents in both ways, and read them back: python examples/publish_documents.py FILE [FILE ...]"""

import asyncio
import os
import sys
from pathlib import Path

from hubpeer.client import Client
from hubpeer.errors import HubError

URL = os.environ.get("HUBPEER_NATS__URL", "nats://127.0.0.1:4222")


async def main(files: list[Path]) -> None:
    async with Client(URL) as hub:
        docs = hub.docs("acme")
        for file in files:
            try:
                # The receipt is proof: the document is on disk. `source_id` makes sending it again harmless.
                receipt = await docs.add(file.read_bytes(), file.name, source_id=file.name, wait="categorized")
                print(file.name, receipt.document_id, receipt.categorization.category)
            except HubError as exc:
                print(file.name, "refused:", exc.code)
        # Streamed: `accepted` at once, the receipt comes on hub.docs.receipt.acme.<document>.
        print("accepted as number", await docs.stream(b"A note from the night shift.", "note.txt"))
        for document in (await docs.list()).documents:
            print(document.state, document.filename)


asyncio.run(main([Path(name) for name in sys.argv[1:]]))
