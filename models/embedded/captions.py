"""Captions of coloured digits: what the embedded text-to-image models are told to draw, and how to say it.

A subject is one of 300: a digit in one of six inks on one of five other papers. Subject s is digit
s // 30 in the colours INKS_ON_PAPERS[s % 30]; a caption is a subject in one of twelve phrasings.
"""

import random

from models.embedded.digits import INKS_ON_PAPERS, PALETTE

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a {ink} {digit} on a {paper} background",
    "{ink} {digit}, {paper} background",
    "the digit {digit} in {ink} ink on {paper} paper",
    "a handwritten {digit}, {ink} on {paper}",
    "{digit} written in {ink} on a {paper} page",
    "a {paper} sheet with a {ink} {digit}",
)
NUM_PHRASINGS = 2 * len(PHRASINGS)  # each with the digit as a word and as a numeral
NUM_SUBJECTS = len(DIGITS) * len(INKS_ON_PAPERS)


def subject_of(digit, pair):
    """The subject's number; `pair` is a place in INKS_ON_PAPERS. Numbers or tensors."""
    return digit * len(INKS_ON_PAPERS) + pair


def digit_and_colors(subject):
    """What a subject shows: digit 0 to 9, places of its ink and its paper in the palette."""
    digit, pair = divmod(subject, len(INKS_ON_PAPERS))
    return digit, *INKS_ON_PAPERS[pair]


def caption(subject, phrasing):
    """A subject (0 to 299) in a phrasing (0 to 11)."""
    digit, ink, paper = digit_and_colors(subject)
    names = list(PALETTE)
    template, as_numeral = PHRASINGS[phrasing // 2], phrasing % 2
    word = str(digit) if as_numeral else DIGITS[digit]
    return template.format(digit=word, ink=names[ink], paper=names[paper])


def all_captions():
    """All 3,600, a subject's twelve together."""
    return [caption(subject, phrasing) for subject in range(NUM_SUBJECTS) for phrasing in range(NUM_PHRASINGS)]


def subject_prompts(count):
    """`count` (subject, caption) pairs in a fixed random order that uses every subject before any comes again."""
    shuffled, pairs = random.Random(0), []
    while len(pairs) < count:
        subjects = shuffled.sample(range(NUM_SUBJECTS), NUM_SUBJECTS)
        pairs += [(subject, caption(subject, shuffled.randrange(NUM_PHRASINGS))) for subject in subjects]
    return pairs[:count]
