"""One conversation → token ids and a loss mask, right for any chat template or refused.

What comes in is a tokenizer and the messages of a sample; what goes out is an `EncodedSample`
whose labels are -100 everywhere but on the assistant's answers, each with the end-of-turn token
that follows it. The ids are those of the whole rendered text, tokenized once and without special
tokens of the tokenizer's own (the template writes BOS where the model wants one).

Where an answer lies is asked of the template instead of assumed. It starts where the rendering
of everything before it, with the generation prompt, ends: exactly what the model will be given.
What follows the answer is what two renderings that differ only in the answer's last character
have in common at their ends; of this the end-of-turn token is the leading part up to the first
white space. Both ends are then looked up in the rendering of the whole conversation; a
template whose renderings of the parts are not prefixes of the whole is an `UnsupportedModel`.

Never trains on the prompt, on a part of an answer, or on an answer whose prompt was cut away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError, TemplateSyntaxError

from swarm.data.dataset import Message
from swarm.errors import DatasetError, UnsupportedModel

IGNORED = -100
"""The label without loss, as torch's cross entropy has it."""

_END_OF_TURN = re.compile(r"\s*\S+")
"""White space before the token belongs to it (Llama 2 writes `answer </s>`); what comes after does not."""


class ChatTokenizer(Protocol):
    """The part of transformers' PreTrainedTokenizerBase that is used here."""

    @property
    def chat_template(self) -> object: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...

    def __call__(
        self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool
    ) -> Mapping[str, list[Any]]: ...


@dataclass(frozen=True)
class EncodedSample:
    """A conversation as the model sees it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The id itself where it carries loss, else -100. Not shifted; the first one is always -100."""
    cut_tokens: int
    """Tokens cut on the left because the conversation was longer than max_length."""


def encode_sample(
    tokenizer: ChatTokenizer, messages: Sequence[Message], max_length: int, where: str = "the sample"
) -> EncodedSample:
    """Tokenize a conversation of at most `max_length` tokens; `where` names it in errors.

    A longer one loses tokens on its left (a BOS goes with them). An earlier answer that the cut
    reaches stays as context without loss; the last answer must fit whole, after at least one
    token of its prompt.

    Raises UnsupportedModel if the tokenizer has no usable chat template, DatasetError if the
    template refuses the conversation or its last answer does not fit.
    """
    text, spans = _find_answers(tokenizer, messages, where)
    input_ids, extents = _tokenize(tokenizer, text)
    answers = [_tokens_within(extents, span) for span in spans]
    if not answers or not answers[-1]:
        raise DatasetError(f"{where} has no answer to learn from")

    cut_tokens = max(0, len(input_ids) - max_length)
    if answers[-1][0] <= cut_tokens:
        needed = len(input_ids) - answers[-1][0] + 1
        raise DatasetError(
            f"{where}: the last answer alone takes {needed} tokens, max_length is {max_length}",
            "raise schedule.max_length or shorten the answer",
        )
    labels = [IGNORED] * len(input_ids)
    for tokens in answers:
        if tokens and tokens[0] > cut_tokens:
            labels[tokens.start : tokens.stop] = input_ids[tokens.start : tokens.stop]
    return EncodedSample(tuple(input_ids[cut_tokens:]), tuple(labels[cut_tokens:]), cut_tokens)


def _find_answers(
    tokenizer: ChatTokenizer, messages: Sequence[Message], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and which characters [start, end) of it the model learns to write."""
    if not tokenizer.chat_template:
        raise UnsupportedModel(
            "the model's tokenizer has no chat template",
            "use an instruction-tuned checkpoint, or add a chat_template.jinja to its folder",
        )
    text = _render(tokenizer, messages, False, where)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if turn == 0:
            raise DatasetError(f"{where} starts with the assistant", "put what it answers before it")
        before = messages[:turn]
        prompt = _render(tokenizer, before, True, where)
        answered = _render(tokenizer, [*before, message], False, where)
        # Any other last character will do: up to it the two renderings cannot have a common end.
        other = Message("assistant", message.content + ("y" if message.content.rstrip().endswith("x") else "x"))
        tail = _common_end(answered, _render(tokenizer, [*before, other], False, where))
        end_of_turn = _END_OF_TURN.match(tail)
        end = len(answered) - len(tail) + (end_of_turn.end() if end_of_turn else 0)
        if end <= len(prompt) or not answered.startswith(prompt) or text[:end] != answered[:end]:
            raise UnsupportedModel(
                f"the model's chat template renders {where} up to message {turn + 1} differently "
                "from the same messages within the whole conversation",
                "use samples with one answer each, or a model whose chat template leaves earlier turns alone",
            )
        spans.append((len(prompt), end))
    return text, spans


def _render(tokenizer: ChatTokenizer, messages: Sequence[Message], add_generation_prompt: bool, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(
            [message.as_dict() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateSyntaxError, ValueError) as error:  # broken, or several of them and no default
        raise UnsupportedModel(
            f"the model's chat template cannot be used: {error}",
            "correct chat_template.jinja in the model's folder",
        ) from error
    except TemplateError as error:  # such as "roles must alternate user/assistant"
        raise DatasetError(
            f"{where}: the model's chat template refuses the conversation: {error}",
            "use only the roles, and the order of them, that the model's template allows",
        ) from error


def _common_end(one: str, other: str) -> str:
    length = 0
    for one_char, other_char in zip(reversed(one), reversed(other), strict=False):
        if one_char != other_char:
            break
        length += 1
    return one[len(one) - length :]


def _tokenize(tokenizer: ChatTokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text and the characters [start, end) that each of them stands for."""
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise UnsupportedModel(
            "the model's tokenizer cannot say which characters a token stands for",
            "use a checkpoint with a tokenizer.json",
        ) from error
    extents: list[tuple[int, int]] = []
    covered = 0
    for start, end in encoding["offset_mapping"]:
        # Byte-level tokenizers may trim white space from offsets (a newline token becomes empty):
        # the gap before a token is its own. Tokens that share one character keep sharing it.
        extents.append((min(start, covered), end))
        covered = max(covered, end)
    return encoding["input_ids"], extents


def _tokens_within(extents: Sequence[tuple[int, int]], span: tuple[int, int]) -> range:
    """The tokens that hold at least one character of the span.

    A tokenizer may merge across an answer's border in templates without special tokens there;
    such a token carries loss, since the answer cannot be produced without it.
    """
    held = [index for index, (start, end) in enumerate(extents) if start < span[1] and end > span[0]]
    return range(held[0], held[-1] + 1) if held else range(0)
