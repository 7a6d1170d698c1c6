import pytest
import torch

from quant.packing import pack_codes, unpack_codes


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 1000])
def test_round_trip(bits, count):
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_by_hand():
    assert pack_codes(torch.tensor([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack_codes(torch.tensor([7, 0, 0, 0, 0, 0, 0, 1]), 3).tolist() == [7, 0, 32]


def test_size():
    assert len(pack_codes(torch.zeros(800), 4)) == 400
    assert len(pack_codes(torch.zeros(800), 3)) == 300
