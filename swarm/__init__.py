"""Pool ordinary GPUs to run and fine-tune language models none of them could hold alone.

The names of the public API are loaded when they are first asked for: importing this package never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarm.client.remote import SwarmForCausalLM
    from swarm.client.swarm import SwarmClient
    from swarm.errors import SwarmError
    from swarm.net.join import parse_join

__version__ = "0.1.0"
__all__ = ["SwarmClient", "SwarmError", "SwarmForCausalLM", "parse_join"]

_HOMES = {
    "SwarmClient": "swarm.client.swarm",
    "SwarmError": "swarm.errors",
    "SwarmForCausalLM": "swarm.client.remote",
    "parse_join": "swarm.net.join",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'swarm' has no attribute '{name}'")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
