"""The search space of a denoiser: its graph, and of each weight what the methods cost; labels know six of them."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from autobuild import graph
from errors import InputError, shown
from models.families import FAMILIES
from quant import multiquantizer
from quant.entries import fitted
from quant.file_keys import file_ties
from quant.quantizer import fp_size_bytes
from quant.registry import SEARCH_SPACE, quantizer

NAMES = SEARCH_SPACE  # of labels; a method's code is its place here, or in a space's own `methods`
NUMBER = {name: code for code, name in enumerate(NAMES)}


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """W weights, in the graph's order, with M methods each, the six or others. Weights that share values are one."""

    family: str
    graph: graph.DenoiserGraph
    keys: list[list]  # [W] the keys of each in configurations, several if it is shared; a family's are file keys
    fp_bytes: np.ndarray  # [W] of all its keys
    size_bytes: np.ndarray  # [W, M] quantized, with overhead, of all its keys
    errors: np.ndarray  # [W, M] of one key; NaN where no label has seen the method, or it is ruled out
    precision_bits: int | None = None  # of the float weights; None is the family's own
    methods: tuple = NAMES  # [M]

    @functools.cached_property
    def number(self):
        """{method: its code}."""
        return {name: code for code, name in enumerate(self.methods)}

    @functools.cached_property
    def place(self):
        """{weight node: its number}."""
        return {node: number for number, node in enumerate(self.graph.weights)}

    @functools.cached_property
    def units(self):
        return self.graph.units()

    @property
    def is_known(self):
        """bool [W, M]."""
        return np.isfinite(self.errors)

    def codes(self, rows):
        """Method codes [R, W] of labelled rows."""
        firsts = [keys[0] for keys in self.keys]
        return np.array([[self.number[row["config"][key][0]] for key in firsts] for row in rows])

    def codes_of(self, configuration):
        """Method codes [W] of a configuration {key: method}; InputError for a method that is not of the space."""
        other = next((key for key, method in configuration.items() if method not in self.number), None)
        if other is not None:
            known = ", ".join(self.methods)
            raise InputError(f"{other}: {configuration[other]} is not of the search space; it has {known}")
        return np.array([self.number[configuration[keys[0]]] for keys in self.keys])

    @property
    def bit_bytes(self):
        """Bytes of all weights together at one bit each."""
        return self.fp_bytes.sum() / (self.precision_bits or FAMILIES[self.family].precision_bits)

    @property
    def smallest_bytes(self):
        """Bytes of the smallest configuration of known methods."""
        return np.where(self.is_known, self.size_bytes, np.inf).min(axis=1).sum()

    def avg_bits(self, codes):
        """Average bits of configurations, codes [..., W]."""
        return self.size_bytes[np.arange(len(self.keys)), codes].sum(axis=-1) / self.bit_bytes

    def limit_bytes(self, avg_bits):
        """Bytes that all weights together may take."""
        return avg_bits * self.bit_bytes

    def configuration(self, codes):
        """{key: method} of one configuration, codes [W]."""
        return {key: self.methods[code] for keys, code in zip(self.keys, codes, strict=True) for key in keys}


def of_rows(family, rows, name="labels"):
    """The space that labelled rows are of; InputError, with the rows' `name`, if they are of another denoiser."""
    drawn, keys = graph_and_keys(family)
    check_keys(rows, keys, family, name)
    fp_bytes = np.zeros(len(keys))
    size_bytes, errors = (np.full((len(keys), len(NAMES)), np.nan) for _ in range(2))
    for row in rows:
        for place, each in enumerate(keys):
            method, full, _, error = row["config"][each[0]]
            code = NUMBER[method]
            fp_bytes[place] = full * len(each)
            size_bytes[place, code] = row["config"][each[0]][2] * len(each)
            errors[place, code] = error
    return SearchSpace(family, drawn, keys, fp_bytes, size_bytes, errors, precision_of(rows[0]))


def precision_of(row):
    """Bits of the float weights that a labelled row counts in."""
    full, quantized = (sum(value[place] for value in row["config"].values()) for place in (1, 2))
    return round(row["avg_bits"] * full / quantized)


def of_multiquantizer(family, entries, name="multiquantizer", methods=NAMES):
    """The space of a denoiser, of a multiquantizer's entries {file key: entry}.

    InputError, with the file's `name`, if they are not of the family's layers; also if one lacks one of the six methods. Of
    other `methods`, which need not be fitted, errors are told as zero.
    """
    drawn, keys = graph_and_keys(family.name)
    slots = graph.slots_of_family(family.name)[1]
    multiquantizer.check_complete(entries, name, slots)
    bits = family.precision_bits
    shapes = [torch.Size(entries[each[0]]["shape"]) for each in keys]
    counts = np.array([len(each) for each in keys])
    return SearchSpace(
        family.name,
        drawn,
        keys,
        counts * [fp_size_bytes(shape, bits) for shape in shapes],
        counts[:, None] * [[quantizer(name).size_bytes(shape, bits) for name in methods] for shape in shapes],
        np.array([[_error(entries[each[0]], each[0], name) for name in methods] for each in keys]),
        bits,
        tuple(methods),
    )


def _error(entry, key, name):
    return fitted(entry, key, name, "errors") if name in NUMBER else entry["errors"].get(name, 0.0)


@functools.cache  # tracing takes seconds
def graph_and_keys(family):
    """A family's graph, and of each of its weights the file keys."""
    drawn = graph.of_family(family)
    _, slots = graph.slots_of_family(family)
    sharing = {}
    for key, tie in file_ties(slots).items():
        sharing.setdefault(tie, []).append(key)
    return drawn, [sharing[node.name] for node in drawn.weights]


def check_keys(rows, keys, family, name):
    wanted = {key for each in keys for key in each}
    for number, row in enumerate(rows, start=1):
        unknown = next((key for key in row["config"] if key not in wanted), None)
        if unknown:
            raise InputError(f"{name}: row {number} has {unknown}, which is not of {family}; --family names the denoiser")
        missing = next((each[0] for each in keys if each[0] not in row["config"]), None)
        if missing:
            raise InputError(f"{name}: row {number} lacks {missing}, which {family} has; --family names the denoiser")
        method = next((value[0] for value in row["config"].values() if value[0] not in NUMBER), None)
        if method:
            known = f"the search space has {', '.join(NAMES)}"
            raise InputError(f"{name}: row {number} has the unknown method {shown(method)}; {known}")
