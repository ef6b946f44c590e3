"""Measurements on the real model and real processes, one file a question.

    python -m benchmarks.decode        a token of the swarm against a token of plain `transformers`
    python -m benchmarks.train_step    an inner step of the swarm against one of plain PEFT

Each prints a table, or with `--json -` one JSON object as its last line; `--save` keeps the result
under `results/`. What is compared runs in processes of its own, in turn, round after round, and
the ratio is the median over the rounds: on a shared machine a ratio of neighbours in time holds where
the times do not.
"""
