"""`swarm chat`: a conversation with the swarm's model, kept in one session.

Each turn renders the whole conversation with the model's chat template; what the session's KV cache
already holds of it is not sent again, and where the template renders history differently the
cache goes back to the common part. Lines of a pipe are turns too. Ctrl-C stops the answer
and keeps the session; at the prompt, Ctrl-D or /exit ends. Answers go to stdout, notices to stderr.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_args

import typer

from swarm.cli.options import DTYPE_NAMES, DataDirOption, Dtype, Join, Json, LogLevel, Model, Threads, one_of
from swarm.cli.process import fail, prepare, say
from swarm.errors import InputError, SwarmError
from swarm.net.join import parse_join

if TYPE_CHECKING:
    from swarm.client.conversation import Conversation
    from swarm.client.remote import SwarmForCausalLM

_COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit ends"


def chat(
    join: Join,
    adapter: Annotated[str, typer.Option(help="Name of an adapter that nodes announce.")] = "",
    system: Annotated[str, typer.Option(help="The system prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    activations: Annotated[
        str, typer.Option(help="Encoding on the links: bfloat16, float16, float32 or int8.")
    ] = "bfloat16",
    exact: Annotated[bool, typer.Option("--exact", help="Use only nodes whose weights are not quantized.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for room on full nodes.")] = 60.0,
    model: Model = None,
    dtype: Dtype = "float32",
    threads: Threads = 0,
    data_dir: DataDirOption = None,
    as_json: Json = False,
    log_level: LogLevel = "warning",
) -> None:
    """Talk with the swarm's model; each line of a pipe is a turn."""

    def main() -> None:
        from swarm.config import ActivationEncoding

        # What was typed is checked before anything is loaded, and before the swarm is asked.
        parse_join(join)
        one_of("--dtype", dtype, DTYPE_NAMES)
        one_of("--activations", activations, get_args(ActivationEncoding))

        import torch

        from swarm.client.sampling import Sampling

        sampling = Sampling(temperature, top_p, top_k, seed)
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if settings["do_sample"]:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}

        from swarm.client.conversation import Conversation
        from swarm.client.remote import SwarmForCausalLM

        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(sampling.seed)
        loaded = SwarmForCausalLM.from_pretrained(
            model,
            join=join,
            adapter=adapter,
            dtype="float32" if dtype == "auto" else dtype,
            encoding=activations,
            exact=exact,
            admission_s=wait,
            data_dir=data_dir,
            waiting=lambda position, reason: _notice(f"waiting for admission: position {position} ({reason})"),
        )
        with loaded:
            conversation = Conversation(loaded, system, max_new_tokens, settings)
            _talk(conversation, loaded, as_json=as_json)

    _guarded(main, log_level=log_level, as_json=as_json)


def _talk(conversation: Conversation, model: SwarmForCausalLM, *, as_json: bool) -> None:
    """Turn after turn until the input ends. Errors of a turn end a pipe, but not a conversation with a person."""
    person = sys.stdin.isatty() and not as_json
    if person:
        _notice(f"{model.client.checkpoint.name}; {_COMMANDS}; Ctrl-C stops an answer")
    for line in _lines(person):
        if any("\ud800" <= char <= "\udfff" for char in line):
            raise InputError("the line is not UTF-8", "call swarm from a UTF-8 terminal or script")
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
            continue
        try:
            turn = conversation.answer(line, (lambda _: None) if as_json else _show)
        except SwarmError as error:
            if not person:
                raise
            print(f"\nerror {error.code}: {error.cause}\n  fix: {error.fix}", file=sys.stderr, flush=True)
            continue
        if as_json:
            session = conversation.cache.session
            hops = [{"peer": hop.peer_id, "blocks": str(hop.span)} for hop in session.hops] if session else []
            say(json.dumps({**vars(turn), "hops": hops, "activation_bytes": model.client.traffic.activation_bytes}))
        else:
            say("")
            if turn.stopped == "length":
                _notice("the answer was cut: it reached --max-new-tokens or the model's context")
            elif turn.stopped == "interrupted":
                _notice("stopped")
                if not person:  # a script's Ctrl-C means the script
                    raise KeyboardInterrupt


def _obey(line: str, conversation: Conversation) -> bool:
    """Follow a command; False if it is the last one."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        _notice("the conversation is forgotten")
    elif command == "/system":
        conversation.system = rest.strip()
        _notice("the system prompt is set" if rest.strip() else "there is no system prompt")
    else:
        _notice(f"there is no {command}: {_COMMANDS}")
    return True


def _lines(person: bool) -> Iterator[str]:
    """What the user says, line by line, without empty ones."""
    if person:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and history
    while True:
        try:
            line = input("> ") if person else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not person:
                raise
            _notice("Ctrl-D or /exit ends")
            continue
        if not person and not line:
            return
        if line.strip():
            yield line.strip()


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notice(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _tell_of_interruptions(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A log line about the session's chain, as a person wants to read it."""
    import structlog

    if event.get("event") == "session_interrupted":
        blamed = str(event.get("blame") or "")
        _notice(f"node {blamed[-6:]} left, rebuilding" if blamed else "the chain was interrupted, rebuilding")
        raise structlog.DropEvent
    return event


def _guarded(main: Callable[[], None], *, log_level: str, as_json: bool) -> None:
    """Run a command in this thread: Ctrl-C is its own affair, SIGTERM ends it with its clean-up."""
    import structlog

    prepare("client", log_level)
    if sys.stderr.isatty():
        structlog.configure(processors=[_tell_of_interruptions, *structlog.get_config()["processors"]])

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        main()
    except SwarmError as error:
        fail(error, as_json=as_json)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
