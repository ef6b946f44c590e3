"""`swarm bootstrap start`, `swarm node start`, `swarm coordinator start`: the long-running processes."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated

import typer

from swarm.baton import TRAINING_SHARE
from swarm.cli.options import (
    DTYPE_NAMES,
    Announce,
    DataDirOption,
    Dtype,
    Host,
    Join,
    JoinFile,
    Json,
    LogLevel,
    Model,
    Port,
    Threads,
    named_source,
    one_of,
)
from swarm.cli.process import run, say, write_join_file
from swarm.datadir import default_data_dir
from swarm.ids import Span
from swarm.net.join import JoinInfo, parse_join

bootstrap_app = typer.Typer(help="The DHT and relay node that join strings name.", no_args_is_help=True)
node_app = typer.Typer(help="A volunteer's node: serve and train a span of blocks.", no_args_is_help=True)
coordinator_app = typer.Typer(help="The coordinator of fine-tuning jobs.", no_args_is_help=True)


@bootstrap_app.callback()
@node_app.callback()
@coordinator_app.callback()
def _group() -> None:
    pass


@bootstrap_app.command("start")
def bootstrap_start(
    model: Annotated[str, typer.Option("--model", envvar="SWARM_MODEL", help="Folder or hub id of the base model.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision (branch, tag or commit).")] = None,
    host: Host = "127.0.0.1",
    port: Port = 31330,
    announce: Announce = None,
    peer: Annotated[list[str] | None, typer.Option("--peer", help="Multiaddr of another bootstrap node.")] = None,
    seal: Annotated[
        bool, typer.Option("--seal", help="Hash all weights into the join string; peers' weights are checked by it.")
    ] = False,
    data_dir: DataDirOption = None,
    join_file: JoinFile = None,
    as_json: Json = False,
    log_level: LogLevel = "info",
) -> None:
    """Start a swarm for one base model and print its join string."""

    async def main() -> None:
        from swarm.model.checkpoint import Checkpoint
        from swarm.model.families import Parts

        # A model that is not there, or that no node could cut, is known before libp2p and torch are imported.
        checkpoint = await asyncio.to_thread(Checkpoint.open, model, revision)
        Parts.of(checkpoint.config)

        from swarm.net.bootstrap import BootstrapSettings, run_bootstrap
        from swarm.net.p2p import PeerSettings

        settings = BootstrapSettings(
            checkpoint=checkpoint,
            data_dir=data_dir or default_data_dir("bootstrap"),
            peer=PeerSettings(host=host, port=port, announce=tuple(announce or ())),
            others=tuple(peer or ()),
            seal=seal,
        )

        def ready(join: JoinInfo) -> None:
            text = join.encode()
            write_join_file(join_file, text)
            say(json.dumps({"event": "ready", "join": text}) if as_json else text)

        await run_bootstrap(settings, ready)

    run(main, role="bootstrap", log_level=log_level, as_json=as_json)


@node_app.command("start")
def node_start(
    join: Join,
    model: Model = None,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, cpu or auto.")] = "auto",
    dtype: Dtype = "auto",
    quantize: Annotated[
        str, typer.Option(help="Weights as none, int8 or int4; auto: by memory and speed unless --dtype is given.")
    ] = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="NAME=SOURCE: serve a LoRA adapter from a folder or hub id. Repeatable."),
    ] = None,
    vram: Annotated[
        str, typer.Option(help="Memory this node may use, such as 8GiB; empty: most of what is free.")
    ] = "",
    blocks: Annotated[str, typer.Option(help="START:END; empty: the span the swarm needs most that fits.")] = "",
    training_share: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="Of the computing time, what training keeps beside serving."),
    ] = TRAINING_SHARE,
    trains: Annotated[
        bool, typer.Option("--train/--no-train", help="Take part in the coordinator's jobs, or serve prompts only.")
    ] = True,
    host: Host = "127.0.0.1",
    port: Port = 0,
    announce: Announce = None,
    threads: Threads = 0,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "info",
) -> None:
    """Load a span of blocks and serve it until stopped."""

    async def main() -> None:
        # What was typed is checked before anything heavy is imported.
        info = parse_join(join)
        one_of("--dtype", dtype, DTYPE_NAMES)
        one_of("--quantize", quantize, ("auto", "none", "int8", "int4"))
        adapters = tuple(named_source(text) for text in adapter or ())
        if blocks:
            Span.parse(blocks)

        import torch

        from node.memory import parse_bytes

        memory_bytes = parse_bytes(vram) if vram else None

        from node.main import NodeSettings, run_node
        from swarm.net.p2p import PeerSettings

        if threads:
            torch.set_num_threads(threads)
        settings = NodeSettings(
            join=info,
            data_dir=data_dir or default_data_dir("node"),
            model=model or "",
            device=device,
            dtype=dtype,
            quantize=quantize,
            adapters=adapters,
            memory_bytes=memory_bytes,
            blocks=blocks,
            training_share=training_share,
            trains=trains,
            peer=PeerSettings(host=host, port=port, announce=tuple(announce or ())),
        )

        def ready(span: Span, peer_id: str) -> None:
            event = {"event": "ready", "peer": peer_id, "blocks": str(span)}
            say(json.dumps(event) if as_json else f"serving blocks {span} as {peer_id}")

        await run_node(settings, ready)

    run(main, role="node", log_level=log_level, as_json=as_json)


@coordinator_app.command("start")
def coordinator_start(
    join: Join,
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 31340,
    announce_host: Annotated[str, typer.Option(help="Host name or address that volunteers dial.")] = "",
    data_dir: DataDirOption = None,
    blobs: Annotated[
        str, typer.Option(help="Where data sets, updates and adapters are kept: a folder or a URL such as s3://….")
    ] = "",
    join_file: JoinFile = None,
    as_json: Json = False,
    log_level: LogLevel = "info",
) -> None:
    """Serve fine-tuning jobs of a swarm and print the join string that names this coordinator."""

    async def main() -> None:
        info = parse_join(join)
        from coordinator.blobstore import check_url

        check_url(blobs)
        from coordinator.main import CoordinatorStart, run_coordinator

        settings = CoordinatorStart(
            join=info,
            data_dir=data_dir or default_data_dir("coordinator"),
            model=model or "",
            host=host,
            port=port,
            announce_host=announce_host,
            blobs=blobs,
        )

        def ready(named: JoinInfo) -> None:
            text = named.encode()
            write_join_file(join_file, text)
            say(json.dumps({"event": "ready", "join": text}) if as_json else text)

        await run_coordinator(settings, ready)

    run(main, role="coordinator", log_level=log_level, as_json=as_json)
