"""`swarm generate` and `swarm status`: what users of a swarm run. Neither needs a coordinator."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from swarm.cli.options import DTYPE_NAMES, DataDirOption, Dtype, Join, Json, LogLevel, Model, Threads, one_of
from swarm.cli.process import run, say
from swarm.datadir import default_data_dir
from swarm.errors import InputError
from swarm.net.join import parse_join

if TYPE_CHECKING:
    from swarm.client.drafting import Drafter
    from swarm.client.sampling import Sampling
    from swarm.model.checkpoint import Checkpoint


def _identity_path(data_dir: Path | None) -> Path:
    return (data_dir or default_data_dir("client")) / "identity.key"


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    join: Join,
    adapter: Annotated[str, typer.Option(help="Name of an adapter that nodes announce.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of answering a chat turn.")] = False,
    activations: Annotated[
        str, typer.Option(help="Encoding on the links: bfloat16, float16, float32 or int8.")
    ] = "bfloat16",
    exact: Annotated[bool, typer.Option("--exact", help="Use only nodes whose weights are not quantized.")] = False,
    speculate: Annotated[
        str,
        typer.Option(
            help="Guess several tokens a trip: lookup (from the text so far), or a small model's folder or id."
        ),
    ] = "",
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for room on full nodes.")] = 60.0,
    model: Model = None,
    dtype: Dtype = "float32",
    threads: Threads = 0,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Prompt the swarm and print its answer as it comes."""

    async def main() -> None:
        from swarm.config import ActivationEncoding

        # What was typed is checked before anything is loaded, and before the swarm is asked.
        info = parse_join(join)
        one_of("--dtype", dtype, DTYPE_NAMES)
        one_of("--activations", activations, get_args(ActivationEncoding))
        if not prompt:
            raise InputError("the prompt is empty")
        if any("\ud800" <= char <= "\udfff" for char in prompt):
            raise InputError("the prompt is not UTF-8", "call swarm from a UTF-8 terminal or script")

        import torch

        from swarm.client.sampling import Sampling

        sampling = Sampling(temperature, top_p, top_k, seed)

        from swarm.client.speculative import speculate as speculated
        from swarm.client.swarm import open_client

        if threads:
            torch.set_num_threads(threads)
        settings = {
            "dtype": torch.float32 if dtype == "auto" else getattr(torch, dtype),
            "encoding": activations,
            "admission_s": wait,
            "exact": exact,
        }

        def waiting(position: int, reason: str) -> None:
            print(f"waiting: number {position} in the queue ({reason})", file=sys.stderr)

        async with open_client(info, _identity_path(data_dir), model or "", **settings) as client:
            ids = client.encode_prompt(prompt, chat=not raw)
            drafter = _drafter(speculate, client.checkpoint, sampling) if speculate else None
            session = await client.session(
                adapter, expected_tokens=len(ids) + max_new_tokens, waiting=None if as_json else waiting
            )
            began = time.monotonic()
            tokens: list[int] = []
            first_s = 0.0
            shown = ""
            stop = client.stop_tokens()
            if drafter is None:
                stream = session.generate(ids, max_new_tokens, sampling, stop)
            else:
                stream = speculated(session, ids, max_new_tokens, sampling, drafter, stop)
            try:
                async for token in stream:
                    first_s = first_s or time.monotonic() - began
                    tokens.append(token)
                    text = client.tokenizer.decode(tokens, skip_special_tokens=True)
                    # A character may span several tokens; print only what is complete.
                    if not as_json and not text.endswith("�"):
                        sys.stdout.write(text[len(shown) :])
                        sys.stdout.flush()
                        shown = text
            finally:
                await session.close()
            elapsed_s = time.monotonic() - began
        text = client.tokenizer.decode(tokens, skip_special_tokens=True)
        if as_json:
            result = {
                "text": text,
                "tokens": tokens,
                "prompt_tokens": len(ids),
                "hops": [{"peer": hop.peer_id, "blocks": str(hop.span)} for hop in session.hops],
                "first_token_s": round(first_s, 4),
                "tokens_per_s": round(len(tokens) / elapsed_s, 2) if tokens else 0.0,
                "activation_bytes": client.traffic.activation_bytes,
                "rebuilt": session.rebuilt,
            }
            say(json.dumps(result))
        else:
            say(text[len(shown) :])

    run(main, role="client", log_level=log_level, as_json=as_json)


def _drafter(name: str, checkpoint: Checkpoint, sampling: Sampling) -> Drafter:
    """Who guesses: the text itself, or a small model. Raises ModelNotFound, ModelMismatch (another tokenizer)."""
    from swarm.client.drafting import Assistant, PromptLookup

    if name == "lookup":
        return PromptLookup()

    from transformers import AutoModelForCausalLM

    from swarm.model.checkpoint import Checkpoint

    assistant = Checkpoint.open(name)
    assistant.check_tokenizer(checkpoint.tokenizer_hash, checkpoint.name)
    return Assistant(AutoModelForCausalLM.from_pretrained(assistant.name, revision=_revision(assistant)), sampling)


def _revision(checkpoint: Checkpoint) -> str | None:
    return None if checkpoint.revision == "local" else checkpoint.revision


def status(
    join: Join,
    model: Model = None,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Show the swarm: nodes, spans, missing blocks, adapters and, where there is a coordinator, jobs."""

    async def main() -> None:
        info = parse_join(join)

        from swarm.cli.status_view import collect, render
        from swarm.client.avoid import AVOID_FILE, AvoidList
        from swarm.identity import Identity
        from swarm.net.p2p import Peer, PeerSettings
        from swarm.net.peer_source import open_or_fetch

        key = _identity_path(data_dir)
        peer = await Peer.start(Identity.load_or_create(key), info.bootstrap, PeerSettings(client_only=True))
        try:
            checkpoint = await open_or_fetch(peer, info, model or "", seal_hash=info.seal_hash)
            avoided = AvoidList(key.with_name(AVOID_FILE)).current()
            result = await collect(peer, info, checkpoint.n_blocks, avoided)
        finally:
            await peer.stop()
        if as_json:
            say(json.dumps(result))
        else:
            render(result)

    run(main, role="client", log_level=log_level, as_json=as_json)
