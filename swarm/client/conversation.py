"""A conversation with a swarm's model: its messages, and the session that holds their tokens.

In: what a person says. Out: the answer, piece by piece and as a whole. Each turn renders all messages
with the model's chat template; what the session's KV cache holds of it is not sent again, and where
the template renders history differently the cache goes back to the common part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from swarm.client.remote import SwarmForCausalLM
from swarm.errors import ContextTooLong, UnsupportedModel


@dataclass(frozen=True)
class Turn:
    """One answer."""

    text: str
    tokens: list[int]
    """Without the one that ended it."""
    prompt_tokens: int
    """Of the whole conversation up to the answer."""
    reused_tokens: int
    """Of those, how many the session's cache held already."""
    stopped: str
    """end, length or interrupted."""
    first_token_s: float
    tokens_per_s: float


class _Printer:
    """What `generate` streams to: collects an answer's tokens and shows what is complete of its text."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._show = show
        self._prompt_seen = False
        self._shown = ""
        self.tokens: list[int] = []
        self.first = 0.0

    @property
    def text(self) -> str:
        return str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.first = self.first or time.monotonic()
        self.tokens += value.flatten().tolist()
        text = self.text
        if not text.endswith("�"):  # a character may span several tokens
            self._show(text[len(self._shown) :])
            self._shown = text

    def end(self) -> None:
        self._show(self.text[len(self._shown) :])
        self._shown = self.text


class Conversation:
    """Messages, and the session that holds their tokens."""

    def __init__(self, model: SwarmForCausalLM, system: str, max_new_tokens: int, settings: dict[str, Any]) -> None:
        """settings: how `generate` picks tokens. Raises UnsupportedModel without a chat template."""
        self._model = model
        self._tokenizer = model.client.tokenizer
        if not self._tokenizer.chat_template:
            raise UnsupportedModel(
                "the model's tokenizer has no chat template", "continue texts with `swarm generate --raw` instead"
            )
        stop = sorted(model.client.stop_tokens())
        self._settings = {**settings, "eos_token_id": stop, "pad_token_id": stop[0]} if stop else settings
        self._max_new_tokens = max_new_tokens
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.cache = model.new_cache()

    def reset(self) -> None:
        """Forget the messages and free the nodes' memory."""
        self.messages.clear()
        self.cache.close()

    def _render(self) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = self._tokenizer.apply_chat_template(
            [*system, *self.messages], tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str, show: Callable[[str], None]) -> Turn:
        """Say something and stream what the model answers. Ctrl-C ends the answer; what came of it is kept.

        Raises ContextTooLong and what a session raises; the turn is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self._render()
            room = self._model.client.context_length - len(ids)
            if room < 1:
                raise ContextTooLong(
                    f"the conversation has {len(ids)} tokens, the model's context {self._model.client.context_length}",
                    "forget it with /reset",
                )
            prompt = torch.tensor([ids])
            self.cache.align(prompt, None)
            reused, began = self.cache.get_seq_length(), time.monotonic()
            printer = _Printer(self._tokenizer, show)
            try:
                self._model.generate(
                    prompt,
                    past_key_values=self.cache,
                    max_new_tokens=min(self._max_new_tokens, room),
                    streamer=printer,
                    **self._settings,
                )
                ended = printer.tokens and printer.tokens[-1] in self._settings.get("eos_token_id", ())
                stopped = "end" if ended else "length"
            except KeyboardInterrupt:
                stopped = "interrupted"
            printer.end()
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": printer.text})
        elapsed_s = time.monotonic() - began
        return Turn(
            text=printer.text,
            tokens=printer.tokens[:-1] if stopped == "end" else printer.tokens,
            prompt_tokens=len(ids),
            reused_tokens=reused,
            stopped=stopped,
            first_token_s=round(printer.first - began, 4) if printer.first else 0.0,
            tokens_per_s=round(len(printer.tokens) / elapsed_s, 2) if elapsed_s else 0.0,
        )
