"""The weight quantizers by their words: UAQ, affine, K-Means-C and K-Means-A at 2 to 8 bits; and full precision.

The words are those of configurations and files: `mse-4`, `affine-4`, `kmeans-3`, `kmeans_all-4`. All but the last also take
groups of inputs: in `mse-4-g64` every 64 weights of an output channel have a scale and a zero point of their own. `float`
leaves a weight as it is.
"""

import functools
import math
import re

from errors import InputError
from quant.affine_quantizers import Affine, Uniform
from quant.codebook_quantizers import ChannelKMeans, WholeKMeans
from quant.fitting import fit_together
from quant.quantizer import FLOAT, Float

BITS = (4, 3)  # of the search space
POSSIBLE = (
    "mse, affine, kmeans and kmeans_all take 2 to 8 bits, as mse-4, and all but the last groups of 2 or more inputs: "
    "mse-4-g64; float is full precision"
)
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


def fit(weight, words=SEARCH_SPACE):
    """Parameters {word: {table: tensor}} of several quantizers for `weight` [C, ...]: each as it would fit it alone."""
    members, fitted = [quantizer(word) for word in words], {FLOAT: {}}
    for alike in _by_group(members):
        fitted |= fit_together(alike, weight)[0]
    return {each.name: fitted[each.name] for each in members}


def fit_with_errors(weight, words=SEARCH_SPACE):
    """Parameters as `fit`, and the errors {word: float}. A weight's rows are sorted once for all words of like groups."""
    members, fitted, told = [quantizer(word) for word in words], {FLOAT: {}}, {FLOAT: 0.0}
    for alike in _by_group(members):
        parameters, blocks = fit_together(alike, weight)
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
