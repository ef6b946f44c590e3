"""The volunteer's process: serves a span of the base model and trains adapters of its blocks."""
