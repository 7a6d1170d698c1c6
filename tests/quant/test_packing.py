"""Codes packed row by row, and decoded again."""

import pytest
import torch
import torch.nn.functional as F

from quant.kernels.decode import _decode_anywhere, decode
from quant.packing import pack_rows, row_bytes, unpack_rows

BITS = range(2, 9)
COUNTS = (1, 7, 8, 9, 64, 65)


def random_codes(bits, count, rows=5):
    return torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def test_bytes_by_hand():
    assert pack_rows(torch.tensor([[0x1, 0xF, 0x7], [0x2, 0x0, 0x9]], dtype=torch.uint8), 4).tolist() == [
        [0xF1, 0x07],
        [0x02, 0x09],
    ]
    # Codes 1 to 7 and 0 of 3 bits, the first in the lowest bits: 0o07654321.
    assert pack_rows(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3).tolist() == [[0xD1, 0x58, 0x1F]]
    assert pack_rows(torch.tensor([[5]], dtype=torch.uint8), 3).tolist() == [[5, 0, 0]]
    assert pack_rows(torch.tensor([[200, 3]], dtype=torch.uint8), 8).tolist() == [[200, 3]]


@pytest.mark.parametrize(
    ("bits", "sizes"), {2: (1, 2), 3: (3, 6), 4: (4, 5), 5: (5, 10), 6: (6, 9), 7: (7, 14), 8: (8, 9)}.items()
)
def test_row_bytes_by_hand(bits, sizes):
    """Of 4 (2 bits) or 8 codes, and of one more, in whole groups."""
    count = 4 if bits == 2 else 8
    assert (row_bytes(count, bits), row_bytes(count + 1, bits)) == sizes


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_codes_come_back(bits, count):
    codes = random_codes(bits, count)
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, row_bytes(count, bits)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_rows(packed, bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_the_table_looked_up(bits, count, dtype):
    """Of one codebook, one per row, one per group of 4, and UAQ's scales and zero points; compiled and by PyTorch."""
    codes = random_codes(bits, count)
    packed, indices = pack_rows(codes, bits), codes.long()
    groups = -(-count // 4)
    whole, own, grouped = (torch.randn(*shape, 2**bits).to(dtype) for shape in ((), (5,), (5, groups)))
    scale, zero = torch.rand(5).to(dtype), torch.randint(-3, 2**bits, (5,), dtype=torch.int16)
    by_group = grouped.gather(2, F.pad(indices, (0, -count % 4)).view(5, groups, 4)).reshape(5, -1)[:, :count]
    expected = {
        (whole, None, 0): whole[indices],
        (own, None, 0): own.gather(1, indices),
        (grouped, None, 4): by_group,
        (scale, zero, 0): (codes.to(dtype) - zero[:, None].to(dtype)) * scale[:, None],
    }
    for (table, zeros, group), weights in expected.items():
        for decoding in (decode, _decode_anywhere):
            assert torch.equal(decoding(packed, table, zeros, bits, count, group), weights)


def test_codes_beyond_a_short_table_are_its_last():
    """A damaged file reads nothing outside its table."""
    packed = pack_rows(torch.tensor([[0, 2, 15]], dtype=torch.uint8), 4)
    for decoding in (decode, _decode_anywhere):
        assert decoding(packed, torch.tensor([[1.0, 2.0]]), None, 4, 3, 0).tolist() == [[1.0, 2.0, 2.0]]


def test_decoding_is_one_node_of_a_compiled_graph():
    codes = random_codes(4, 40)
    table = torch.randn(5, 16)
    compiled = torch.compile(
        lambda packed, table: decode(packed, table, None, 4, 40) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(pack_rows(codes, 4), table), table.gather(1, codes.long()) * 2)


def test_shapes_that_do_not_belong_together_are_refused():
    packed, table = pack_rows(random_codes(4, 40), 4), torch.randn(5, 16)
    for wrong in (
        (packed[:, :-1], table, None),
        (packed, table[:4], None),
        (packed, torch.rand(5), torch.zeros(4, dtype=int)),
    ):
        with pytest.raises(ValueError, match="of 40 codes of 4 bits a row"):
            decode(*wrong, 4, 40)
