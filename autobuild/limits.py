"""What a configuration has to keep beside its size: least bits, methods that are given, bit operations."""

import dataclasses
import fnmatch
import re
from dataclasses import dataclass

import numpy as np

from errors import InputError
from quant.quantizer import FLOAT
from quant.registry import quantizer

TERA = 1e12


@dataclass(frozen=True, eq=False)
class Budget:
    """A cost that adds up over the weights, and the most that it may come to."""

    costs: np.ndarray  # [W, M]
    limit: float
    flag: str  # by which it was given

    def check(self, allowed, name):
        """InputError if no choice among what is allowed, bool [W, M], keeps it."""
        least = np.where(allowed, self.costs, np.inf).min(axis=1).sum()
        if least > self.limit:
            raise InputError(f"{self.flag}: the smallest configuration of {name} has {least:.4g}, more than {self.limit:g}")


def restricted(space, min_bits=(), fix=()):
    """The space without the methods that are ruled out: `min_bits` [(pattern, bits)], `fix` [(pattern, method)].

    Patterns are shell-like, and match a key, a module's path or the beginning of one. InputError for one that matches
    nothing, a method that the space has not, and where nothing is left.
    """
    allowed = space.is_known.copy()
    bits = np.array([bits_of(method, space.precision_bits or 16) for method in space.methods])
    for pattern, least in min_bits:
        _rule_out(space, allowed, pattern, bits >= least, f"--min_bits {pattern}={least}")
    for pattern, method in fix:
        if method not in space.number:
            raise InputError(
                f"--fix {pattern}={method}: the search space has only {', '.join(space.methods)}; see --methods"
            )
        chosen = np.arange(len(bits)) == space.number[method]
        _rule_out(space, allowed, pattern, chosen, f"--fix {pattern}={method}")
    return dataclasses.replace(space, errors=np.where(allowed, space.errors, np.nan))


def bits_of(method, precision_bits):
    """Bits of a method's codes, or of a float weight."""
    return precision_bits if method == FLOAT else quantizer(method).bits


def _rule_out(space, allowed, pattern, kept, flag):
    places = [place for place, keys in enumerate(space.keys) if any(matches(key, pattern) for key in keys)]
    if not places:
        raise InputError(f"{flag}: no weight of {space.family} is called so; patterns are like 'transformer_blocks.*.attn1'")
    allowed[places] &= kept
    for place in places:
        if not allowed[place].any():
            raise InputError(f"{flag}: leaves no method of {', '.join(space.methods)} for {space.keys[place][0]}")


def matches(key, pattern):
    """Whether a pattern names a weight by its key, its module's path or the beginning of that."""
    path = re.sub(r"^model\.|\.weight_quantizer(_0)?$", "", key) if isinstance(key, str) else key.path
    names = [str(key), *(path[: dot.start()] for dot in re.finditer(r"\.|$", path))]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def bops_budget(space, tera_bops, most):
    """The Budget of `--max_bops`; `tera_bops` tells the tera-BOPs of a configuration {key: method}, as bops.tera_bops.

    They are a sum over weights, so those of each choice follow from the change that it makes alone.
    """
    base = np.zeros(len(space.keys), dtype=int)
    configuration = space.configuration(base)
    start = tera_bops(configuration)
    costs = np.zeros(space.size_bytes.shape)
    for place, keys in enumerate(space.keys):
        for code, method in enumerate(space.methods):
            costs[place, code] = tera_bops(configuration | dict.fromkeys(keys, method)) - start
    return Budget(costs + start / len(costs), most, "--max_bops")
