"""Codes of 4 or 3 bits packed without gaps: two in a byte, or eight in three bytes."""

import torch
import torch.nn.functional as F

CHUNK = 2**20  # groups taken together, which bounds the memory beside codes and bytes


def pack_codes(codes, bits):
    """Bytes (uint8 [ceil(n / group) x bytes per group]) of n codes, each below 2^bits."""
    per_group, width = _group(bits)
    flat = codes.reshape(-1).to(torch.uint8)
    groups = F.pad(flat, (0, -len(flat) % per_group)).view(-1, per_group)
    return _in_chunks(groups, width, bits, 8)


def unpack_codes(packed, bits, count):
    """The first `count` codes (uint8 [count]) of `pack_codes`."""
    per_group, width = _group(bits)
    return _in_chunks(packed.view(-1, width), per_group, 8, bits)[:count]


def _in_chunks(groups, count, bits, new_bits):
    """Numbers of `bits` bits, a group in each row (uint8 [G, ...]), as `count` numbers of `new_bits` (uint8 [G x count])."""
    shifts = torch.arange(max(count, groups.shape[1]), device=groups.device, dtype=torch.int32)
    regrouped = torch.empty(len(groups), count, device=groups.device, dtype=torch.uint8)
    for source, target in zip(groups.split(CHUNK), regrouped.split(CHUNK), strict=True):
        words = (source.to(torch.int32) << bits * shifts[: source.shape[1]]).sum(dim=1, dtype=torch.int32)  # 24 bits at most
        target.copy_((words[:, None] >> new_bits * shifts[:count]) & (2**new_bits - 1))
    return regrouped.view(-1)


def _group(bits):
    """Codes per group and bytes per group."""
    return {4: (2, 1), 3: (8, 3)}[bits]
