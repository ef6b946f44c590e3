"""Bad input: one clear error with a code, a cause and a fix, a non-zero exit, and nothing left or half-written."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from swarm.identity import Identity
from swarm.model.checkpoint import Checkpoint
from swarm.net.join import parse_join
from tests.integration.processes import Swarm
from tests.integration.traces import Answer, ask

WAIT_LIMIT_S = 15.0
"""For others to answer. Importing torch before, which takes longer the busier the machine is, does not count."""
COMMANDS_AT_ONCE = 3
"""Their time is mostly start-up: two use both cores while one waits for an answer that does not come."""
GOOD_LINE = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
WHOLE_FILES = {"identity.key", "lock", "tls.pem", "coordinator.db", "blobs"}
"""What a data folder may hold after a failed start: each is written whole or not at all."""
JOB_FILES = {
    "not-yaml": "name: [sentiment\ndata: {train: good.jsonl}\n",
    "unknown-key": "name: a\ndata: {train: good.jsonl}\nschedule: {rounds: 2, epochs: 3}\n",
    "twice": "name: a\nname: b\ndata: {train: good.jsonl}\n",
    "wrong-type": "name: a\ndata: {train: good.jsonl}\nschedule: {inner_steps: many}\n",
    "missing": "name: a\n",
    "bad-line": "name: a\ndata: {train: bad.jsonl}\n",
    "no-data": "name: a\ndata: {train: nowhere.jsonl}\n",
}


@dataclass(frozen=True)
class Case:
    """A command as it is typed, and what its error must say. Words in braces are filled in from `Places`."""

    name: str
    command: str
    code: str
    says: tuple[str, ...] = ()
    within_s: float = 60.0
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    # --- the model
    Case("model-no-folder", "bootstrap start --port 0 --model {root}/nowhere", "SW103", ("{root}/nowhere",)),
    Case("model-no-config", "bootstrap start --port 0 --model {root}/no-config", "SW103", ("config.json",)),
    Case("model-bad-config", "bootstrap start --port 0 --model {root}/bad-config", "SW104", ("config.json",)),
    Case("model-no-plan", "bootstrap start --port 0 --model {root}/no-plan", "SW104", ("stablelm", "pipeline plan")),
    Case("model-cut-off", "bootstrap start --port 0 --model {root}/cut-off", "SW702", ("model.safetensors", "cut off")),
    Case(
        *("hub-offline", "bootstrap start --port 0 --model acme/tiny", "SW103", ("acme/tiny", "HF_HUB_OFFLINE")),
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    Case(
        *("hub-closed", "bootstrap start --port 0 --model acme/tiny", "SW103", ("acme/tiny", "HF_ENDPOINT")),
        environment={"HF_ENDPOINT": "http://127.0.0.1:{closed}"},
    ),
    Case("model-other-weights", "node start --join {join} --model {root}/other-weights", "SW402", ("other-weights",)),
    Case("model-other-config", "status --join {join} --model {root}/other-config", "SW402", ("other-config",)),
    Case("tokenizer-other", "generate Hi --join {join} --model {root}/other-tokenizer", "SW402", ("other tokens",)),
    Case("tokenizer-other-node", "node start --join {join} --model {root}/other-tokenizer", "SW402", ("other tokens",)),
    # --- the join string
    Case("join-not-one", "status --join hello", "SW302", ("not a join string",)),
    Case("join-cut-off", "node start --join {cut_join}", "SW302", ("cut off",)),
    Case("join-malformed", "generate Hi --join swarm1-%%%", "SW302", ("damaged",)),
    Case("join-no-file", "coordinator start --join @{root}/nowhere", "SW302", ("{root}/nowhere",)),
    Case("join-file-not-text", "job list --join @{root}/noise", "SW302", ("{root}/noise",)),
    # --- nobody there
    Case("closed-node", "node start --log-level info --join {closed_join}", "SW301", ("{closed}",)),
    Case("closed-generate", "generate Hi --log-level info --join {closed_join}", "SW301", ("{closed}",)),
    Case("closed-status", "status --log-level info --join {closed_join}", "SW301", ("{closed}",)),
    Case("silent-node", "node start --log-level info --join {silent_join}", "SW301", ("{silent}",)),
    Case("silent-generate", "generate Hi --log-level info --join {silent_join}", "SW301", ("{silent}",)),
    Case("silent-status", "status --log-level info --join {silent_join}", "SW301", ("{silent}",)),
    Case("coordinator-closed", "job list --join {closed_coordinator_join}", "SW308", ("{closed}",), WAIT_LIMIT_S),
    Case("coordinator-silent", "job list --join {silent_coordinator_join}", "SW308", ("{silent}",), WAIT_LIMIT_S),
    Case("coordinator-other-key", "job list --join {other_key_join}", "SW204", ("TLS key",)),
    Case("coordinator-none", "job list --join {bootstrap_join}", "SW308", ("names no coordinator",)),
    # --- this machine
    Case("blocks-not-a-span", "node start --join {join} --blocks x", "SW105", ("'x'",)),
    Case("blocks-beyond", "node start --join {join} --blocks 20:40", "SW105", ("20:40", "30 blocks")),
    Case("device-unknown", "node start --join {join} --device banana", "SW502", ("banana",)),
    Case("dtype-unknown", "node start --join {join} --dtype float7", "SW100", ("float7", "bfloat16")),
    Case("vram-unknown", "node start --join {join} --vram lots", "SW100", ("lots", "8GiB")),
    Case("vram-no-block", "node start --join {join} --vram 1MiB", "SW501", ("1 MiB", "--vram", "--dtype")),
    Case(
        *("vram-span", "node start --join {join} --vram 50MiB --blocks 0:15 --quantize none", "SW501"),
        ("--blocks", "--dtype"),
    ),
    Case("vram-narrow", "node start --join {join} --vram 25MiB --blocks 0:15", "SW501", ("0:15", "--vram")),
    Case("host-not-here", "bootstrap start --model {model} --port 0 --host nowhere", "SW100", ("nowhere", "--host")),
    Case("port-bootstrap", "bootstrap start --model {model} --port {bootstrap_port}", "SW307", ("{bootstrap_port}",)),
    Case("port-coordinator", "coordinator start --join {join} --port {silent}", "SW307", ("{silent}",)),
    Case("locked-coordinator", "coordinator start --join {join} --port 0 --data-dir {coordinator_data}", "SW701"),
    Case("locked-node", "node start --join {join} --data-dir {node_data}", "SW701", ("{node_data}",)),
    # --- jobs
    Case("job-no-file", "job submit {root}/nowhere.yaml --join {join}", "SW101", ("nowhere.yaml",)),
    Case("job-not-yaml", "job submit {root}/not-yaml.yaml --join {join}", "SW101", ("line 2",)),
    Case("job-unknown-key", "job submit {root}/unknown-key.yaml --join {join}", "SW101", ("schedule.epochs",)),
    Case("job-key-twice", "job submit {root}/twice.yaml --join {join}", "SW101", ("'name'", "twice")),
    Case("job-wrong-type", "job submit {root}/wrong-type.yaml --join {join}", "SW101", ("schedule.inner_steps",)),
    Case("job-missing-key", "job submit {root}/missing.yaml --join {join}", "SW101", ("data",)),
    Case("data-bad-line", "job submit {root}/bad-line.yaml --join {join}", "SW102", ("{root}/bad.jsonl line 3",)),
    Case("data-no-file", "job submit {root}/no-data.yaml --join {join}", "SW102", ("nowhere.jsonl",)),
    Case("job-unknown", "job status sentiment --join {join}", "SW601", ("sentiment", "job list")),
    Case("job-export-unknown", "job export sentiment --out {root}/out --join {join}", "SW601", ("sentiment",)),
    Case(
        "job-export-onto", "job export sentiment --out {root}/no-config --join {join}", "SW700", ("no-config", "--out")
    ),
    # --- prompts
    Case("blocks-missing", "generate Hi --join {half_join}", "SW401", ("15-29", "swarm node start")),
    Case("adapter-unknown", "generate Hi --adapter sentiment --join {join}", "SW405", ("sentiment",)),
    Case("prompt-empty", "generate '' --join {join}", "SW100", ("empty",)),
    Case("prompt-too-long", "generate '{long_prompt}' --join {join}", "SW404", ("8192", "shorten")),
    Case("top-p", "generate Hi --temperature 1 --top-p 1.5 --join {join}", "SW100", ("top_p",)),
    Case("activations", "generate Hi --activations int3 --join {join}", "SW100", ("int3", "int8")),
]


@dataclass(frozen=True)
class Places:
    """The running swarm, and what stands for the words in braces."""

    swarm: Swarm
    names: dict[str, str]

    @property
    def uploads(self) -> list[Path]:
        return [path for path in (self.swarm.root / "coordinator" / "blobs").rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def places(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """A bootstrap node, a coordinator, a node with all blocks, and one with half of another model's."""
    root = tmp_path_factory.mktemp("bad-input")
    swarm = Swarm(root, smollm2)
    with socket.socket() as closed, socket.socket() as silent:
        closed.bind(("127.0.0.1", 0))  # held, so that nobody else listens there, but not listening
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        write_models(root, smollm2)
        write_jobs(root)
        try:
            swarm.bootstrap()
            bootstrap_join = swarm.join
            # Another model's swarm, found through the same bootstrap node.
            other = Checkpoint.open(str(root / "other-config"))
            half_join = replace(parse_join(bootstrap_join), model=other.name, model_hash=other.model_hash).encode()
            nodes = [swarm.node("whole", "0:30"), swarm.node("half", "0:15", "--join", half_join)]
            swarm.coordinator()
            for node in nodes:
                node.event()
            joins = {"join": swarm.join, "bootstrap_join": bootstrap_join, "half_join": half_join}
            yield Places(swarm, names_of(root, smollm2, joins, closed, silent))
            assert [process.name for process in swarm.processes if process.popen.poll() is not None] == []
        finally:
            swarm.close()


