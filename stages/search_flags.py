"""The flags of a search: which methods it may take, and what is held."""

import argparse

from errors import InputError
from quant.quantizer import FLOAT
from quant.registry import quantizer

# Codebooks of 5 bits and more weigh more than what they save in error.
ANY_METHODS = (*(f"affine-{bits}" for bits in (2, 3, 4, 5, 6, 8)), *(f"kmeans-{bits}" for bits in (2, 3, 4)), FLOAT)


def add_search_flags(parser, default, when):
    """Flags for a parser; `default` are the methods that its search takes, `when` says with what they mean something."""
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="WORD",
        help=f"{when}: what each weight may take, as mse-4, affine-3, kmeans-5, affine-4-g64 or float; default "
        f"{' '.join(default)}",
    )
    parser.add_argument(
        "--min_bits",
        type=_pair_of(int),
        nargs="+",
        default=[],
        metavar="PATTERN=BITS",
        help="at least so many bits for weights whose path, or its beginning, matches: 'transformer_blocks.*.attn1=4'",
    )
    parser.add_argument(
        "--fix",
        type=_pair_of(str),
        nargs="+",
        default=[],
        metavar="PATTERN=WORD",
        help="this method for them: proj_out=float",
    )


def _pair_of(kind):
    def pair(text):
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern or (kind is int and not value.isdecimal()):
            raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN={'BITS' if kind is int else 'WORD'}")
        return pattern, kind(value)

    return pair


def checked_methods(words):
    """The words as a tuple; InputError for an unknown one, or one that is there twice."""
    for word in words:
        quantizer(word)
    twice = next((word for word in words if list(words).count(word) > 1), None)
    if twice:
        raise InputError(f"--methods: {twice} is there twice")
    return tuple(words)
