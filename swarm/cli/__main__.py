"""`python -m swarm.cli`: the same as the `swarm` command."""

from swarm.cli.main import run

run()