def write_models(root: Path, model: Path) -> None:
    """Folders that look like the model, each wrong in one way."""
    for name in ("other-config", "bad-config", "no-plan", "other-weights", "other-tokenizer", "cut-off"):
        shutil.copytree(model, root / name, copy_function=os.symlink)
    config = json.loads((model / "config.json").read_text())
    replace_file(
        root / "other-config" / "config.json", json.dumps({**config, "max_position_embeddings": 4096}).encode()
    )
    replace_file(root / "bad-config" / "config.json", json.dumps({**config, "model_type": "perceptron"}).encode())
    replace_file(root / "no-plan" / "config.json", json.dumps({**config, "model_type": "stablelm"}).encode())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["Hello"], vocabulary["Hi"] = vocabulary["Hi"], vocabulary["Hello"]
    replace_file(root / "other-tokenizer" / "tokenizer.json", json.dumps(tokenizer).encode())
    weights = model / "model.safetensors"
    with weights.open("rb") as file:
        beginning = file.read(2**20)
    replace_file(root / "cut-off" / weights.name, beginning)
    (root / "other-weights" / weights.name).unlink()
    shutil.copyfile(weights, root / "other-weights" / weights.name)
    with (root / "other-weights" / weights.name).open("r+b") as file:
        first_tensor = 8 + int.from_bytes(beginning[:8], "little")
        file.seek(first_tensor)
        file.write(bytes([beginning[first_tensor] ^ 1]))
    (root / "no-config").mkdir()
    (root / "noise").write_bytes(bytes(range(128, 256)))


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()  # it is a link to the real model's
    path.write_bytes(content)


