"""Quantizers whose codes are whole numbers: UAQ with a zero point, and one with a real offset; per channel or group."""

import torch

from quant import affine, sorted_errors, uaq
from quant.quantizer import TABLE_DTYPES, Quantizer
from quant.rows import check

ZERO_DTYPES = (torch.int8, torch.int16, torch.int32)


class Uniform(Quantizer):
    """UAQ: codes are whole numbers, shifted by a zero point and scaled; see quant/uaq.py."""

    algorithm, tables, is_affine = "mse", ("scale", "zero_point"), True

    @staticmethod
    def fit_block(block, bits):
        """Tables {b: {name: [R]}} of the rows of a block, in its search's precision."""
        weight, rows = block
        fitted = {b: uaq.fit(weight, b) for b in bits} if rows is None else uaq.fit_rows(rows, bits)
        return {b: {"scale": scale, "zero_point": zero_point} for b, (scale, zero_point) in fitted.items()}

    def stored(self, tables, dtype):
        """The fitted tables as files hold them: scales in `dtype`, zero points as integers."""
        return uaq.stored(**tables, dtype=dtype, bits=self.bits)

    def fit_weighted(self, block, importance):
        """Tables {name: [R]} of the rows of a block, in its search's precision, by the importance of each weight."""
        scale, zero_point = uaq.fit(block, self.bits, importance)
        return {"scale": scale, "zero_point": zero_point}

    def _encode(self, block, scale, zero_point):
        return uaq.quantize(block, scale, zero_point, self.bits).to(torch.uint8)

    def _decode(self, codes, scale, zero_point):
        return uaq.dequantize(codes, scale, zero_point)

    def _apply(self, block, scale, zero_point):
        return self._decode(self._encode(block, scale, zero_point), scale, zero_point)

    def _row_error(self, rows, scale, zero_point):
        return sorted_errors.of_uaq(rows, scale, zero_point, self.bits)

    def _are_sound(self, shape, scale, zero_point):
        fits = scale.dtype in TABLE_DTYPES and zero_point.dtype in ZERO_DTYPES
        if not fits or not scale.shape == zero_point.shape == self.lead(shape):
            return False
        return bool((scale > 0).all()) and uaq.has_finite_levels(scale, zero_point, self.bits)


class Affine(Quantizer):
    """Codes are whole numbers, scaled and shifted by a real offset; the least squared error. See quant/affine.py."""

    algorithm, tables, is_affine = "affine", ("scale", "offset"), True

    @classmethod
    def fit_block(cls, block, bits):
        """Tables {b: {name: [R]}} of the rows of a block, in its precision."""
        check(block.weight)
        return cls._named(affine.fit(block.weight, bits, block.rows))

    def fit_weighted(self, block, importance):
        """Tables {name: [R]} of the rows of a block, in its precision, by the importance of each weight."""
        fitted = affine.fit(block, [self.bits], masses=importance.reshape(len(block), -1))
        return self._named(fitted)[self.bits]

    @staticmethod
    def _named(fitted):
        return {b: {"scale": scale, "offset": offset} for b, (scale, offset) in fitted.items()}

    def stored(self, tables, dtype):
        """The fitted tables, which are in `dtype` already."""
        return tables

    def _encode(self, block, scale, offset):
        return affine.quantize(block, scale, offset, self.bits)

    def _decode(self, codes, scale, offset):
        return affine.dequantize(codes, scale, offset)

    def _apply(self, block, scale, offset):
        return self._decode(self._encode(block, scale, offset), scale, offset)

    def _row_error(self, rows, scale, offset):
        return sorted_errors.of_affine(rows, scale, offset, self.bits)

    def _are_sound(self, shape, scale, offset):
        if scale.dtype != offset.dtype or scale.dtype not in TABLE_DTYPES:
            return False
        if not scale.shape == offset.shape == self.lead(shape):
            return False
        highest = offset + (2**self.bits - 1) * scale
        return bool((scale > 0).all() and (offset.isfinite() & highest.isfinite()).all())
