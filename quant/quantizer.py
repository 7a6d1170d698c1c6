"""What all weight quantizers share, and `float`, which leaves a weight in full precision.

What a quantizer needs beside the weights is its *parameters*: a dict of tensors, the *tables* that decode codes among
them, kept in the weights' own precision. Codes and quantized weights are recomputed from the float weights and the
parameters, so applying a quantizer twice, or after any other, gives the same weights. Parameters may also hold `codes`
of their own, where a weight is not rounded to the nearest level.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from quant import groups, uaq, weighted
from quant.fitting import fit_together

TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of scales and centroids
FLOAT = "float"


@dataclass(frozen=True)
class Quantizer:
    """One way to hold a weight [C, ...] of C output channels in `bits` bits; `group` inputs together, None for all."""

    bits: int
    group: int | None = None

    algorithm: ClassVar[str]  # in words
    tables: ClassVar[tuple[str, ...]]  # names of the parameters that turn codes back into weights
    optional: ClassVar[tuple[str, ...]] = ("codes",)  # what else parameters may hold
    is_affine: ClassVar[bool] = False  # whether weights are whole numbers times a scale, so that products may be of those
    takes_groups: ClassVar[bool] = True
    on_host: ClassVar[bool] = False  # whether the CPU fits it, whatever device the weight is on

    @property
    def name(self):
        """The quantizer's word, such as `mse-4` or `mse-4-g64`."""
        return f"{self.algorithm}-{self.bits}" + (f"-g{self.group}" if self.group else "")

    def fit(self, weight, statistics=None):
        """Parameters {table: tensor} for `weight` [C, ...], in its precision; ValueError if it has NaN or infinities.

        Scales and zero points have shape [C], centroids [C, k], with groups [C, G] and [C, G, k], G = ceil(n / group) for
        n weights per channel; of K-Means-A [k]. k = min(2^bits, weights that share a codebook). `statistics`, the
        Moments of the inputs (quant/calibration.py), weigh each weight's squared error by its input's second moment.
        """
        if statistics is None:
            return fit_together([self], weight)[0][self.name]
        importance = groups.split(weighted.importance(weight, statistics), self.group)
        blocks = zip(groups.split(weight, self.group), importance, strict=True)
        tables = groups.join_tables([self.fit_weighted(*block) for block in blocks], self.group, len(weight))
        return self.stored(tables, weight.dtype)

    def encode(self, weight, parameters):
        """Codes (uint8, shape of `weight`): the parameters' own, or the nearest levels."""
        if "codes" in parameters:
            return parameters["codes"]
        return self._by_block(self._encode, weight, parameters)

    def decode(self, codes, parameters):
        """Weights, in the tables' precision, that the codes stand for."""
        return self._by_block(self._decode, codes, {name: parameters[name] for name in self.tables})

    def apply(self, weight, parameters):
        """`decode(encode(weight))`, by a faster way where there is one."""
        if "codes" in parameters:
            return self.decode(parameters["codes"], parameters)
        return self._by_block(self._apply, weight, parameters)

    def error(self, weight, parameters):
        """Quantization error: sum over output channels of the channel's mean |w - w'|^2.4."""
        return uaq.total_error(weight, self.apply(weight, parameters))

    def size_bytes(self, shape, precision_bits):
        """Size of the codes and of what decodes them; `precision_bits` is the float weights' own.

        What decodes: UAQ's scale and zero point per output channel, K-Means-C's 2^b centroids per output channel, per
        group where there are any; K-Means-A's 2^b centroids. (Mills et al., 2025.) Fewer weights than 2^b that share a
        codebook have a centroid each.
        """
        overhead_bits = len(self.tables) * math.prod(self.table_shape(shape)) * precision_bits
        return math.prod(shape) * self.bits // 8 + overhead_bits // 8

    def lead(self, shape):
        """Shape of what has a table of its own in a weight of that shape: (C,), (C, G) or, of the whole weight, ()."""
        return (shape[0],) if self.group is None else (shape[0], groups.groups_per_channel(self.group, shape))

    def table_shape(self, shape):
        """Shape of each table of a weight of that shape."""
        return self.lead(shape)

    def rows_of(self, weight):
        """The weights [R, n] that share a table, those of a quantizer without groups."""
        return weight.reshape(len(weight), -1)

    def levels(self, shape):
        """Codes are below this number."""
        return 2**self.bits

    def check(self, parameters, shape):
        """Whether `parameters`, read from a file, are whole and sound for a weight of that shape.

        Right names, precisions and shapes, plain dense tensors, positive scales, finite levels, ascending centroids;
        boundaries and codes, if any, too.
        """
        try:
            required, named = set(self.tables), set(parameters)
            if not required <= named <= required | set(self.optional):
                return False
            tables = {name: tensor for name, tensor in parameters.items() if name != "codes"}
            sound = all(map(_is_plain, parameters.values())) and self._are_sound(shape, **tables)
            return sound and ("codes" not in parameters or self._are_codes(parameters["codes"], shape))
        except (TypeError, AttributeError, IndexError, RuntimeError):  # of what is no tensor, or an odd one
            return False

    def _are_codes(self, codes, shape):
        fits = codes.dtype == torch.uint8 and codes.shape == torch.Size(shape)
        return fits and (not codes.numel() or int(codes.max()) < self.levels(shape))

    def _by_block(self, function, tensor, parameters):
        """What function(block, **tables) gives for each block of the tensor [C, ...], as one tensor of its shape."""
        if self.group is None:
            return function(tensor, **parameters)
        tables = groups.split_tables(parameters, self.group, tensor.shape)
        blocks = zip(groups.split(tensor, self.group), tables, strict=True)
        return groups.join([function(block, **each) for block, each in blocks], tensor.shape)

    def _error_of_rows(self, blocks, parameters, shape):
        """`error` by the sorted rows of a weight of that shape, of parameters just fitted to it."""
        width = math.prod(shape[1:])
        tables = groups.split_tables(parameters, self.group, shape)
        errors = [self._row_error(b.rows, **t) * (b.rows.shape[1] / width) for b, t in zip(blocks, tables, strict=True)]
        return sum(errors)


class Float(Quantizer):
    """No quantizer: the weight stays in full precision, needs no parameters and has no error. Its codes are its values."""

    algorithm, tables, optional, takes_groups = FLOAT, (), (), False

    @property
    def name(self):
        """`float`."""
        return FLOAT

    def fit(self, weight, statistics=None):
        """No parameters."""
        return {}

    def encode(self, weight, parameters):
        """The weight."""
        return weight

    def decode(self, codes, parameters):
        """The weight."""
        return codes

    def apply(self, weight, parameters):
        """The weight."""
        return weight

    def error(self, weight, parameters):
        """None: 0."""
        return 0.0

    def size_bytes(self, shape, precision_bits):
        """Size of the float weight."""
        return fp_size_bytes(shape, precision_bits)

    def check(self, parameters, shape):
        """Whether there are no `parameters`."""
        return parameters == {}


def _is_plain(tensor):
    """Whether it is an ordinary dense tensor, as every kernel takes them."""
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not tensor.is_conj() and not tensor.is_neg()


def fp_size_bytes(shape, precision_bits):
    """Size of the float weight."""
    return math.prod(shape) * precision_bits // 8
