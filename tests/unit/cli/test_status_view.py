from __future__ import annotations

import io

from rich.console import Console

from swarm.cli.status_view import Status, node_row, render
from swarm.ids import Span
from swarm.net.view import NodeInfo


def shown(*nodes: NodeInfo, avoided: dict[str, tuple[str, float]] | None = None) -> str:
    status = Status(
        model="m",
        revision="r",
        blocks=12,
        missing_blocks=[11],
        nodes=[node_row(node, "", avoided) for node in nodes],
        adapters=[],
        coordinator="none",
        jobs=[],
    )
    console = Console(file=io.StringIO(), width=400)
    render(status, console)
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_a_node_is_told_in_words() -> None:
    node = NodeInfo(
        peer_id="12D3a",
        span=Span(0, 11),
        state="draining",
        reason="moving to where it helps more",
        next_span=Span(1, 12),
        quantization="int8",
        dtype="bfloat16",
        decode_s_per_block=0.0015,
        decode8_s_per_block=0.0024,
        prefill_tokens_per_s=812.4,
        link_bytes_per_s=2.5e6,
        sessions=1,
        queue=3,
        kv_free_bytes=2**30,
        kv_total_bytes=2**32,
    )
    text = shown(node, avoided={"12D3a": ("sent NaN", 40.2)})
    for words in (
        "0:11",
        "int8, bfloat16",
        "1.5 ms a block, 2.4 ms for 8 rows, prefill 812 tokens/s, link 2.5 MB/s",
        "1 session, 3 waiting",
        "1.00 of 4.00 GiB free",
        "draining: moving to where it helps more, moves to blocks 1:12, avoided for 40 s: sent NaN",
        "no node holds blocks 11",
    ):
        assert words in text


def test_what_was_not_measured_is_said_and_markup_of_strangers_is_text() -> None:
    text = shown(NodeInfo(peer_id="12D3b", span=Span(0, 1), reason="[red]loud[/nonsense]"))
    assert "not measured" in text
    assert "not told" in text
    assert "serving: [red]loud[/nonsense]" in text
    assert "0 sessions" in text
