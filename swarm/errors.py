"""Every error a person can meet, in one tree.

An error has a `code` that documentation and scripts can rely on, a `cause` that says what
happened with the names involved, and a `fix` that says what to do next. The CLI prints the
three; the wire carries them; nothing else about an exception crosses a process boundary.

    SwarmError
    ├── InputError            SW100  a flag, file or value that cannot be used
    │   ├── ConfigError       SW101  a YAML or settings file
    │   ├── DatasetError      SW102  a data file; names the line
    │   ├── ModelNotFound     SW103  no such checkpoint folder or hub id
    │   ├── UnsupportedModel  SW104  a checkpoint this version cannot shard or train
    │   └── SpanError         SW105  a span outside the model
    ├── AuthError             SW200  identity and trust
    │   ├── IdentityError     SW201  a key file that cannot be used
    │   ├── SignatureError    SW202  missing, wrong or replayed signature
    │   ├── ClockError        SW203  clocks too far apart
    │   ├── PinError          SW204  the coordinator shows another TLS key than the join string
    │   ├── UnverifiedWeights SW205  weights from peers that disagree, or that too few vouch for
    │   └── NotJobOwner       SW206  somebody else's job
    ├── NetworkError          SW300  reaching others
    │   ├── JoinError         SW301  nobody answers at the join address
    │   ├── JoinStringError   SW302  a join string that does not parse
    │   ├── PeerLost          SW303  a node or client went away in the middle
    │   ├── ProtocolError     SW304  bytes that are not what the protocol says
    │   ├── VersionError      SW305  no common protocol version, or an unknown required feature
    │   ├── PlatformError     SW306  the libp2p daemon does not run here
    │   ├── PortInUse         SW307  the address is taken
    │   └── CoordinatorLost   SW308  the coordinator does not answer
    ├── ServeError            SW400  running a model over the swarm
    │   ├── BlocksMissing     SW401  blocks that no node holds
    │   ├── ModelMismatch     SW402  another model or revision
    │   ├── SessionError      SW403  unknown session or wrong position
    │   ├── ContextTooLong    SW404  more tokens than the model's context
    │   ├── AdapterNotFound   SW405  nobody announces that adapter
    │   ├── Busy              SW406  no room within the deadline; names the place in the queue
    │   └── Preempted         SW407  the session's memory went to older sessions; it is rebuilt elsewhere or later
    ├── ResourceError         SW500  this machine
    │   ├── OutOfMemory       SW501  names what to lower
    │   └── DeviceError       SW502  the asked device is not there
    ├── JobError              SW600  fine-tuning jobs
    │   ├── JobNotFound       SW601
    │   ├── JobConflict       SW602  name taken, or not possible in the job's state
    │   └── ContributionError SW603  a contribution that is refused, and why
    ├── StorageError          SW700  files and databases
    │   ├── DataDirLocked     SW701  another process uses the folder
    │   ├── CorruptData       SW702  content does not match its hash
    │   ├── SyncFailed        SW703  the disk did not confirm a write; the coordinator stops
    │   ├── DiskFull          SW704  no room; what failed is tried again
    │   ├── BlobStoreAway     SW705  the blob store does not answer or refuses; what failed is tried again
    │   ├── BlobAbsent        SW706  the coordinator has no such file
    │   └── BeingMade         SW707  the coordinator makes the file; whoever asks again gets it
    └── CodecError            SW800  compressed data
        └── FrameTooLarge     SW801  a frame beyond its cap, or a decompression bomb
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self


class SwarmError(Exception):
    """Base of the tree. `cause`: what happened; `fix`: what to do. Both are full sentences in lower case."""

    code: ClassVar[str] = "SW000"
    default_fix: ClassVar[str] = "see the log of the process that failed"

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix or self.default_fix
        self.blame = ""
        """Peer id of the node at fault, if one is: a client then avoids it for a while."""

    def blaming(self, peer_id: str) -> Self:
        """The same error, naming the node at fault unless one is named already."""
        self.blame = self.blame or peer_id
        return self

    def __str__(self) -> str:
        return f"{self.code} {self.cause}; {self.fix}"

    @staticmethod
    def from_code(code: str, cause: str, fix: str, blame: str = "") -> SwarmError:
        """Rebuild an error that arrived over the wire; an unknown code becomes a plain SwarmError."""
        return _BY_CODE.get(code, SwarmError)(cause, fix).blaming(blame)


class InputError(SwarmError):
    code = "SW100"
    default_fix = "correct the value and run the command again"


class ConfigError(InputError):
    code = "SW101"
    default_fix = "correct the file and run the command again"


class DatasetError(InputError):
    code = "SW102"
    default_fix = 'each line must be a JSON object {"messages": [{"role": …, "content": …}, …]}'


class ModelNotFound(InputError):
    code = "SW103"
    default_fix = "give a checkpoint folder (config.json and *.safetensors) or a Hugging Face model id"


class UnsupportedModel(InputError):
    code = "SW104"
    default_fix = "use a decoder-only checkpoint of a family that publishes a pipeline plan"


class SpanError(InputError):
    code = "SW105"
    default_fix = "give --blocks START:END with 0 <= START < END <= the model's number of blocks"


class AuthError(SwarmError):
    code = "SW200"
    default_fix = "check which identity this process uses (--data-dir)"


class IdentityError(AuthError):
    code = "SW201"
    default_fix = "restore the key file, or move it away to get a new identity"


class SignatureError(AuthError):
    code = "SW202"
    default_fix = "start the node again; if it stays, its identity key does not match its peer id"


class ClockError(AuthError):
    code = "SW203"
    default_fix = "set the clock of this machine by NTP (libp2p peers allow 3 s, the coordinator 60 s)"


class PinError(AuthError):
    code = "SW204"
    default_fix = "ask the job's owner for a fresh join string; if theirs is the same, somebody sits between"


class UnverifiedWeights(AuthError):
    code = "SW205"
    default_fix = "take the checkpoint from the hub or a folder (--model), or join by a string that carries its seal"


class NotJobOwner(AuthError):
    code = "SW206"
    default_fix = "use the identity that submitted it (--data-dir), or that of its coordinator"


class NetworkError(SwarmError):
    code = "SW300"
    default_fix = "check the network connection and the address"


class JoinError(NetworkError):
    code = "SW301"
    default_fix = "check that the bootstrap node runs and that its address and port can be reached from here"


class JoinStringError(NetworkError):
    code = "SW302"
    default_fix = "copy the whole join string, from 'swarm1-' on, as one word"


class PeerLost(NetworkError):
    code = "SW303"
    default_fix = "run it again; the swarm routes around nodes that left"


class ProtocolError(NetworkError):
    code = "SW304"
    default_fix = "run the same release on both sides"


class VersionError(NetworkError):
    code = "SW305"
    default_fix = "update the older side"


class PlatformError(NetworkError):
    code = "SW306"
    default_fix = "the libp2p daemon is an x86-64 Linux binary: use Docker, WSL2 or an x86-64 Linux machine"


class PortInUse(NetworkError):
    code = "SW307"
    default_fix = "choose another port, or end the process that holds this one"


class CoordinatorLost(NetworkError):
    code = "SW308"
    default_fix = "check that `swarm coordinator start` runs and that its port can be reached"


class ServeError(SwarmError):
    code = "SW400"


class BlocksMissing(ServeError):
    code = "SW401"
    default_fix = "start a node that holds them: swarm node start --join … --blocks START:END"


class ModelMismatch(ServeError):
    code = "SW402"
    default_fix = "give every process the same checkpoint, or use the join string of the swarm you mean"


class SessionError(ServeError):
    code = "SW403"
    default_fix = "open a new session"


class ContextTooLong(ServeError):
    code = "SW404"
    default_fix = "shorten the prompt or ask for fewer new tokens"


class AdapterNotFound(ServeError):
    code = "SW405"
    default_fix = "see `swarm status --join …` for the adapters that nodes announce"


class Busy(ServeError):
    code = "SW406"
    default_fix = "wait longer, ask for fewer tokens, or add nodes to the swarm"


class Preempted(ServeError):
    code = "SW407"
    default_fix = "open the session again: a client does so by itself"


class ResourceError(SwarmError):
    code = "SW500"


class OutOfMemory(ResourceError):
    code = "SW501"
    default_fix = "hold fewer blocks (--blocks), a narrower --dtype, or lower the job's batch_size or max_length"


class DeviceError(ResourceError):
    code = "SW502"
    default_fix = "choose another --device"


class JobError(SwarmError):
    code = "SW600"


class JobNotFound(JobError):
    code = "SW601"
    default_fix = "see `swarm job list`"


class JobConflict(JobError):
    code = "SW602"


class ContributionError(JobError):
    code = "SW603"
    default_fix = "the node keeps the work in its residual and joins the next round"


class StorageError(SwarmError):
    code = "SW700"
    default_fix = "check the disk and the permissions of the data folder"


class DataDirLocked(StorageError):
    code = "SW701"
    default_fix = "end the other process, or give this one its own --data-dir"


class CorruptData(StorageError):
    code = "SW702"
    default_fix = "remove the damaged file; it is fetched or rebuilt on the next start"


class SyncFailed(StorageError):
    code = "SW703"
    default_fix = "look at the disk and its log, then start the coordinator again: what it acknowledged is stored"


class DiskFull(StorageError):
    code = "SW704"
    default_fix = "free space on the disk of the data folder; nothing is lost, and work goes on by itself"


class BlobStoreAway(StorageError):
    code = "SW705"
    default_fix = (
        "check the coordinator's network, its bucket and its credentials; nothing is lost, and work goes on by itself"
    )


class BlobAbsent(StorageError):
    code = "SW706"
    default_fix = "upload it, or ask for a file of a round that is kept"


class BeingMade(StorageError):
    code = "SW707"
    default_fix = "ask again: the work goes on"


class CodecError(SwarmError):
    code = "SW800"
    default_fix = "the sender must encode it again"


class FrameTooLarge(CodecError):
    code = "SW801"
    default_fix = "send smaller pieces"


def _tree(cls: type[SwarmError]) -> Iterator[type[SwarmError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


_BY_CODE: dict[str, type[SwarmError]] = {cls.code: cls for cls in _tree(SwarmError)}
