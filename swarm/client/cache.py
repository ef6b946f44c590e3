"""A transformers `Cache` that stands for a session: the keys and values are on the nodes.

What `generate()` asks of a cache is answered here without a message: its length, dropping the last
columns (rollback after a rejected draft), and reordering, repeating or picking rows (beams). Such
changes are only noted; the next step carries them. The session is opened by the first step,
when the batch is known, and closed by `close` or when the cache is garbage.

The token ids and the padding behind every column are kept, so that a later call with a longer text
continues from what the two have in common (`align`). No tensor of a layer is ever held here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import Cache

from swarm.client.columns import common_part, distinct_rows
from swarm.client.loop import ClientLoop
from swarm.client.session import Session
from swarm.errors import InputError, SessionError


class RemoteCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """The KV cache of one batch of rows, over the swarm. Used by one thread at a time."""

    def __init__(
        self,
        loop: ClientLoop,
        adapter: str = "",
        expected_tokens: int = 0,
        waiting: Callable[[int, str], None] | None = None,
    ) -> None:
        """expected_tokens: columns that it will probably reach, which the nodes' admission counts with.
        waiting: told (position, reason) while a node has no room, on the loop's thread."""
        super().__init__(layers=[])
        self.adapter = adapter
        self.expected_tokens = expected_tokens
        self.sequences: torch.Tensor | None = None
        """What the last `generate()` on this cache returned [B, N]; a call without inputs continues it."""
        self.aligned = False
        """Whether the inputs of the running `generate()` begin with the columns held here."""
        self._loop = loop
        self._waiting = waiting
        self._session: Session | None = None
        self._finalizer: Any = None
        self._length = 0
        self._ids_RL: torch.Tensor | None = torch.zeros(0, 0, dtype=torch.long)  # None: embeddings went in
        self._mask_RL = torch.zeros(0, 0, dtype=torch.long)
        self._rows: list[int] | None = None  # of the session, for each row here; None: all, as they are
        self._unsure = False

    # What generate() asks.

    def __len__(self) -> int:
        return int(self._loop.client.n_blocks)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"RemoteCache(rows={self.batch_size}, length={self._length})"

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise InputError("a session's keys and values cannot be copied", "use crop() to go back to a common prefix")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns held, padding included; the same for all rows."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length + query_length, 0

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first step."""
        return self._mask_RL.shape[0] if self._length else -1

    @property
    def is_initialized(self) -> bool:
        return self._length > 0

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def update(self, *args: object, **kwargs: object) -> NoReturn:
        raise InputError("a remote cache holds no layers to update", "pass it only to the model that it came from")

    def reset(self) -> None:
        self.crop(-self._length)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last columns: a number below 0, as transformers has it. Raises ValueError above 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of columns to drop as a negative number, got {tokens_to_remove}")
        if tokens_to_remove:
            self._length = max(0, self._length + tokens_to_remove)
            self._mask_RL = self._mask_RL[:, : self._length]
            if self._ids_RL is not None:
                self._ids_RL = self._ids_RL[:, : self._length]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._pick(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick([row for row in range(self._mask_RL.shape[0]) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._pick(torch.arange(self._mask_RL.shape[0])[indices.cpu()].tolist())

    def _pick(self, rows: list[int]) -> None:
        if not self._length or rows == list(range(self._mask_RL.shape[0])):
            return
        self._rows = rows if self._rows is None else [self._rows[row] for row in rows]
        self._mask_RL = self._mask_RL[rows]
        if self._ids_RL is not None:
            self._ids_RL = self._ids_RL[rows]

    # What a later call with a longer text needs.

    def align(self, ids_BN: torch.Tensor, mask_BN: torch.Tensor | None) -> None:
        """Keep what the columns and a text have in common, less the text's last token, which is to be fed.

        Each row of the text continues the held row it shares most with (after a beam search the
        answers are other rows than the ones held). Tokens put in as embeddings cannot be
        compared: the columns are then taken to be the text's, as transformers does.
        """
        self.aligned = True
        if self._unsure:
            self.close()
        if not self._length or self._ids_RL is None:
            return
        if mask_BN is not None and mask_BN.shape[1] > ids_BN.shape[1]:
            self.aligned = False  # only new tokens were passed, with a mask of the whole
            return
        ids_BN = ids_BN.cpu()
        mask_BN = torch.ones_like(ids_BN) if mask_BN is None else mask_BN.cpu().long()
        keep, rows = common_part(ids_BN, mask_BN, self._ids_RL, self._mask_RL)
        self.crop(keep - self._length)
        self._pick(rows)

    # The steps.

    @property
    def session(self) -> Session | None:
        """The session behind it, once the first step opened it."""
        return self._session

    def step(
        self,
        *,
        ids_BT: torch.Tensor | None = None,
        hidden_BTD: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
        positions_BT: torch.Tensor | None = None,
        keep: int = 0,
        to_logits: bool = True,
    ) -> torch.Tensor:
        """Append T columns, as token ids or embeddings; logits [B, keep, V] of the last (0: of all), or hidden states.

        mask_BT: 0 where a column is padding; positions_BT: None counts the columns that are not.
        Raises ContextTooLong, Busy, PeerLost, …; the columns are then those from before.
        """
        if self._unsure:
            raise SessionError("the last call failed while rows were moved, so their order is not known")
        given = ids_BT if ids_BT is not None else hidden_BTD
        assert given is not None
        inputs = given.cpu()
        mask_BT = torch.ones(inputs.shape[:2], dtype=torch.long) if mask_BT is None else mask_BT.cpu().long()
        self.check_rows(inputs.shape[0])
        spread = None
        if not self._length and ids_BT is not None:
            # Beams and samples begin as copies of one prompt: it is computed once and its rows are spread then.
            rows = [inputs, mask_BT] if positions_BT is None else [inputs, mask_BT, positions_BT]
            kept, spread = distinct_rows(rows)
            inputs, sent_mask_BT = inputs[kept], mask_BT[kept]
            positions_BT = positions_BT if positions_BT is None else positions_BT[kept]
        else:
            sent_mask_BT = mask_BT
        return self._loop.call(
            lambda: self._step(
                inputs, sent_mask_BT, positions_BT, spread, (given, mask_BT), keep=keep, to_logits=to_logits
            )
        )

    async def _step(
        self,
        inputs: torch.Tensor,
        mask_BT: torch.Tensor,
        positions_BT: torch.Tensor | None,
        spread: list[int] | None,
        noted: tuple[torch.Tensor, torch.Tensor],
        *,
        keep: int,
        to_logits: bool,
    ) -> torch.Tensor:
        # State changes here, on the loop's thread, where Ctrl-C cannot come between the answer and its record.
        session = await self._open(len(inputs), len(noted[0]))
        send = session.forward if inputs.ndim == 2 else session.forward_embeds
        try:
            hidden = await send(
                inputs,
                mask_BT=mask_BT if not bool(mask_BT.all()) else None,
                positions_BT=positions_BT,
                rows=self._rows,
                position=self._length,
                last_only=keep == 1,
            )
        except BaseException:
            # A step that failed can be taken again; rows that it moved cannot be told from rows it did not.
            self._unsure = self._rows is not None
            raise
        self._note(*noted)
        self._rows = spread
        hidden = hidden[:, -keep:]
        output = await session.logits(hidden) if to_logits else hidden
        if spread is not None:
            output = output[spread]
        # Tensors made in inference mode refuse the in-place changes that generate() makes.
        return output.clone() if output.is_inference() else output

    def _note(self, given: torch.Tensor, mask_BT: torch.Tensor) -> None:
        """Remember what the new columns hold."""
        first = not self._length
        ids_BT = given.detach().cpu() if given.ndim == 2 else None
        self._mask_RL = mask_BT if first else torch.cat([self._mask_RL, mask_BT], dim=1)
        if ids_BT is None or (self._ids_RL is None and not first):
            self._ids_RL = None
        else:
            self._ids_RL = ids_BT if first or self._ids_RL is None else torch.cat([self._ids_RL, ids_BT], dim=1)
        self._length = self._mask_RL.shape[1]

    async def _open(self, distinct: int, batch: int) -> Session:
        if self._session is not None and not self._length and self._session.batch != distinct:
            await self._shut()  # begun anew with another batch
        if self._session is None:
            self._rows = None
            # Admission counts rows × columns: rows that are spread later are counted as columns now.
            expected_tokens = -(-self.expected_tokens * batch // distinct)
            session = await self._loop.client.session(
                self.adapter,
                batch=distinct,
                expected_tokens=min(expected_tokens, 2**31 - 1),
                waiting=self._waiting,
            )
            self._session = session
            self._finalizer = weakref.finalize(self, self._loop.spawn, session.close)
            self._finalizer.atexit = False  # leaving the client closes its sessions
        elif not self._length:
            self._rows = None
        return self._session

    async def _shut(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            self._finalizer.detach()
            await session.close()

    def close(self) -> None:
        """Close the session; the nodes free its memory. Safe to call twice."""
        if self._session is not None and not self._loop.closed:
            self._loop.call(self._shut)
        self._length, self._rows, self._unsure = 0, None, False
        self._ids_RL, self._mask_RL = torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)

    def check_rows(self, batch: int) -> None:
        """Raises InputError if so many rows cannot continue the ones held."""
        if self._length and batch != self._mask_RL.shape[0]:
            raise InputError(
                f"{batch} rows cannot continue a cache of {self._mask_RL.shape[0]}",
                "pass as many rows as before, or call batch_repeat_interleave() or batch_select_indices() on it",
            )

    def held_mask(self) -> torch.Tensor:
        """1 for every column [B, L] that is not padding; L is 0 before the first step."""
        return self._mask_RL[:, : self._length]
