"""A model over a swarm does what `transformers` does with the same checkpoint in this process."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from swarm import SwarmForCausalLM
from swarm.client.cache import RemoteCache
from swarm.client.conversation import Conversation
from swarm.errors import ContextTooLong, InputError, SessionError
from tests.integration.processes import ENVIRONMENT, Swarm

PROMPT = "The sea was calm. The sea was cold. The ship"
UNEQUAL = ["The capital of France is", "Once upon a time, in a village without a name, there lived", "Two plus two"]


@pytest.fixture(scope="module")
def swarm(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    running = Swarm(tmp_path_factory.mktemp("remote"), smollm2)
    try:
        running.bootstrap()
        spans = {"a": "0:15", "b": "15:30"}
        for node in [running.node(name, blocks, "--dtype", "float32") for name, blocks in spans.items()]:
            node.event()
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def remote(swarm: Swarm, smollm2: Path) -> Iterator[SwarmForCausalLM]:
    torch.set_num_threads(1)
    with _load(swarm, smollm2, "client") as model:
        yield model


def _load(swarm: Swarm, smollm2: Path, name: str) -> SwarmForCausalLM:
    return SwarmForCausalLM.from_pretrained(
        smollm2, join=swarm.join, dtype="float32", encoding="float32", exact=True, data_dir=swarm.root / name
    )


@pytest.fixture(scope="module")
def local(smollm2: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> torch.Tensor:
    return torch.as_tensor(tokenizer(PROMPT, return_tensors="pt")["input_ids"])


def _same(remote: SwarmForCausalLM, local: Any, inputs: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Both models' answers, which must be one."""
    torch.manual_seed(7)
    expected = local.generate(inputs, **settings)
    torch.manual_seed(7)
    found = remote.generate(inputs, **settings)
    assert found.tolist() == expected.tolist()
    return torch.as_tensor(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "max_new_tokens": 24},
        {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_new_tokens": 16},
        {"num_beams": 3, "max_new_tokens": 12},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True, "max_new_tokens": 8},
        {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8},
        {"repetition_penalty": 1.3, "max_new_tokens": 16},
        {"prompt_lookup_num_tokens": 4, "max_new_tokens": 24},
        {"prompt_lookup_num_tokens": 4, "do_sample": True, "max_new_tokens": 12},
        {"use_cache": False, "max_new_tokens": 3},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_decoding(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor, settings: dict[str, Any]) -> None:
    _same(remote, local, prompt, **settings)


@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor, do_sample: bool) -> None:
    sent = remote.client.traffic.activation_bytes
    _same(remote, local, prompt, assistant_model=local, do_sample=do_sample, max_new_tokens=20)
    assert remote.client.traffic.activation_bytes > sent


