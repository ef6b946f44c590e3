"""Base models: what a checkpoint is, and how a span of it or its head is loaded."""
