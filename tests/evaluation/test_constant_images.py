import numpy as np

from evaluation.constant_images import is_constant, say_constant


def test_images_of_one_colour():
    images = np.zeros((3, 4, 5, 3), np.uint8)
    images[0] = (10, 200, 30)
    images[2, 3, 4, 2] = 1  # in one channel of the last pixel
    assert is_constant(images).tolist() == [True, True, False]


def test_an_image_of_no_numbers_is_not_counted_as_one_of_one_colour():
    images = np.zeros((2, 4, 5, 3), np.uint8)
    assert is_constant(images, np.array([False, True])).tolist() == [True, False]


def test_they_are_counted_where_there_are_any(caplog):
    say_constant("ordinary", np.array([False, False]))
    assert not caplog.text
    say_constant("mine", np.array([True, False, True]))
    assert "mine: 2 of 3 images are of one constant colour" in caplog.text
