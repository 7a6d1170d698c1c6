"""Groups of a weight's inputs: a row of n weights per output channel in pieces of `group`, the last one shorter.

What is fitted to each piece by itself is computed a block at a time: all whole pieces together, as if they were output
channels, then all the shorter ones. Nothing is padded.
"""

import math

import torch


def split(tensor, group):
    """The blocks [R, width] of `tensor` [C, ...]: its pieces of `group`, then those left over; without a group, itself."""
    if group is None:
        return [tensor]
    rows = tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))  # [C, n]
    whole = rows.shape[1] - rows.shape[1] % group
    blocks = [rows[:, :whole].reshape(-1, group)] if whole else []
    return [*blocks, rows[:, whole:]] if whole < rows.shape[1] or not whole else blocks


def join(blocks, shape):
    """The tensor of that shape whose blocks these are."""
    if len(blocks) == 1:
        return blocks[0].reshape(shape)
    return torch.cat([block.reshape(shape[0], -1) for block in blocks], dim=1).reshape(shape)


def split_tables(tables, group, shape):
    """The tables [R, ...] of each block of a tensor of that shape, as `split` makes them, of {name: [C, G, ...]}."""
    if group is None:
        return [tables]
    whole, count = math.prod(shape[1:]) // group, groups_per_channel(group, shape)
    pieces = [slice(0, whole)] if whole else []
    pieces += [slice(whole, count)] if whole < count else []
    return [{name: table[:, piece].flatten(0, 1) for name, table in tables.items()} for piece in pieces]


def join_tables(tables, group, channels):
    """{name: [C, G, ...]} of the blocks' tables {name: [R, ...]}.

    Where shorter pieces have fewer centroids, their largest is repeated.
    """
    if group is None:
        return tables[0]
    return {name: _join_table([each[name] for each in tables], channels) for name in tables[0]}


def _join_table(blocks, channels):
    pieces = [block.unflatten(0, (channels, -1)) for block in blocks]  # [C, G', ...]
    if pieces[0].ndim == 3:
        most = max(piece.shape[2] for piece in pieces)
        pieces = [torch.cat([p, p[..., -1:].expand(-1, -1, most - p.shape[2])], dim=2) for p in pieces]
    return torch.cat(pieces, dim=1)


def groups_per_channel(group, shape):
    """G = ceil(n / group)."""
    return -(-math.prod(shape[1:]) // group)
