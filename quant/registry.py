"""The weight quantizers, an object for each word: UAQ, affine, K-Means-C and K-Means-A at 2 to 8 bits; and full precision.

The words are those of configurations and files: `mse-4`, `affine-4`, `kmeans-3`, `kmeans_all-4`. All but the last also take
groups of inputs: in `mse-4-g64` every 64 weights of an output channel have a scale and a zero point of their own. `float`
leaves a weight as it is.

What a quantizer needs beside the weights is its *parameters*: a dict of tensors, the *tables* that decode codes among
them, kept in the weights' own precision. Codes and quantized weights are recomputed from the float weights and the
parameters, so applying a quantizer twice, or after any other, gives the same weights. Parameters may also hold `codes`
of their own, where a weight is not rounded to the nearest level.
"""

import functools
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from errors import InputError
from quant import affine, groups, kmeans, sorted_errors, uaq, weighted
from quant.rows import check, sorted_rows

BITS = (4, 3)  # of the search space
TABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of scales and centroids
ZERO_DTYPES = (torch.int8, torch.int16, torch.int32)
FLOAT = "float"  # full precision
POSSIBLE = (
    "mse, affine, kmeans and kmeans_all take 2 to 8 bits, as mse-4, and all but the last groups of 2 or more inputs: "
    "mse-4-g64; float is full precision"
)


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
            return _fit([self], weight)[0][self.name]
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


class ChannelKMeans(Quantizer):
    """K-Means-C: codes count through ascending centroids of the output channel, or group; see quant/kmeans.py.

    Optional `boundaries`, one fewer than centroids, send a weight to another centroid than the nearest.
    """

    algorithm, tables, optional = "kmeans", ("centroids",), ("boundaries", "codes")

    @staticmethod
    def fit_block(block, bits):
        """Tables {b: {"centroids": [R, k]}} of the rows of a block, in its search's precision."""
        return {b: {"centroids": found} for b, found in kmeans.fit_per_channel(block.weight, bits, block.rows).items()}

    def stored(self, tables, dtype):
        """The fitted table as files hold it: centroids in `dtype`."""
        return {"centroids": tables["centroids"].to(dtype)}

    def fit_weighted(self, block, importance):
        """Tables {"centroids": [R, k]} of the rows of a block, by the importance of each weight."""
        return {"centroids": weighted.fit_per_channel(block, importance, self.bits)}

    def levels(self, shape):
        """Centroids of a codebook: 2^b, or as many as weights share it if these are fewer."""
        return min(2**self.bits, self._sharing(shape))

    def table_shape(self, shape):
        """Shape of the centroids of a weight [C, ...]."""
        return (*self.lead(shape), self.levels(shape))

    def _sharing(self, shape):
        """Weights that share a codebook, at most."""
        width = math.prod(shape[1:])
        return width if self.group is None else min(width, self.group)

    def _encode(self, block, centroids, boundaries=None):
        return kmeans.assign_by_boundaries(block, kmeans.boundaries_of(centroids) if boundaries is None else boundaries)

    def _decode(self, codes, centroids):
        return kmeans.dequantize(codes, centroids)

    def _apply(self, block, centroids, boundaries=None):
        return kmeans.apply(block, centroids, boundaries)

    def _row_error(self, rows, centroids):
        return sorted_errors.of_kmeans(rows, centroids)

    def _are_sound(self, shape, centroids, boundaries=None):
        lead, count = self.lead(shape), self.levels(shape)
        sound = _is_ascending(centroids, (*lead, count)) and bool(centroids.isfinite().all())
        # Above the last centroid that is used, boundaries are infinite.
        return sound and (boundaries is None or _is_ascending(boundaries, (*lead, count - 1)))


class WholeKMeans(ChannelKMeans):
    """K-Means-A: centroids of the whole weight."""

    algorithm, takes_groups, on_host = "kmeans_all", False, True

    @staticmethod
    def fit_block(block, bits):
        """Tables {b: {"centroids": [k]}} of a weight, in its search's precision."""
        return {b: {"centroids": found} for b, found in kmeans.fit_whole(block.weight, bits, block.rows).items()}

    def fit_weighted(self, block, importance):
        """Tables {"centroids": [k]} of a weight, by the importance of each number in it."""
        return {"centroids": weighted.fit_whole(block, importance, self.bits)}

    def lead(self, shape):
        """Shape of the codebooks: one for the whole weight."""
        return ()

    def rows_of(self, weight):
        """The weight as one row [1, n]."""
        return weight.reshape(1, -1)

    def _sharing(self, shape):
        return math.prod(shape)


