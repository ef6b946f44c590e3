"""How a call's text lies on the columns of a KV cache. Pure.

In: what transformers passes (token ids, a 2-dimensional attention mask over all columns, position ids)
and what the cache holds. Out: what a session is told about the new columns, and which held rows and
columns a longer text continues. Padding is wherever the mask is 0, on whichever side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from swarm.errors import InputError


def new_columns(
    shape: Sequence[int],
    held_BL: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Padding [B, T] and position ids [B, T] of the new columns; None where they are what a session assumes.

    shape: (B, T). held_BL: the mask of the columns before them. A session counts the columns that are not padding,
    transformers, without position ids, counts all. Raises InputError where the mask is not
    [B, L + T] or hides other columns than when they were put in.
    """
    batch, time = shape
    past = held_BL.shape[1]
    if attention_mask is None:
        held_BL = held_BL if past else held_BL.new_zeros(batch, 0)
        mask_BS = torch.cat([held_BL, held_BL.new_ones(batch, time)], dim=1)
    else:
        if tuple(attention_mask.shape) != (batch, past + time):
            raise InputError(
                f"the attention mask is {tuple(attention_mask.shape)}, but there are {batch} rows of {past} columns in"
                f" the cache and {time} new ones",
                "pass a 2-dimensional mask over all columns",
            )
        mask_BS = attention_mask.cpu().long()
        if past and not torch.equal(mask_BS[:, :past], held_BL):
            raise InputError("the attention mask hides other columns than when they were put in", "start a new session")
    counted_BT = (mask_BS.cumsum(dim=1) - 1)[:, past:]
    wanted_BT = torch.arange(past, past + time).unsqueeze(0) if position_ids is None else position_ids.cpu().long()
    if wanted_BT.ndim != 2 or wanted_BT.shape[1] != time or wanted_BT.shape[0] not in (1, batch):
        raise InputError(
            f"position ids are {tuple(wanted_BT.shape)} for {batch} × {time} new columns", "pass one for each"
        )
    mask_BT = mask_BS[:, past:]
    usual = bool(((wanted_BT == counted_BT) | (mask_BT == 0)).all())
    positions_BT = None if usual else wanted_BT.expand(batch, time).clamp(min=0).contiguous()
    return (None if bool(mask_BT.all()) else mask_BT), positions_BT


def common_part(
    ids_BN: torch.Tensor, mask_BN: torch.Tensor, held_ids_RL: torch.Tensor, held_mask_RL: torch.Tensor
) -> tuple[int, list[int]]:
    """How many columns a text shares with held rows, and which row each of its rows continues.

    At most N - 1: the text's last token is to be fed again, since its logits are wanted. A row
    continues its own where that is as good as any; after a beam search others may share more.
    """
    width = min(held_ids_RL.shape[1], ids_BN.shape[1] - 1)
    same_BRL = (ids_BN[:, None, :width] == held_ids_RL[None, :, :width]) & (
        mask_BN[:, None, :width] == held_mask_RL[None, :, :width]
    )
    common_BR = same_BRL.long().cumprod(dim=-1).sum(dim=-1)
    best_B, first_B = common_BR.max(dim=1)
    held = common_BR.shape[1]
    rows = [
        row if row < held and common_BR[row, row] == best_B[row] else int(first_B[row]) for row in range(len(best_B))
    ]
    return int(best_B.min()), rows


def distinct_rows(columns: Sequence[torch.Tensor]) -> tuple[list[int], list[int] | None]:
    """Rows to compute, and for every row its place among them; None where no neighbours are alike in all columns."""
    kept, spread = [0], [0]
    for row in range(1, len(columns[0])):
        if not all(torch.equal(tensor_BT[row], tensor_BT[kept[-1]]) for tensor_BT in columns):
            kept.append(row)
        spread.append(len(kept) - 1)
    return (kept, None) if len(kept) == len(columns[0]) else (kept, spread)
