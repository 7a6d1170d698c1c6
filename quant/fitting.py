"""Several quantizers fitted to one weight together: each group of its channels is sorted once for all of them."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from quant import groups, sorted_errors
from quant.rows import sorted_rows


class Block(NamedTuple):
    """Rows that are fitted together: a weight, or those of its groups that are equally long."""

    weight: torch.Tensor  # [R, ...]
    rows: np.ndarray | None  # [R, width], ascending, float32; None where the weight is not fitted by them

    @classmethod
    def of(cls, weight):
        """The block of a weight [C, ...], its channels sorted where that is how it is fitted."""
        fast = weight.device.type == "cpu" and weight.dtype in sorted_errors.DROPPED_BITS
        return cls(weight, sorted_rows(weight) if fast else None)


def fit_together(members, weight):
    """({word: parameters}, blocks of the weight) of quantizers that have the same groups."""
    group = members[0].group
    blocks = [Block.of(part) for part in groups.split(weight, group)]
    widths = {}  # class -> its bit widths
    for each in members:
        widths.setdefault(type(each), []).append(each.bits)
    fitted = [_fit_block(widths, block) for block in blocks]
    parameters = {}
    for each in members:
        tables = groups.join_tables([found[type(each)][each.bits] for found in fitted], group, len(weight))
        parameters[each.name] = each.stored(tables, weight.dtype)
    return parameters, blocks


def _fit_block(widths, block):
    """{class: {b: tables}} for the bit widths of each class."""
    if block.weight.device.type == "cpu":
        return {kind: kind.fit_block(block, bits) for kind, bits in widths.items()}
    with ThreadPoolExecutor(1) as pool:  # what the CPU fits, while a GPU is at the others
        pending = {kind: pool.submit(kind.fit_block, block, bits) for kind, bits in widths.items() if kind.on_host}
        found = {kind: kind.fit_block(block, bits) for kind, bits in widths.items() if not kind.on_host}
        return found | {kind: future.result() for kind, future in pending.items()}
