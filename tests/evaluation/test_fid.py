import functools
import os
import re

import numpy as np
import pytest
import torch
from cleanfid import fid as clean_fid
from conftest import ROOT
from no_network import no_network
from PIL import Image

from errors import InputError
from evaluation import fid
from models.embedded import judge
from models.embedded.classifier import held_out_accuracy, load_classifier
from models.embedded.digits import reference_pictures
from quant.files import save_png

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
    extractor = judge.DigitFeatures(CPU)
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


@pytest.mark.parametrize("extractor", [Coarse(), judge.DigitFeatures(CPU)], ids=["resized", "digits"])
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
    extractor = judge.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    monkeypatch.setattr(fid, "folder_features", lambda *args: pytest.fail("computed again"))
    again = fid.reference_statistics(folders[0], extractor, CPU)
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])


def test_number_of_images_is_told_and_kept(folders, caplog):
    caplog.set_level("INFO", "qua2sedimo")
    (folders[1] / "deeper.npy").touch()
    for _ in range(2):  # computed, then from the cache
        assert fid.reference_statistics(folders[1], judge.DigitFeatures(CPU), CPU).images == 90
        assert f"reference: 90 images of {folders[1]}" in caplog.text and "1 of .npy" in caplog.text
        caplog.clear()


def test_statistics_that_do_not_tell_their_number_are_computed_again(folders):
    """Such are of an earlier version, which read some files in other ways."""
    extractor = judge.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    path = fid.cache_folder() / "fid" / f"{extractor.name}-{fid.folder_key(folders[0])}.npz"
    np.savez(path, mean=first.mean + 1, covariance=first.covariance)
    assert np.array_equal(fid.reference_statistics(folders[0], extractor, CPU).mean, first.mean)


def test_the_pass_over_the_reference_has_a_bar_with_the_time_left(folders, capsys):
    fid.folder_features(folders[0], judge.DigitFeatures(CPU), CPU)
    bar = capsys.readouterr().err
    assert re.search(r"reference: 100%\|.*90/90 \[\d\d:\d\d<\d\d:\d\d", bar)


def test_black_reference_images_are_counted(folders, caplog):
    for name in ("black.png", "white.png"):
        save_png(np.full((64, 64, 3), 255 * (name == "white.png"), np.uint8), folders[0] / name)
    fid.folder_features(folders[0], judge.DigitFeatures(CPU), CPU)
    assert "reference: 2 of 92 images are of one constant colour" in caplog.text


def test_reference_follows_what_is_in_the_folder(folders):
    extractor = judge.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    save_png(np.zeros((64, 64, 3), np.uint8), folders[0] / "new.png")
    assert not np.array_equal(first[0], fid.reference_statistics(folders[0], extractor, CPU)[0])


def test_reference_follows_an_image_rewritten_in_the_same_size(tmp_path):
    pictures = real_digits()
    for index in range(3):
        Image.fromarray(pictures[index]).save(tmp_path / f"{index}.bmp")
    before = fid.folder_key(tmp_path)
    size = (tmp_path / "1.bmp").stat().st_size
    Image.fromarray(pictures[100]).save(tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(0, 10**18))
    assert (tmp_path / "1.bmp").stat().st_size == size
    assert fid.folder_key(tmp_path) != before


