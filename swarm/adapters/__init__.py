"""Adapters: one file a method, a registry, and PEFT's on-disk format both ways."""
