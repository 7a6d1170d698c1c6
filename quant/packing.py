"""Codes of 4 or 3 bits packed without gaps: two in a byte, or eight in three bytes."""

import torch
import torch.nn.functional as F


def pack_codes(codes, bits):
    """Bytes (uint8 [ceil(n / group) x bytes per group]) of n codes, each below 2^bits."""
    per_group, width = _group(bits)
    flat = codes.reshape(-1).to(torch.int32)
    flat = F.pad(flat, (0, -len(flat) % per_group)).view(-1, per_group)
    shifts = torch.arange(per_group, device=codes.device, dtype=torch.int32) * bits
    words = (flat << shifts).sum(dim=1, dtype=torch.int32)  # [groups], up to 24 bits used
    byte_shifts = torch.arange(width, device=codes.device, dtype=torch.int32) * 8
    return ((words[:, None] >> byte_shifts) & 255).to(torch.uint8).reshape(-1)


def unpack_codes(packed, bits, count):
    """The first `count` codes (uint8 [count]) of `pack_codes`."""
    per_group, width = _group(bits)
    byte_shifts = torch.arange(width, device=packed.device, dtype=torch.int32) * 8
    words = (packed.view(-1, width).to(torch.int32) << byte_shifts).sum(dim=1, dtype=torch.int32)
    shifts = torch.arange(per_group, device=packed.device, dtype=torch.int32) * bits
    return ((words[:, None] >> shifts) & (2**bits - 1)).to(torch.uint8).reshape(-1)[:count]


def _group(bits):
    """Codes per group and bytes per group."""
    return {4: (2, 1), 3: (8, 3)}[bits]
