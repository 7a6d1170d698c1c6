"""Codes of 2 to 8 bits packed row by row: an output channel's codes are a stream of bits of their own.

Code i of a row takes the bits i x b to (i + 1) x b - 1 of its bytes, the lowest bits of a byte first: two codes of 4 bits
to a byte, eight of 3 bits to three bytes. A row is padded to whole groups of so many codes, so each starts on a byte and
any channel can be decoded by itself.
"""

import math

import torch
import torch.nn.functional as F

CHUNK = 2**17  # groups taken together, which bounds the memory beside codes and bytes


def row_bytes(count, bits):
    """Bytes of a row of `count` codes."""
    per_group, width = group_of(bits)
    return math.ceil(count / per_group) * width


def pack_rows(codes, bits):
    """Bytes (uint8 [C, row_bytes]) of the codes of each output channel (uint8 [C, n], each below 2^bits)."""
    per_group, width = group_of(bits)
    rows = F.pad(codes, (0, -codes.shape[1] % per_group))
    return _in_chunks(rows.reshape(-1, per_group), width, bits, 8).view(len(codes), row_bytes(codes.shape[1], bits))


def unpack_rows(packed, bits, count):
    """The first `count` codes of each row (uint8 [C, count]) of `pack_rows`, on any device."""
    per_group, width = group_of(bits)
    return _in_chunks(packed.reshape(-1, width), per_group, 8, bits).view(len(packed), -1)[:, :count]


def _in_chunks(groups, count, bits, new_bits):
    """Numbers of `bits` bits, a group in each row (uint8 [G, ...]), as `count` numbers of `new_bits` (uint8 [G, count])."""
    if bits == new_bits:
        return groups
    shifts = torch.arange(max(count, groups.shape[1]), device=groups.device)
    regrouped = torch.empty(len(groups), count, device=groups.device, dtype=torch.uint8)
    for source, target in zip(groups.split(CHUNK), regrouped.split(CHUNK), strict=True):
        words = (source.to(torch.int64) << bits * shifts[: source.shape[1]]).sum(dim=1)  # 56 bits at most
        target.copy_((words[:, None] >> new_bits * shifts[:count]) & (2**new_bits - 1))
    return regrouped


def group_of(bits):
    """Codes per group and bytes per group."""
    per_group = 8 // math.gcd(8, bits)
    return per_group, per_group * bits // 8