def write_jobs(root: Path) -> None:
    for name, text in JOB_FILES.items():
        (root / f"{name}.yaml").write_text(text)
    (root / "good.jsonl").write_text(f"{GOOD_LINE}\n")
    (root / "bad.jsonl").write_text(f'{GOOD_LINE}\n{GOOD_LINE}\n{{"messages": [\n{GOOD_LINE}\n')


def names_of(
    root: Path, model: Path, joins: dict[str, str], closed: socket.socket, silent: socket.socket
) -> dict[str, str]:
    info = parse_join(joins["join"])
    nobody = Identity.generate().peer_id
    ports = {"closed": closed.getsockname()[1], "silent": silent.getsockname()[1]}
    names = {
        "root": str(root),
        "model": str(model),
        **joins,
        "cut_join": joins["join"][: len(joins["join"]) // 2],
        "other_key_join": replace(info, tls_fingerprint=bytes(32)).encode(),
        "bootstrap_port": info.bootstrap[0].split("/")[4],
        "coordinator_data": str(root / "coordinator"),
        "node_data": str(root / "whole"),
        "long_prompt": "word " * 9000,
    }
    for name, port in ports.items():
        names[name] = str(port)
        names[f"{name}_join"] = replace(info, bootstrap=(f"/ip4/127.0.0.1/tcp/{port}/p2p/{nobody}",)).encode()
        names[f"{name}_coordinator_join"] = replace(info, coordinator=f"127.0.0.1:{port}").encode()
    return names


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, places: Places) -> Iterator[dict[str, Future[Answer]]]:
    """The commands of all cases that were asked for, run some at a time; each test waits for its own."""
    cases = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "case" in item.fixturenames
    ]
    with ThreadPoolExecutor(COMMANDS_AT_ONCE) as pool:
        yield {case.name: pool.submit(run_case, case, places) for case in cases}
        pool.shutdown(cancel_futures=True)


