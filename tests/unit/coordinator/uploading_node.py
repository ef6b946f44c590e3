"""A node that uploads and nothing else: `python uploading_node.py ADDRESS FINGERPRINT KEY SEED SIZE`."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from swarm.client.coordinator import CoordinatorClient
from swarm.identity import Identity


async def main(address: str, fingerprint: str, key: str, seed: str, size: str) -> None:
    identity = Identity.load_or_create(Path(key))
    client = await CoordinatorClient.connect(address, bytes.fromhex(fingerprint), identity)
    await client.put_blob(random.Random(int(seed)).randbytes(int(size)), contribution=True)
    await client.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
