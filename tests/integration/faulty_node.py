"""A node whose output goes wrong after a while: `python faulty_node.py KIND STEPS -- swarm's arguments`.

KIND: nan (a value that is no number), shape (one value too few in every hidden state), garbage (a payload of
another length). Otherwise it is `swarm node start`: a real process on real sockets.
"""

from __future__ import annotations

import itertools
import sys

import torch

import node.batching
from swarm.cli.main import app
from swarm.wire.tensors import pack
from swarm.wire.v1 import common_pb2


def main() -> None:
    kind, steps, _, *arguments = sys.argv[1:]
    count = itertools.count(1)

    def faulty(tensor: torch.Tensor, encoding: str) -> tuple[common_pb2.TensorMeta, bytes]:
        if next(count) <= int(steps):
            return pack(tensor, encoding)
        if kind == "nan":
            return pack(torch.full_like(tensor, float("nan")), encoding)
        if kind == "shape":
            return pack(tensor[..., :-1], encoding)
        meta, payload = pack(tensor, encoding)
        return meta, payload[:-1]

    node.batching.pack = faulty
    sys.argv[1:] = arguments
    app()


if __name__ == "__main__":
    main()
