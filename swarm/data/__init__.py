"""Training data: chat lines in, batches out. One module a step, none of which knows about nodes or leases.

`dataset` (bytes → conversations) → `chat` (conversation → tokens and loss mask) → `order`
(position of the run → sample) → `batch` (positions of a step; samples → tensors). Only `batch`
loads torch.
"""
