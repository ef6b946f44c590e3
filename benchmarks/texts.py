"""Real text as rows of token ids: movie reviews, one sentence after the other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from swarm.samples import movie_sentences, smollm2_folder

_SENTENCES = 1500


@lru_cache(maxsize=1)
def _ids() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_folder())
    text = " ".join(sample.text.strip() for sample in movie_sentences("held_out", _SENTENCES))
    return list(tokenizer(text)["input_ids"])


def token_rows(tokens: int, width: int) -> list[list[int]]:
    """At least `tokens` tokens of held-out reviews in rows of `width`."""
    count = -(-tokens // width)
    ids = _ids()
    if count * width > len(ids):
        raise ValueError(f"{count * width} tokens were asked for, there are {len(ids)}")
    return [ids[row * width : (row + 1) * width] for row in range(count)]