def test_damaged_image_is_named(folders):
    (folders[0] / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        fid.folder_features(folders[0], judge.DigitFeatures(CPU), CPU)


def test_sizes_that_do_not_match(folders):
    save_png(np.zeros((32, 48, 3), np.uint8), folders[0] / "other.png")
    with pytest.raises(InputError, match=r"other\.png: .*48 x 32 pixels, .*0\.png is 64 x 64"):
        fid.folder_features(folders[0], judge.DigitFeatures(CPU), CPU)


def test_out_of_memory_is_not_blamed_on_an_image(folders, monkeypatch):
    def full(batch):
        raise torch.OutOfMemoryError("no memory left")

    extractor = judge.DigitFeatures(CPU)
    monkeypatch.setattr(extractor, "model", full)
    with pytest.raises(torch.OutOfMemoryError):
        fid.folder_features(folders[0], extractor, CPU)


def test_one_image_is_too_few(tmp_path):
    save_png(np.zeros((64, 64, 3), np.uint8), tmp_path / "only.png")
    with pytest.raises(InputError, match="one image"):
        fid.reference_statistics(tmp_path, judge.DigitFeatures(CPU), CPU)


def test_damaged_statistics_are_computed_again(folders):
    extractor = judge.DigitFeatures(CPU)
    first = fid.reference_statistics(folders[0], extractor, CPU)
    for path in (fid.cache_folder() / "fid").iterdir():
        path.write_bytes(b"nothing of use")
    assert np.array_equal(first[0], fid.reference_statistics(folders[0], extractor, CPU)[0])


def test_another_classifier_has_its_own_statistics(monkeypatch):
    name = judge.DigitFeatures(CPU).name
    other = load_classifier()
    other.heads[0].weight.data.mul_(2)
    monkeypatch.setattr(judge, "load_classifier", lambda device: other)
    assert judge.DigitFeatures(CPU).name != name


@pytest.mark.skipif(not REAL_PHOTOS.exists(), reason="no real photos here")
def test_finds_photos_in_class_folders():
    assert len(fid.image_files(REAL_PHOTOS)) == 100


def test_the_judge_knows_real_digits_and_their_colours():
    assert min(held_out_accuracy(load_classifier())) >= 0.97  # digit, ink, paper


def test_reference_digits_are_drawn_once(monkeypatch):
    folder = judge.digit_reference_folder()
    assert len(fid.image_files(folder)) == 1797
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(before) == 1797
    assert judge.digit_reference_folder() == folder
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture
def inception_file(tmp_path, monkeypatch):
    """Where the Inception network's file is looked for."""
    monkeypatch.setattr(fid, "INCEPTION_FILE", tmp_path / fid.INCEPTION_FILE.name)
    return fid.INCEPTION_FILE


def inception_refusal(path):
    with pytest.raises(InputError) as caught:
        fid.InceptionFeatures(CPU)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


class TwoNumbers(torch.nn.Module):
    """Stands where the Inception network has its layers: mean and maximum of an image."""

    def forward(self, images):
        return torch.cat([images.mean(dim=(1, 2, 3))[:, None], images.amax(dim=(1, 2, 3))[:, None]], dim=1).repeat(1, 1024)


def whole_file(path, name="layers"):
    network = torch.nn.Module()
    network.add_module(name, TwoNumbers())
    torch.jit.script(network).save(path)


def test_inception_is_asked_as_clean_fid_does(inception_file, monkeypatch):
    whole_file(inception_file)
    monkeypatch.setattr(fid, "download_url_to_file", lambda *_: pytest.fail("fetched again"))
    images = np.stack([np.full((8, 8, 3), shade, np.uint8) for shade in (0, 128, 255)])
    features = fid.image_features(images, fid.InceptionFeatures(CPU), CPU)
    assert features.shape == (3, 2048) and features[:, 0] == pytest.approx([-1, 0, 127 / 128])


@pytest.mark.parametrize("damage", ["empty", "cut off", "weights", "text", "another"])
def test_a_damaged_inception_file_is_named(inception_file, damage):
    whole_file(inception_file, "layers" if damage == "cut off" else "others")
    if damage == "weights":
        torch.save({"weight": torch.zeros(3)}, inception_file)
    elif damage != "another":
        content = {"empty": b"", "text": b"<html>not found</html>"}.get(damage)
        inception_file.write_bytes(inception_file.read_bytes()[:-200] if content is None else content)
    message = inception_refusal(inception_file)
    assert "or damaged (" in message and "delete it and run again" in message and "downloaded" not in message


def test_an_inception_file_that_cannot_be_read(inception_file):
    inception_file.mkdir()
    assert "cannot be read (Is a directory)" in inception_refusal(inception_file)


def test_without_a_network_inception_is_not_called_damaged(inception_file):
    with no_network() as asked:
        message = inception_refusal(inception_file)
    assert asked and "cannot be downloaded" in message and "no network in this test" in message
    assert "damaged" not in message and list(inception_file.parent.iterdir()) == []


def test_a_full_disk_is_not_called_the_network(inception_file, monkeypatch):
    def full(url, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fid, "download_url_to_file", full)
    assert "No space left on device" in inception_refusal(inception_file)