def run_case(case: Case, places: Places) -> Answer:
    arguments = [word.format_map(places.names) for word in shlex.split(case.command)]
    if "--data-dir" not in arguments:
        arguments += ["--data-dir", str(data_of(case, places))]
    environment = {name: value.format_map(places.names) for name, value in case.environment.items()}
    return ask([*arguments, "--json"], environment)


def data_of(case: Case, places: Places) -> Path:
    return places.swarm.root / "data" / case.name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input_is_refused(case: Case, places: Places, answers: dict[str, Future[Answer]]) -> None:
    answer = answers[case.name].result()
    assert "Traceback" not in answer.stderr, answer.stderr
    assert answer.status == 1, answer
    error = json.loads(answer.stdout)["error"]
    assert error["code"] == case.code, error
    assert error["cause"]
    assert error["fix"]
    for words in case.says:
        assert words.format_map(places.names) in f"{error['cause']}\n{error['fix']}", error
    told = [line for line in answer.stderr.splitlines() if not line.startswith("{")]
    assert told == [f"error {error['code']}: {error['cause']}", f"  fix: {error['fix']}"], answer.stderr
    assert answer.waited_s < WAIT_LIMIT_S
    assert answer.seconds < case.within_s
    assert {path.name for path in data_of(case, places).glob("*")} <= WHOLE_FILES


def test_nothing_was_uploaded_or_exported(places: Places, answers: dict[str, Future[Answer]]) -> None:
    for answer in answers.values():
        answer.result()
    assert places.uploads == []
    assert places.swarm.run_json("job", "list") == []
    assert not (places.swarm.root / "out").exists()
    assert list((places.swarm.root / "no-config").iterdir()) == []


def test_people_read_two_lines_on_stderr() -> None:
    answer = ask(["status", "--join", "hello"])
    assert (answer.status, answer.stdout) == (1, "")
    assert answer.stderr.splitlines() == [
        "error SW302: that is not a join string",
        "  fix: copy the whole join string, from 'swarm1-' on, as one word",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("node", "start"),
        ("generate", "Hi"),
        ("job", "list", "--join"),
        ("node", "start", "--join", "swarm1-x", "--port", "70000"),
        ("status", "--join", "swarm1-x", "--log-level", "loud"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    answer = ask(list(arguments))
    assert (answer.status, answer.stdout) == (2, "")
    assert "Traceback" not in answer.stderr
    assert arguments[-2] in answer.stderr if arguments[-2].startswith("--") else "--join" in answer.stderr
