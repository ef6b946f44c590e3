"""The loss lies on the answers and their end-of-turn tokens, whatever the template does."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swarm.data.chat import IGNORED, EncodedSample, encode_sample
from swarm.data.dataset import Message
from swarm.errors import DatasetError, UnsupportedModel

LONG = 10_000

SYSTEM, HELLO, HI = (
    Message("system", "Be kind."),
    Message("user", "Hello!"),
    Message("assistant", "Hi there."),
)
TWO_TURNS = [SYSTEM, HELLO, HI, Message("user", "And you?"), Message("assistant", "Fine, 12 of 10 😀")]

LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' </s>' }}"
    "{% else %}{{ '<s>[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
# As Qwen3 does it: thoughts, even empty ones, only in the last answer.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As DeepSeek-R1 does it: the generation prompt opens thoughts that finished answers do not show.
FORCED_THINKING = (
    "{% for m in messages %}{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n<think>\n' }}{% endif %}"
)
ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@pytest.fixture(params=["offsets as they are", "offsets trimmed of white space"])
def tokenizer(smollm2: Path, request: pytest.FixtureRequest) -> Any:
    return load(smollm2, trimmed=request.param != "offsets as they are")


def load(smollm2: Path, trimmed: bool = False, template: str = "") -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    if trimmed:  # what GPT-2's and Llama 3's tokenizers do: a newline token covers no character
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if template:
        tokenizer.chat_template = template
        tokenizer.backend_tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    return tokenizer


load_once = cache(load)  # for hypothesis' many examples; nobody may change what it returns


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def learned(tokenizer: Any, sample: EncodedSample) -> list[str]:
    """The text of every unbroken run of tokens that carry loss."""
    runs: list[list[int]] = [[]]
    for label in sample.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def test_loss_on_every_answer_and_its_end_of_turn_token(tokenizer: Any) -> None:
    sample = encode_sample(tokenizer, TWO_TURNS, LONG)
    assert learned(tokenizer, sample) == ["Hi there.<|im_end|>", "Fine, 12 of 10 😀<|im_end|>"]
    rendered = tokenizer.apply_chat_template([m.as_dict() for m in TWO_TURNS], tokenize=False)
    assert list(sample.input_ids) == ids_of(tokenizer, rendered)
    assert all(label in (IGNORED, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    assert sample.labels[-1] == IGNORED, "the newline after the end of turn is not learned"
    assert sample.cut_tokens == 0


def test_a_turn_after_the_last_answer_is_not_learned(tokenizer: Any) -> None:
    assert learned(tokenizer, encode_sample(tokenizer, TWO_TURNS[:4], LONG)) == ["Hi there.<|im_end|>"]


text = st.text(st.one_of(st.sampled_from(" \n.x<|é😀"), st.characters(codec="utf-8")), max_size=30)
content = text.filter(lambda value: bool(value.strip()))


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("trimmed", [False, True])
def test_answers_are_exact_pieces_of_the_whole(smollm2: Path, trimmed: bool, data: st.DataObject) -> None:
    tokenizer = load_once(smollm2, trimmed)
    messages: list[Message] = []
    pieces: list[tuple[str, bool]] = [("", False)]
    if data.draw(st.booleans()):
        messages.append(Message("system", data.draw(content)))
        pieces.append((f"<|im_start|>system\n{messages[-1].content}<|im_end|>\n", False))
    else:
        default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        pieces.append((f"<|im_start|>system\n{default}<|im_end|>\n", False))
    for _ in range(data.draw(st.integers(1, 3))):
        # An answer that begins with a newline may share a token with the template's (below).
        question, answer = data.draw(content), data.draw(content.map(str.lstrip))
        messages += [Message("user", question), Message("assistant", answer)]
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>", True))
        pieces.append(("\n", False))
    sample = encode_sample(tokenizer, messages, LONG)

    input_ids: list[int] = []
    labels: list[int] = []
    for piece, learn in pieces:
        ids = ids_of(tokenizer, piece)
        input_ids += ids
        labels += ids if learn else [IGNORED] * len(ids)
    assert list(sample.input_ids) == input_ids
    assert list(sample.labels) == labels


def test_a_token_shared_with_the_template_is_learned(tokenizer: Any) -> None:
    # "\n" + "\n\nOh" is tokenized as "\n\n", "\n", "Oh": the first holds the template's newline too.
    messages = [HELLO, Message("assistant", "\n\nOh")]
    assert learned(tokenizer, encode_sample(tokenizer, messages, LONG)) == ["\n\n\nOh<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA2, [" Hi there. </s>", " Fine, 12 of 10 😀 </s>"]),
        (PHI3, ["Hi there.<|end|>", "Fine, 12 of 10 😀<|end|>"]),
        (PLAIN, [" Hi there.", " Fine, 12 of 10 😀"]),
    ],
    ids=["llama2", "phi3", "plain"],
)
def test_other_templates(smollm2: Path, template: str, expected: list[str]) -> None:
    for trimmed in (False, True):
        tokenizer = load(smollm2, trimmed, template)
        assert learned(tokenizer, encode_sample(tokenizer, TWO_TURNS, LONG)) == expected


@pytest.mark.parametrize("answer", ["x", "ends with x", "ax \n", "xx y"])
def test_the_end_of_the_answer_is_not_mistaken_for_the_template(smollm2: Path, answer: str) -> None:
    tokenizer = load(smollm2, template=LLAMA2)
    sample = encode_sample(tokenizer, [HELLO, Message("assistant", answer)], LONG)
    assert learned(tokenizer, sample) == [f" {answer.strip()} </s>"]


def test_a_template_that_adds_to_the_last_answer_takes_single_answers_only(smollm2: Path) -> None:
    tokenizer = load(smollm2, template=THINKING)
    sample = encode_sample(tokenizer, [HELLO, HI], LONG)
    assert learned(tokenizer, sample) == ["<think>\n\n</think>\n\nHi there.<|im_end|>"]
    with pytest.raises(UnsupportedModel, match="line 7 up to message 3 differently") as caught:
        encode_sample(tokenizer, TWO_TURNS, LONG, "line 7")
    assert "one answer each" in caught.value.fix


def test_a_generation_prompt_that_answers_do_not_continue_is_refused(smollm2: Path) -> None:
    tokenizer = load(smollm2, template=FORCED_THINKING)
    with pytest.raises(UnsupportedModel, match="differently"):
        encode_sample(tokenizer, [HELLO, HI], LONG)


def test_a_conversation_the_template_refuses(smollm2: Path) -> None:
    tokenizer = load(smollm2, template=ALTERNATING)
    with pytest.raises(DatasetError, match=r"line 3: .*System role not supported"):
        encode_sample(tokenizer, TWO_TURNS, LONG, "line 3")
    with pytest.raises(DatasetError, match="starts with the assistant"):
        encode_sample(tokenizer, [HI], LONG)


def test_unusable_templates(smollm2: Path) -> None:
    tokenizer = load(smollm2)
    for template, cause in [(None, "no chat template"), ("{% if %}", "cannot be used")]:
        tokenizer.chat_template = template
        with pytest.raises(UnsupportedModel, match=cause):
            encode_sample(tokenizer, [HELLO, HI], LONG)


def test_bos_is_the_templates_business(smollm2: Path) -> None:
    tokenizer = load(smollm2, template=ALTERNATING)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    assert encode_sample(tokenizer, [HELLO, HI], LONG).input_ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_of_another_kind() -> None:
    """SentencePiece style: spaces belong to words, the first word gets one of its own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=120, show_progress=False)
    backend.train_from_iterator([f"{m.role} {m.content} [INST] [/INST]" for m in TWO_TURNS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = LLAMA2
    sample = encode_sample(tokenizer, [HELLO, HI], LONG)
    assert learned(tokenizer, sample)[0].replace("▁", " ").split() == ["Hi", "there.", "</s>"]


def test_too_long_is_cut_on_the_left(tokenizer: Any) -> None:
    whole = encode_sample(tokenizer, [SYSTEM, HELLO, HI], LONG)
    n = len(whole.input_ids)
    cut = encode_sample(tokenizer, [SYSTEM, HELLO, HI], n - 5)
    assert cut == EncodedSample(whole.input_ids[5:], whole.labels[5:], 5)
    assert encode_sample(tokenizer, [SYSTEM, HELLO, HI], n) == whole


def test_the_last_answer_must_fit_with_a_token_before_it(tokenizer: Any) -> None:
    whole = encode_sample(tokenizer, [SYSTEM, HELLO, HI], LONG)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORED)
    needed = len(whole.labels) - first + 1
    tight = encode_sample(tokenizer, [SYSTEM, HELLO, HI], needed)
    assert tight.labels[0] == IGNORED
    assert learned(tokenizer, tight) == learned(tokenizer, whole)
    with pytest.raises(DatasetError, match=f"line 9: .*{needed} tokens, max_length is {needed - 1}"):
        encode_sample(tokenizer, [SYSTEM, HELLO, HI], needed - 1, "line 9")


def test_an_answer_that_the_cut_reaches_is_not_learned(tokenizer: Any) -> None:
    whole = encode_sample(tokenizer, TWO_TURNS, LONG)
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORED)
    both, one = (encode_sample(tokenizer, TWO_TURNS, len(whole.labels) - cut) for cut in (first - 1, first))
    assert len(learned(tokenizer, both)) == 2
    assert learned(tokenizer, one) == ["Fine, 12 of 10 😀<|im_end|>"]
    assert one.labels[0] == IGNORED
