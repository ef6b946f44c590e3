"""What a checkpoint's files may say, and what is made of them; parts that came over a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from swarm.errors import CorruptData, ModelMismatch, PeerLost, ProtocolError, UnsupportedModel
from swarm.model.checkpoint import Checkpoint
from swarm.model.parts import PartStore, Stretch, lay_out
from swarm.model.sources import (
    MAX_HEADER_BYTES,
    TensorEntry,
    block_of,
    parse_header,
    part_of,
    read_header,
    tensor_bytes,
)
from swarm.model.tokens import tokenizer_hash

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
)
DTYPES = {
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}


def a_file(header: dict[str, object], data: bytes) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(start: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(TINY).save_pretrained(path)
    return path


HOSTILE = {
    "overlap": ({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "the same bytes twice": ({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)),
    "gap": ({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "beyond the end": ({"a": tensor(0, 64)}, bytes(12)),
    "bytes nobody names": ({"a": tensor(0, 4)}, bytes(12)),
    "shape": ({"a": tensor(0, 12, [100, 100])}, bytes(12)),
    "negative shape": ({"a": tensor(0, 12, [-3, -4])}, bytes(12)),
    "negative offset": ({"a": tensor(-4, 12, [16])}, bytes(12)),
    "backwards": ({"a": tensor(8, 4, [0])}, bytes(12)),
    "huge shape": ({"a": tensor(0, 12, [2**62, 2**62])}, bytes(12)),
    "fractions": ({"a": {"dtype": "U8", "shape": [12.0], "data_offsets": [0, 12]}}, bytes(12)),
    "truth": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, bytes(1)),
    "unknown dtype": ({"a": tensor(0, 12, dtype="PICKLE")}, bytes(12)),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 1]}}, bytes(1)),
    "not a table": ({"a": 7}, b""),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_header_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(a_file(*HOSTILE[name]))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CorruptData):
        Checkpoint.open(str(tmp_path))


def test_headers_that_do_not_parse_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = a_file({"a": tensor(0, 4)}, bytes(4))
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(CorruptData):
            read_header(path)
    raw = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
    for header in (raw, b"[]", b"7", b"[" * 100_000, b"\xff\xfe", b""):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(CorruptData):
            read_header(path)
    for announced in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        path.write_bytes(announced.to_bytes(8, "little") + b"{}")
        with pytest.raises(CorruptData, match="announces"):
            read_header(path)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12), st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3))
    )
)
def test_tables_equal_what_the_reference_writes(described: dict[str, tuple[str, list[int]]]) -> None:
    described.pop("__metadata__", None)
    tensors = {name: torch.zeros(shape, dtype=DTYPES[dtype]) for name, (dtype, shape) in described.items()}
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    table = parse_header("f", content[8 : 8 + length], len(content))
    assert table.keys() == tensors.keys()
    for name, (dtype, shape) in described.items():
        entry = table[name]
        assert (entry.dtype, entry.shape, entry.size) == (dtype, tuple(shape), tensors[name].nbytes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_a_header_is_refused_or_harmless(data: st.DataObject) -> None:
    content = bytearray(save({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.uint8)}))
    content[data.draw(st.integers(8, len(content) - 54))] = data.draw(st.integers(0, 255))
    length = int.from_bytes(content[:8], "little")
    try:
        table = parse_header("f", bytes(content[8 : 8 + length]), len(content))
    except CorruptData:
        return
    for entry in table.values():
        assert 8 + length <= entry.offset <= entry.offset + entry.size <= len(content)
        assert tensor_bytes(entry.dtype, entry.shape) == entry.size


def test_parts_are_blocks_and_what_lies_outside_them() -> None:
    assert part_of("model.layers.12.mlp.experts.7.up_proj.weight") == "model.layers.12"
    assert part_of("lm_head.weight") == "lm_head.weight"
    assert part_of("vision.layers.3.w") != part_of("text.layers.3.w")
    assert block_of("transformer.h.3") == 3
    assert block_of("model.norm.weight") is None


def test_an_index_decides_which_copy_counts(folder: Path, tmp_path: Path) -> None:
    """As for transformers: a second copy of the weights under another name is not part of the model."""
    weights = load_file(folder / "model.safetensors")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file({"other.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert Checkpoint.open(str(tmp_path)).model_hash == Checkpoint.open(str(folder)).model_hash
    (tmp_path / "model.safetensors").rename(tmp_path / "all.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "all.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(str(tmp_path)).model_hash == Checkpoint.open(str(folder)).model_hash
    index["weight_map"]["not.there"] = "all.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptData, match="does not have it"):
        Checkpoint.open(str(tmp_path))


def entries(tensors: dict[str, torch.Tensor], dtypes: dict[str, str]) -> dict[str, TensorEntry]:
    return {name: TensorEntry("f", dtypes[name], tuple(t.shape), 0, t.nbytes) for name, t in tensors.items()}


def test_a_part_resumes_is_verified_and_reads_as_safetensors(tmp_path: Path) -> None:
    tensors = {"odd": torch.arange(5, dtype=torch.uint8), "wide": torch.randn(300, 7), "none": torch.zeros(0, 3)}
    table = entries(tensors, {"odd": "U8", "wide": "F32", "none": "F32"})
    layout = lay_out(table)
    sent: list[tuple[str, int]] = []
    broken = {"wide"}

    def stretch(name: str, lie: bool = False) -> Stretch:
        raw = tensors[name].numpy().tobytes()

        def read(start: int) -> Iterator[bytes]:
            sent.append((name, start))
            for at in range(start, len(raw), 1000):
                if name in broken and at >= 3000:
                    return
                yield bytes(len(raw[at : at + 1000])) if lie else raw[at : at + 1000]

        return Stretch(name, len(raw), read, hashlib.sha256(raw).digest())

    store = PartStore(tmp_path)
    assert store.local("../../x", "wide") is None
    assert store.path("../../x").parent == tmp_path
    with pytest.raises(PeerLost, match="3000 of 8400"):
        store.fill("p", layout, [stretch(name) for name in layout.order])
    broken.clear()
    with pytest.raises(CorruptData, match="odd"):
        store.fill("p", layout, [stretch(name, lie=name == "odd") for name in layout.order])
    assert store.local("p", "wide") is None
    PartStore(tmp_path).fill("p", layout, [stretch(name) for name in layout.order])
    assert ("wide", 3000) in sent
    assert sent.count(("wide", 0)) == 1
    located = store.local("p", "odd")
    assert located is not None
    assert located.path.read_bytes()[located.offset : located.offset + located.size] == bytes(range(5))
    read = load_file(store.path("p"))
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert [path.name for path in tmp_path.iterdir()] == [store.path("p").name]

    def too_much(start: int) -> Iterator[bytes]:
        yield bytes(9000)

    with pytest.raises(ProtocolError, match="more bytes"):
        store.fill("q", lay_out({"wide": table["wide"]}), [Stretch("wide", 8400, too_much)])


def test_bytes_that_rotted_on_disk_are_fetched_again(tmp_path: Path) -> None:
    raw = bytes(range(256)) * 4
    layout = lay_out({"a": TensorEntry("f", "U8", (1024,), 0, 1024)})

    def read(start: int) -> Iterator[bytes]:
        yield raw[start:]

    stretch = Stretch("a", 1024, read, hashlib.sha256(raw).digest())
    store = PartStore(tmp_path)
    unfinished = store.path("p").with_suffix(".part")
    unfinished.write_bytes(layout.head + bytes(1024))
    store.fill("p", layout, [stretch])
    assert store.path("p").read_bytes() == layout.head + raw
    unfinished.write_bytes(b"of another release")
    store.path("p").unlink()
    store.fill("p", layout, [stretch])
    assert store.path("p").read_bytes() == layout.head + raw


def test_two_that_want_a_part_fetch_it_once(tmp_path: Path) -> None:
    layout = lay_out({"a": TensorEntry("f", "U8", (4,), 0, 4)})
    reads = []
    begun, go_on = threading.Event(), threading.Event()

    def read(start: int) -> Iterator[bytes]:
        reads.append(start)
        begun.set()
        assert go_on.wait(20)
        yield b"abcd"

    def fill() -> None:
        PartStore(tmp_path).fill("p", layout, [Stretch("a", 4, read)])

    threads = [threading.Thread(target=fill) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    go_on.set()
    for thread in threads:
        thread.join()
    assert reads == [0]
    assert PartStore(tmp_path).path("p").read_bytes() == layout.head + b"abcd"


def test_the_tokenizer_has_a_hash(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(smollm2))
    assert len(checkpoint.tokenizer_hash) == 32
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer(["a", "long text"], padding=True, truncation=True, max_length=4)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(tmp_path) == checkpoint.tokenizer_hash, "padding and truncation are no part of it"
    checkpoint.check_tokenizer(tokenizer_hash(tmp_path), "the swarm")
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    raw["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw, indent=1))
    assert tokenizer_hash(tmp_path) == checkpoint.tokenizer_hash, "nor is the spelling of the file"
    vocabulary = raw["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    assert tokenizer_hash(tmp_path) != checkpoint.tokenizer_hash
    with pytest.raises(ModelMismatch, match="other tokens"):
        checkpoint.check_tokenizer(tokenizer_hash(tmp_path), "the swarm")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptData):
        tokenizer_hash(tmp_path)


def test_a_checkpoint_without_tokenizer_says_so(folder: Path) -> None:
    checkpoint = Checkpoint.open(str(folder))
    assert checkpoint.tokenizer_hash == b""
    checkpoint.check_tokenizer(b"", "nobody")
    with pytest.raises(ModelMismatch):
        checkpoint.check_tokenizer(bytes(32), "the swarm")


def test_names_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no tensor 'nothing\.weight'"):
        Checkpoint.open(str(folder)).load(["nothing.weight"], torch.float32, torch.device("cpu"))
