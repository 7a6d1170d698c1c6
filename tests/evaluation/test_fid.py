import functools
import os

import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from conftest import ROOT
from PIL import Image

from errors import InputError
from evaluation import fid
from evaluation.images import save_png
from models.embedded.classifier import held_out_accuracy, load_classifier
from models.embedded.digits import reference_pictures

real_digits = functools.cache(reference_pictures)
REAL_PHOTOS = ROOT.parent / "shared" / "data" / "imagenet"
CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path):
    """Two folders of digits, one in a subfolder, as reference sets often are."""
    pictures = real_digits()
    for name, chosen in (("a", pictures[:90]), ("b/deeper", 255 - pictures[200:290])):
        (tmp_path / name).mkdir(parents=True)
        for index, picture in enumerate(chosen):
            save_png(picture, tmp_path / name / f"{index}.png")
    return tmp_path / "a", tmp_path / "b"


def test_equals_clean_fid(folders):
    """Our way through cached statistics gives the number clean-fid gives for two folders."""
    extractor = fid.DigitFeatures(CPU)
    reference = fid.reference_statistics(folders[1], extractor, CPU)
    ours = fid.distance(fid.folder_features(folders[0], extractor, CPU), reference)
    theirs = clean_fid.compare_folders(
        str(folders[0]),
        str(folders[1]),
        extractor.model,
        mode="clean",
        device=CPU,
        custom_fn_resize=extractor.resize,
        verbose=False,
    )
    assert ours == pytest.approx(theirs, rel=1e-6) and ours > 1


class Coarse:
    """Takes 75 numbers of an image that clean-fid has resized to 299 x 299, in place of the Inception network."""

    resize = None

    @staticmethod
    def model(batch):
        return torch.nn.functional.adaptive_avg_pool2d(batch, 5).flatten(1)


@pytest.mark.parametrize("extractor", [Coarse(), fid.DigitFeatures(CPU)], ids=["resized", "digits"])
def test_features_in_memory_equal_those_of_files(folders, extractor):
    """What clean-fid computes from the PNG files, without the files."""
    files = fid.image_files(folders[0])
    from_files = fid.folder_features(folders[0], extractor, CPU)
    images = [np.asarray(Image.open(file)) for file in files]
    in_memory = fid.image_features(images, extractor, CPU)
    assert np.array_equal(in_memory, from_files)
    reference = fid.statistics(fid.folder_features(folders[1], extractor, CPU))
    assert fid.distance(in_memory, reference) == fid.distance(from_files, reference) > 1


def test_by_hand():
    features = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    mean, covariance = fid.statistics(features)
    assert fid.distance(features, (np.add(mean, [3, 4]), covariance)) == pytest.approx(25)


def test_reference_is_read_once(folders, monkeypatch):
    extractor = fid.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    monkeypatch.setattr(fid, "folder_features", lambda *args: pytest.fail("computed again"))
    again = fid.reference_statistics(folders[0], extractor, CPU)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


def test_reference_follows_what_is_in_the_folder(folders):
    extractor = fid.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    save_png(np.zeros((64, 64, 3), np.uint8), folders[0] / "new.png")
    assert not np.array_equal(first[0], fid.reference_statistics(folders[0], extractor, CPU)[0])


def test_reference_follows_an_image_rewritten_in_the_same_size(tmp_path):
    pictures = real_digits()
    for index in range(3):
        save_png(pictures[index], tmp_path / f"{index}.bmp")
    before = fid.folder_key(tmp_path)
    size = (tmp_path / "1.bmp").stat().st_size
    save_png(pictures[100], tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(0, 10**18))
    assert (tmp_path / "1.bmp").stat().st_size == size
    assert fid.folder_key(tmp_path) != before


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match="holds no images"):
        fid.image_files(tmp_path)
    with pytest.raises(InputError, match=r"no such folder.*constants\.py"):
        fid.image_files(tmp_path / "nothing")


def test_damaged_image_is_named(folders):
    (folders[0] / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        fid.folder_features(folders[0], fid.DigitFeatures(CPU), CPU)


def test_sizes_that_do_not_match(folders):
    save_png(np.zeros((32, 48, 3), np.uint8), folders[0] / "other.png")
    with pytest.raises(InputError, match="an image cannot be used"):
        fid.folder_features(folders[0], fid.DigitFeatures(CPU), CPU)


def test_out_of_memory_is_not_blamed_on_an_image(folders, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(fid.clean_fid, "get_files_features", full)
    with pytest.raises(torch.OutOfMemoryError):
        fid.folder_features(folders[0], fid.DigitFeatures(CPU), CPU)


def test_one_image_is_too_few(tmp_path):
    save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "only.png")
    with pytest.raises(InputError, match="one image"):
        fid.reference_statistics(tmp_path, fid.DigitFeatures(CPU), CPU)


def test_damaged_statistics_are_computed_again(folders):
    extractor = fid.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    for path in (fid.cache_folder() / "fid").iterdir():
        path.write_bytes(b"nothing of use")
    assert np.array_equal(first[0], fid.reference_statistics(folders[0], extractor, CPU)[0])


def test_another_classifier_has_its_own_statistics(monkeypatch):
    name = fid.DigitFeatures(CPU).name
    other = load_classifier()
    other.heads[0].weight.data.mul_(2)
    monkeypatch.setattr(fid, "load_classifier", lambda device: other)
    assert fid.DigitFeatures(CPU).name != name


@pytest.mark.skipif(not REAL_PHOTOS.exists(), reason="no real photos here")
def test_finds_photos_in_class_folders():
    assert len(fid.image_files(REAL_PHOTOS)) == 100


def test_the_judge_knows_real_digits_and_their_colours():
    assert min(held_out_accuracy(load_classifier())) >= 0.97  # digit, ink, paper


def test_reference_digits_are_drawn_once(monkeypatch):
    folder = fid.digit_reference_folder()
    assert len(fid.image_files(folder)) == 1797
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert fid.digit_reference_folder() == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