def _is_plain(tensor):
    """Whether it is an ordinary dense tensor, as every kernel takes them."""
    if not torch.is_tensor(tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return not tensor.is_conj() and not tensor.is_neg()


def _is_ascending(table, shape):
    fits = table.dtype in TABLE_DTYPES and table.shape == shape
    return fits and bool((table[..., 1:] >= table[..., :-1]).all() and not table.isnan().any())


_KINDS = {kind.algorithm: kind for kind in (Uniform, Affine, ChannelKMeans, WholeKMeans)}
_WORD = re.compile(r"([a-z_]+)-([2-8])(?:-g([1-9][0-9]{0,8}))?")
ALGORITHMS = tuple(kind.algorithm for kind in (Uniform, ChannelKMeans, WholeKMeans))  # of the search space
SEARCH_SPACE = tuple(f"{algorithm}-{bits}" for algorithm in ALGORITHMS for bits in BITS)  # the six of Mills et al. (2025)


def quantizer(word):
    """The quantizer of a word such as `mse-4`; InputError, which tells the possible words, if there is no such."""
    found = _find(word) if isinstance(word, str) else None
    if found is None:
        raise InputError(f"unknown quantizer {word!r}; {POSSIBLE}")
    return found


@functools.lru_cache(maxsize=1024)
def _find(word):
    if word == FLOAT:
        return Float(bits=0)
    match = _WORD.fullmatch(word)
    kind = match and _KINDS.get(match[1])
    if not kind:
        return None
    group = match[3] and int(match[3])
    return None if group == 1 or (group and not kind.takes_groups) else kind(int(match[2]), group)


class Block(NamedTuple):
    """Rows that are fitted together: a weight, or those of its groups that are equally long."""

    weight: torch.Tensor  # [R, ...]
    rows: np.ndarray | None  # [R, width], ascending, float32; None where the weight is not fitted by them

    @classmethod
    def of(cls, weight):
        """The block of a weight [C, ...], its channels sorted where that is how it is fitted."""
        fast = weight.device.type == "cpu" and weight.dtype in sorted_errors.DROPPED_BITS
        return cls(weight, sorted_rows(weight) if fast else None)


def fit(weight, words=SEARCH_SPACE):
    """Parameters {word: {table: tensor}} of several quantizers for `weight` [C, ...]: each as it would fit it alone."""
    members, fitted = [quantizer(word) for word in words], {FLOAT: {}}
    for alike in _by_group(members):
        fitted |= _fit(alike, weight)[0]
    return {each.name: fitted[each.name] for each in members}


def fit_with_errors(weight, words=SEARCH_SPACE):
    """Parameters as `fit`, and the errors {word: float}. A weight's rows are sorted once for all words of like groups."""
    members, fitted, told = [quantizer(word) for word in words], {FLOAT: {}}, {FLOAT: 0.0}
    for alike in _by_group(members):
        parameters, blocks = _fit(alike, weight)
        fitted |= parameters
        for each in alike:
            own = parameters[each.name]
            fast = blocks[0].rows is not None
            error = each._error_of_rows(blocks, own, weight.shape) if fast else each.error(weight, own)
            told[each.name] = error if math.isfinite(error) else _finite_error(each, weight, own)
    return {each.name: fitted[each.name] for each in members}, {each.name: told[each.name] for each in members}


def _finite_error(member, weight, parameters):
    """The error by the slower route, which holds larger numbers; ValueError if even these are too small."""
    error = member.error(weight, parameters)
    if not math.isfinite(error):
        raise ValueError(
            f"the weight has numbers as large as {weight.abs().max().item():.3g}: {member.name}'s error overflows"
        )
    return error


def _by_group(members):
    """Lists of the quantizers that have the same groups; those that are fitted."""
    alike = {}
    for each in members:
        if each.tables:
            alike.setdefault(each.group, []).append(each)
    return alike.values()


def _fit(members, weight):
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


def fp_size_bytes(shape, precision_bits):
    """Size of the float weight."""
    return math.prod(shape) * precision_bits // 8
