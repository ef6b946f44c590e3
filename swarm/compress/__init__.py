"""Gradient codec: what a round's update becomes on the wire, after CocktailSGD.

In: named float32 numpy arrays, the job's CodecSettings and the frame's context. Out: one
self-checking frame, or the arrays it decodes to, the same bits on every machine.

A frame names its job, round and starting parameters and is refused anywhere else. Chunks and
seeds depend only on (job, round, parameter key, position), so what a tensor decodes to does not
depend on which other tensors travel in the frame.

Never: touches torch, disk (but for its own compiled code), network or clock; lets one call change another's result
(plans and tables are remembered, bounded in number); trusts a size in a frame.

Which file answers what: `frame` what a frame says about itself, `cocktail` what stands in its body; `plan` which
coordinates belong together, `select` which are sent, `allocate` how many of each tensor, `quantize` and `levels`
as which value; `positions`, `values`, `rans` and `ranges` how all that becomes few bytes; `feedback` where the
rest goes; `ahead` compiles all of it.

Sources: CocktailSGD (Wang et al., ICML 2023) for random sparsification, then top-k, then few
bits, under error feedback; SparseLoCo (Sarfi et al., 2025) for chunked top-k, 2-bit levels fitted
to the values and the decayed residual. Positions are entropy coded, which neither of them does.
"""

from swarm.compress.ahead import compile_ahead
from swarm.compress.codec import decode, encode
from swarm.compress.feedback import Compressed, compress_with_feedback
from swarm.compress.frame import FrameContext, max_frame_bytes

__all__ = [
    "Compressed",
    "FrameContext",
    "compile_ahead",
    "compress_with_feedback",
    "decode",
    "encode",
    "max_frame_bytes",
]