def test_stop_strings(remote: SwarmForCausalLM, local: Any, tokenizer: Any, prompt: torch.Tensor) -> None:
    found = _same(remote, local, prompt, stop_strings=["."], tokenizer=tokenizer, max_new_tokens=40)
    text = tokenizer.decode(found[0, prompt.shape[1] :])
    assert text.endswith(".") or "." in text[-4:]
    assert found.shape[1] < prompt.shape[1] + 40


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_rows_of_unequal_length(remote: SwarmForCausalLM, local: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
    batch = tokenizer(UNEQUAL, return_tensors="pt", padding=True)
    mask = batch["attention_mask"]
    assert not bool(mask.all())
    _same(remote, local, batch["input_ids"], attention_mask=mask, max_new_tokens=8, **settings)


def test_streamer_sees_every_token(remote: SwarmForCausalLM, prompt: torch.Tensor) -> None:
    class Collect(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Collect()
    found = remote.generate(prompt, streamer=streamer, max_new_tokens=5)
    assert streamer.seen == [*found[0].tolist(), -1]


def test_calls_of_a_session_continue_its_cache(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor) -> None:
    whole = local.generate(prompt, max_new_tokens=18)
    with remote.session() as cache:
        first = remote.generate(prompt, max_new_tokens=6)
        session, traffic = cache.session, remote.client.traffic
        assert cache.get_seq_length() == first.shape[1] - 1
        before = traffic.activation_bytes
        second = remote.generate(first, max_new_tokens=6)
        # One token a step, whatever came before it.
        assert traffic.activation_bytes - before < 6 * 4 * 4 * 576
        third = remote.generate(max_new_tokens=6)
        assert third.tolist() == whole.tolist()
        # Another end of the same text, then another text: what is shared is kept, the rest rolled back.
        other = torch.cat([second[:, :-3], second[:, :2]], dim=1)
        assert remote.generate(other, max_new_tokens=6).tolist() == local.generate(other, max_new_tokens=6).tolist()
        assert remote.generate(other[:, 2:], max_new_tokens=4).tolist() == (
            local.generate(other[:, 2:], max_new_tokens=4).tolist()
        )
        # Other strategies go on from the same cache.
        for settings in ({"prompt_lookup_num_tokens": 3}, {"num_beams": 2}, {"assistant_model": local}):
            _same(remote, local, second, max_new_tokens=6, **settings)
        assert cache.session is session


def test_a_returned_cache_can_be_passed_back(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor) -> None:
    out = remote.generate(prompt, max_new_tokens=6, return_dict_in_generate=True)
    more = remote.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=6)
    assert more.tolist() == local.generate(prompt, max_new_tokens=12).tolist()
    out.past_key_values.close()


@torch.no_grad()
def test_rolled_back_is_as_fresh(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor) -> None:
    fresh = remote(prompt)
    cache = fresh.past_key_values
    cache.crop(-5)
    again = remote(prompt[:, -5:], past_key_values=cache)
    torch.testing.assert_close(again.logits, fresh.logits[:, -5:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.logits, local(prompt).logits[:, -5:], atol=1e-4, rtol=1e-4)
    # Rows: repeated, then reordered and dropped before the next step, which carries it.
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    rows = remote(torch.stack([prompt[0, -1:], prompt[0, :1]]), past_key_values=cache)
    torch.testing.assert_close(rows.logits[0, -1], fresh.logits[0, -1], atol=1e-4, rtol=1e-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.crop(-1)
    last = remote(prompt[:, -1:], past_key_values=cache)
    torch.testing.assert_close(last.logits[0, -1], fresh.logits[0, -1], atol=1e-4, rtol=1e-4)
    cache.close()


@torch.no_grad()
def test_forward_gives_logits_and_loss(remote: SwarmForCausalLM, local: Any, tokenizer: Any) -> None:
    batch = tokenizer(UNEQUAL, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = mask.bool()
    for kwargs in (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)},
        {"inputs_embeds": local.get_input_embeddings()(ids), "attention_mask": mask},
    ):
        found, expected = remote(**kwargs, use_cache=False), local(**kwargs, use_cache=False)
        torch.testing.assert_close(found.logits[real], expected.logits[real], atol=1e-4, rtol=1e-4)
        assert found.past_key_values is None
    labels = ids.masked_fill(mask == 0, -100)
    found_loss = remote(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found_loss, local(ids, attention_mask=mask, labels=labels).loss, atol=1e-4, rtol=1e-4)
    kept = remote(ids, attention_mask=mask, logits_to_keep=2, use_cache=False).logits
    assert kept.shape[1] == 2


def test_gradients_through_remote_blocks(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor) -> None:
    gradients = []
    for model in (remote, local):
        embeds = model.get_input_embeddings()(prompt).detach().requires_grad_()
        model(inputs_embeds=embeds, labels=prompt).loss.backward()
        gradients.append(embeds.grad)
    found, expected = gradients
    assert found is not None
    assert expected is not None
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_gradients_of_padded_rows(remote: SwarmForCausalLM, local: Any, tokenizer: Any) -> None:
    batch = tokenizer(UNEQUAL, return_tensors="pt", padding=True)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    gradients = []
    for model in (remote, local):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append(embeds.grad[mask.bool()])
    found, expected = gradients
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_prompt_tuning_on_the_client(remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor) -> None:
    """Four trainable embeddings in front of a text, a few steps: the loss falls, and as it does locally."""
    losses = []
    for model in (remote, local):
        torch.manual_seed(0)
        soft = torch.nn.Parameter(0.1 * torch.randn(1, 4, model.config.hidden_size))
        optimizer = torch.optim.AdamW([soft], lr=0.05)
        labels = torch.cat([torch.full((1, 4), -100), prompt], dim=1)
        steps = []
        for _ in range(5):
            embeds = torch.cat([soft, model.get_input_embeddings()(prompt)], dim=1)
            loss = model(inputs_embeds=embeds, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(float(loss.detach()))
        losses.append(steps)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_second_backward_pass_is_refused(remote: SwarmForCausalLM, prompt: torch.Tensor) -> None:
    embeds = remote.get_input_embeddings()(prompt).detach().requires_grad_()
    loss = remote(inputs_embeds=embeds, labels=prompt).loss
    loss.backward(retain_graph=True)
    with pytest.raises(SessionError):
        loss.backward()


def test_errors_pass_through_generate(remote: SwarmForCausalLM, prompt: torch.Tensor) -> None:
    too_long = prompt[:, :1].repeat(1, remote.client.context_length + 1)
    with pytest.raises(ContextTooLong):
        remote.generate(too_long, max_new_tokens=1)
    with pytest.raises(InputError):
        remote.generate(prompt, cache_implementation="static")
    with pytest.raises(InputError):
        remote.generate(prompt, output_hidden_states=True, return_dict_in_generate=True)
    with pytest.raises(InputError):
        remote(prompt, past_key_values=_foreign_cache())
    assert remote.generate(prompt, max_new_tokens=1).shape[1] == prompt.shape[1] + 1


def _foreign_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def test_ctrl_c_stops_the_call_and_keeps_the_session(
    remote: SwarmForCausalLM, local: Any, prompt: torch.Tensor
) -> None:
    class Interrupt(BaseStreamer):  # type: ignore[misc]
        puts = 0

        def put(self, value: torch.Tensor) -> None:
            self.puts += 1
            if self.puts == 5:  # while the next step is on its way
                threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()

        def end(self) -> None: ...

    # A shell that starts this in the background has the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with remote.session() as cache:
        try:
            with pytest.raises(KeyboardInterrupt):
                remote.generate(prompt, max_new_tokens=200, do_sample=False, eos_token_id=None, streamer=Interrupt())
        finally:
            signal.signal(signal.SIGINT, before)
        assert prompt.shape[1] <= cache.get_seq_length() < prompt.shape[1] + 100
        _same(remote, local, prompt, max_new_tokens=10)


def test_what_is_dropped_is_closed(swarm: Swarm, smollm2: Path, prompt: torch.Tensor) -> None:
    model = _load(swarm, smollm2, "dropped")
    with torch.no_grad():
        cache: RemoteCache = model(prompt).past_key_values
    session, loop = cache.session, model._loop
    assert session is not None
    assert session._chain is not None
    del cache
    gc.collect()
    loop.call(lambda: asyncio.sleep(0))  # the cache's finalizer has asked the loop before
    assert session._chain is None
    del model
    gc.collect()
    assert loop.closed
    with pytest.raises(SessionError):
        loop.call(loop.client.view)


def test_a_conversation_sends_only_what_is_new(remote: SwarmForCausalLM, local: Any, tokenizer: Any) -> None:
    conversation = Conversation(remote, "", 12, {"do_sample": False})
    shown: list[str] = []
    first = conversation.answer("What is the capital of France?", shown.append)
    second = conversation.answer("And of Italy?", shown.append)
    assert "".join(shown) == first.text + second.text
    assert "Paris" in first.text
    assert first.reused_tokens == 0
    # Everything of the first turn but the token that ended it, which was never fed.
    assert second.reused_tokens >= first.prompt_tokens + len(first.tokens) - 1
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And of Italy?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    expected = local.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert second.text == tokenizer.decode(expected, skip_special_tokens=True)
    # Another system prompt renders all of it differently: the cache goes back, the session stays.
    session = conversation.cache.session
    conversation.system = "You are a pirate."
    third = conversation.answer("Who are you?", shown.append)
    assert third.reused_tokens < second.reused_tokens
    assert conversation.cache.session is session
    conversation.reset()
    assert conversation.answer("Hello", shown.append).reused_tokens == 0
    conversation.reset()


def test_chat_command_takes_lines_of_a_pipe(swarm: Swarm) -> None:
    command = [sys.executable, "-c", "import typer; from swarm.cli.chat import chat; typer.run(chat)"]
    flags = ["--join", swarm.join, "--data-dir", str(swarm.root / "chat"), "--max-new-tokens", "8"]
    lines = "What is the capital of France?\n\n/reset\nAnd of Italy?\n/exit\nnever said\n"
    result = subprocess.run(
        [*command, *flags, "--json"], input=lines, capture_output=True, text=True, timeout=120, env=_environment()
    )
    assert result.returncode == 0, result.stderr
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert [turn["reused_tokens"] for turn in turns] == [0, 0]
    assert "Paris" in turns[0]["text"]
    assert [hop["blocks"] for hop in turns[0]["hops"]] == ["0:15", "15:30"]
    refused = subprocess.run(
        [*command, *flags, "--adapter", "nobody"], input="hi\n", capture_output=True, text=True, timeout=120,
        env=_environment(),
    )  # fmt: skip
    assert refused.returncode == 1
    assert "SW405" in refused.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT}


def test_a_node_that_dies_is_replaced(swarm: Swarm, smollm2: Path, local: Any, prompt: torch.Tensor) -> None:
    """Within a call of generate(), and between a forward pass and its backward pass."""
    swarm.node("spare", "15:30", "--dtype", "float32").event()
    second = {name: process for process in swarm.processes if (name := process.name) in ("b", "spare")}
    peers = {process.wait_log("serving")["peer"]: process for process in second.values()}

    class Kill(BaseStreamer):  # type: ignore[misc]
        puts = 0
        killed = ""

        def put(self, value: torch.Tensor) -> None:
            self.puts += 1
            if self.puts == 5:
                assert cache.session is not None
                self.killed = cache.session.hops[-1].peer_id
                peers[self.killed].kill()

        def end(self) -> None: ...

    with _load(swarm, smollm2, "failover") as model:
        gradients = []
        for one in (model, local):
            embeds = one.get_input_embeddings()(prompt).detach().requires_grad_()
            gradients.append((embeds, one(inputs_embeds=embeds, labels=prompt).loss))
        kill = Kill()
        with model.session() as cache:
            found = model.generate(prompt, max_new_tokens=16, streamer=kill)
            assert cache.session is not None
            assert cache.session.hops[-1].peer_id not in ("", kill.killed)
        assert kill.killed
        assert found.tolist() == local.generate(prompt, max_new_tokens=16).tolist()
        for _, loss in gradients:
            loss.backward()
        (embeds, _), (expected, _) = gradients
        assert float((embeds.grad - expected.grad).norm() / expected.grad.norm()) < 1e-4
