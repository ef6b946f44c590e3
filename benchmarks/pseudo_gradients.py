"""Contributions to measure the codec on: the shapes of a real one, with made or real values.

LoRA r 8 on all linear layers of SmolLM2-135M: 420 tensors, 2.4 M parameters. Made values have a scale of their own
for each matrix of a block, and vary by 0.3 octaves (standard deviation) between blocks, as real ones about do. Real
ones are the difference that some inner steps on movie reviews make, from the same code as a job's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]
DISTRIBUTIONS = ("gaussian", "student-t", "log-normal")
BLOCKS = 30
_LINEARS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
"""Outputs and inputs."""
_RANK = 8


def made(distribution: str, seed: int = 0) -> Tensors:
    """One contribution; the same for the same seed."""
    rng = np.random.default_rng(seed)
    scales = {(name, ab): 10 ** rng.uniform(-4, -2.5) for name in _LINEARS for ab in "AB"}
    tensors: Tensors = {}
    for block in range(BLOCKS):
        for name, (outputs, inputs) in _LINEARS.items():
            for ab, shape in (("A", (_RANK, inputs)), ("B", (outputs, _RANK))):
                values = _draw(rng, distribution, shape) * scales[name, ab] * 2 ** rng.normal(0, 0.3)
                tensors[f"{block}/{name}.lora_{ab}"] = values.astype(np.float32)
    return tensors


def real(steps: int, threads: int) -> Tensors:
    """What `steps` inner steps of a pipeline change in freshly made adapters of the whole model."""
    import torch

    from benchmarks.convergence_run import Cell, Run, World

    return Run(World(threads, torch.float32), Cell("real", inner_steps=steps, lr=1e-3)).delta(0, 1, steps)


def _draw(rng: np.random.Generator, distribution: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    if distribution == "gaussian":
        return rng.standard_normal(shape)
    if distribution == "student-t":
        return rng.standard_t(3, shape)
    signs: NDArray[np.float64] = rng.choice([-1.0, 1.0], shape)
    return np.exp(rng.standard_normal(shape)) * signs
