import pytest
import torch

from models.embedded.captions import (
    NUM_PHRASINGS,
    NUM_SUBJECTS,
    all_captions,
    caption,
    digit_and_colors,
    subject_of,
    subject_prompts,
)
from models.embedded.digits import INKS_ON_PAPERS


def test_300_subjects_in_12_phrasings_are_all_different():
    captions = all_captions()
    assert (NUM_SUBJECTS, NUM_PHRASINGS) == (300, 12)
    assert len(captions) == len(set(captions)) == 3600
    assert captions[5 * 12 + 7] == caption(5, 7)


def test_captions_by_hand():
    seven_red_on_blue = subject_of(7, INKS_ON_PAPERS.index((0, 2)))
    assert caption(seven_red_on_blue, 0) == "a red seven on a blue background"
    assert caption(seven_red_on_blue, 1) == "a red 7 on a blue background"
    assert caption(seven_red_on_blue, 11) == "a blue sheet with a red 7"


def test_a_subject_s_number_goes_both_ways():
    assert (digit_and_colors(0), digit_and_colors(299)) == ((0, 0, 1), (9, 5, 4))
    shown = [digit_and_colors(subject) for subject in range(NUM_SUBJECTS)]
    assert len(set(shown)) == 300 and all(ink != paper for _, ink, paper in shown)
    assert [subject_of(digit, INKS_ON_PAPERS.index((ink, paper))) for digit, ink, paper in shown] == list(range(300))
    numbers = subject_of(torch.tensor([0, 9]), torch.tensor([3, 29]))
    assert numbers.tolist() == [3, 299]


@pytest.mark.parametrize("count", [10, 300, 700])
def test_prompts_use_every_subject_before_any_comes_again(count):
    pairs = subject_prompts(count)
    assert len(pairs) == count and pairs == subject_prompts(700)[:count]
    for first in range(0, count, NUM_SUBJECTS):
        subjects = [subject for subject, _ in pairs[first : first + NUM_SUBJECTS]]
        assert len(set(subjects)) == len(subjects)
    assert all(text in {caption(subject, way) for way in range(NUM_PHRASINGS)} for subject, text in pairs)


def test_prompts_are_mixed():
    subjects, texts = zip(*subject_prompts(60), strict=True)
    assert len({digit_and_colors(subject)[0] for subject in subjects}) == 10
    assert list(subjects) != sorted(subjects)
    assert 20 < sum(any(letter.isdigit() for letter in text) for text in texts) < 40  # numerals, else words
