"""Products of activations with weights, and norms of a few rows: one file a format, and what pays on this machine.

Tensors in, tensors out; no module, no model, no file is known here. Every narrow format has a plain way,
dequantize and multiply, that is right on any device; faster ways are used only where `traits` has
found them both right and faster on the device at hand.
"""
