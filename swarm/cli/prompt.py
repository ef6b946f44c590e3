"""`swarm generate` and `swarm status`: what users of a swarm run. Neither needs a coordinator."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from swarm.cli.options import DataDirOption, Dtype, Join, Json, LogLevel, Model, Threads
from swarm.cli.process import run, say
from swarm.datadir import default_data_dir
from swarm.net.join import JoinInfo, parse_join

if TYPE_CHECKING:
    from swarm.client.session import SwarmClient


def _client(join: JoinInfo, model: str | None, dtype: str, encoding: str, data_dir: DataDirOption) -> SwarmClient:
    import torch

    from swarm.client.session import SwarmClient
    from swarm.model.checkpoint import open_for

    return SwarmClient(
        join,
        open_for(join.model, join.revision, join.model_hash, model or ""),
        (data_dir or default_data_dir("client")) / "identity.key",
        dtype={"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32),
        encoding=encoding,
    )


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    join: Join,
    adapter: Annotated[str, typer.Option(help="Name of an adapter that nodes announce.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of answering a chat turn.")] = False,
    activations: Annotated[
        str, typer.Option(help="Encoding on the links: bfloat16, float16, float32 or int8.")
    ] = "bfloat16",
    model: Model = None,
    dtype: Dtype = "float32",
    threads: Threads = 0,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Prompt the swarm and print its answer as it comes."""

    async def main() -> None:
        import torch

        from swarm.client.sampling import Sampling

        if threads:
            torch.set_num_threads(threads)
        sampling = Sampling(temperature, top_p, top_k, seed)
        async with _client(parse_join(join), model, dtype, activations, data_dir) as client:
            ids = client.encode_prompt(prompt, chat=not raw)
            session = await client.session(adapter)
            began = time.monotonic()
            tokens: list[int] = []
            first_s = 0.0
            shown = ""
            try:
                async for token in session.generate(ids, max_new_tokens, sampling, client.stop_tokens()):
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
            }
            say(json.dumps(result))
        else:
            say(text[len(shown) :])

    run(main, role="client", log_level=log_level, as_json=as_json)


def status(
    join: Join,
    model: Model = None,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Show the swarm: nodes, spans, missing blocks, adapters and, where there is a coordinator, jobs."""

    async def main() -> None:
        from swarm.cli.status_view import collect, render

        info = parse_join(join)
        async with _client(info, model, "float32", "bfloat16", data_dir) as client:
            result = await collect(client, info, (data_dir or default_data_dir("client")) / "identity.key")
        if as_json:
            say(json.dumps(result))
        else:
            render(result)

    run(main, role="client", log_level=log_level, as_json=as_json)
