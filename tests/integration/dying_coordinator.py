"""A coordinator that kills itself at one durable write: `python dying_coordinator.py JOIN DATA PORT MARK`.

Dies by SIGKILL the first time a durable point's name contains MARK ("before commit …" or
"after commit …" with the names of the records of that step). With "disk: MARK" it is its disk that fails
there instead: every fsync from then on. Otherwise it is `swarm coordinator start`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from coordinator.main import CoordinatorStart, run_coordinator
from coordinator.ports import CoordinatorSettings
from swarm.cli.process import run
from swarm.net.join import JoinInfo, parse_join

DISK = "disk: "
# Where `failing_fsync` lies, beside the tests that use it most; a script finds only its own folder.
sys.path.append(str(Path(__file__).parents[1] / "unit" / "coordinator"))


def main() -> None:
    join, data_dir, port, mark = sys.argv[1:5]

    def die(name: str) -> None:
        if all(part in name for part in mark.removeprefix(DISK).split("…")):
            if mark.startswith(DISK):
                from failing_fsync import fail_every_fsync

                fail_every_fsync()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def ready(info: JoinInfo) -> None:
        print(json.dumps({"event": "ready", "join": info.encode()}), flush=True)

    start = CoordinatorStart(
        join=parse_join(join),
        data_dir=Path(data_dir),
        port=int(port),
        settings=CoordinatorSettings(durable_point=die) if mark else CoordinatorSettings(),
    )
    run(lambda: run_coordinator(start, ready), role="coordinator", log_level="info")


if __name__ == "__main__":
    main()
