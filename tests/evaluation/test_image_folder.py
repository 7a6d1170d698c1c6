import os
import struct
import zlib

import numpy as np
import pytest
import torch
from cleanfid.utils import ResizeDataset
from conftest import ROOT
from PIL import Image

from errors import InputError
from evaluation import fid
from evaluation.image_folder import folder_key, image_files, read_rgb
from models.embedded import judge
from quant.files import save_png

REAL_PHOTOS = ROOT.parent / "shared" / "data" / "imagenet"
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every gray value
GRAY = np.repeat(RAMP[..., None], 3, axis=2)
COLOUR = np.dstack([RAMP, RAMP.T, 255 - RAMP])


@pytest.fixture
def folder(tmp_path):
    """Four pictures, two of them in a folder of their own."""
    for name in ("a.png", "b.png", "n01/c.png", "n01/d.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(COLOUR, tmp_path / "set" / name)
    return tmp_path / "set"


def names(folder):
    return [os.path.relpath(file, folder) for file in image_files(folder)]


def refusal(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pixels(path):
    picture, more_frames = read_rgb(path)
    assert picture.dtype == np.uint8 and not more_frames
    return picture


# Which files count


def test_every_suffix_of_an_image_in_any_case(tmp_path):
    listed = sorted(["a.bmp", "b.JPG", "c.jfif", "d.WebP", "e.TIF", "f.png.jpeg", "g.pgm", "h.gif", "i.npy.png"])
    for name in (*listed, "masks.npy", "Thumbs.db", "README", "notes.txt"):
        (tmp_path / name).touch()
    assert names(tmp_path) == listed


def test_arrays_and_files_that_are_no_images_are_left_out_and_said(folder, caplog):
    np.save(folder / "stats.npy", np.zeros((64, 64, 3), np.uint8))
    (folder / "._a.png").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
    (folder / "__MACOSX").mkdir()
    save_png(COLOUR, folder / "__MACOSX" / "x.png")
    (folder / "labels").touch()
    assert len(image_files(folder)) == 4 and not caplog.text
    image_files(folder, say=True)
    assert "not counted as images" in caplog.text
    assert all(what in caplog.text for what in ("1 of .npy", "2 hidden", "1 without a suffix"))


def test_nothing_is_said_of_a_folder_of_images(folder, caplog):
    image_files(folder, say=True)
    assert not caplog.text


def test_a_folder_named_like_an_array(folder):
    folder.rename(folder.with_name("x.npy.images"))
    renamed = folder.with_name("x.npy.images")
    (renamed / "n01").rename(renamed / "n01.png")
    assert names(renamed) == ["a.png", "b.png", "n01.png/c.png", "n01.png/d.png"]
    assert np.array_equal(pixels(image_files(renamed)[0]), COLOUR)


def test_a_pipe_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    assert len(image_files(folder)) == 4


def test_folders_without_images(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.npy").touch()
    assert "holds no images (not counted: 1 of .npy); reference folders" in refusal(image_files, tmp_path / "empty")
    assert "no such folder" in refusal(image_files, tmp_path / "none")
    assert "is a file" in refusal(image_files, folder / "a.png")


# Links


def test_linked_folders_are_followed(folder, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "n02").symlink_to(folder / "n01")
    (tmp_path / "links" / "deeper").symlink_to(folder)
    (tmp_path / "links" / "own.png").symlink_to(folder / "a.png")
    assert names(tmp_path / "links") == ["deeper/a.png", "deeper/b.png", "deeper/n01/c.png", "deeper/n01/d.png"]
    (tmp_path / "links" / "deeper").unlink()
    assert names(tmp_path / "links") == ["n02/c.png", "n02/d.png", "own.png"]


def test_a_folder_that_is_a_link_itself(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert names(tmp_path / "link") == names(folder) and folder_key(tmp_path / "link") == folder_key(folder)


def test_links_in_a_circle_end_and_are_said(folder, caplog):
    (folder / "n01" / "up").symlink_to(folder)
    (folder / "out").symlink_to("..")
    save_png(COLOUR, folder.parent / "outside.png")
    (folder / "self").symlink_to(folder / "self2")
    (folder / "self2").symlink_to(folder / "self")
    assert "self" in refusal(image_files, folder)
    (folder / "self").unlink()
    (folder / "self2").unlink()
    assert len(image_files(folder, say=True)) == 4
    assert "2 linked to a folder around it" in caplog.text


def test_what_is_reached_twice_counts_once_under_its_own_name(folder, caplog):
    before, key = names(folder), folder_key(folder)
    (folder / "a0.png").symlink_to(folder / "n01" / "c.png")
    (folder / "latest").symlink_to("n01")
    assert image_files(folder, say=True) and names(folder) == before and folder_key(folder) == key
    assert "2 linked twice" in caplog.text


def test_copies_of_an_image_count_each(folder):
    os.link(folder / "a.png", folder / "hard.png")
    assert len(image_files(folder)) == 5


@pytest.mark.parametrize("name", ["e.png", "n02"])
def test_links_to_nothing_are_refused(folder, name):
    """Or half of the classes could be missing unseen."""
    (folder / name).symlink_to("/nowhere/at/all")
    assert f"{folder / name}: a link to /nowhere/at/all" in refusal(image_files, folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_a_folder_that_cannot_be_read(folder):
    (folder / "n01").chmod(0)
    assert "n01: cannot be looked into" in refusal(image_files, folder)


# The key, on which old labels depend


def test_key_is_of_names_and_sizes(tmp_path):
    for name, content in (("b.jpg", b"12"), ("n1/A.PNG", b"1"), ("n1/c.txt", b"no image")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert folder_key(tmp_path, times=False) == "62969b3167cfa4eda6de59fb8297380d"


def test_names_need_not_be_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    assert len(folder_key(tmp_path)) == 32


# Pixels


def clean_fid_reads(path):
    dataset = ResizeDataset([str(path)], mode="clean")
    dataset.fn_resize = lambda picture: picture
    return dataset[0].permute(1, 2, 0).numpy().round().astype(np.uint8)


@pytest.mark.parametrize(
    "name", ["rgb.png", "rgb.jpg", "gray.png", "gray.jpg", "palette.png", "one.png", "cmyk.jpg", "turned.jpg"]
)
def test_ordinary_files_are_what_clean_fid_reads(tmp_path, name):
    kind, path, options = name.split(".")[0], tmp_path / name, {}
    image = Image.fromarray(COLOUR)
    if kind == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6  # a quarter turn, which clean-fid does not make
    image.convert({"gray": "L", "palette": "P", "one": "1", "cmyk": "CMYK"}.get(kind, "RGB")).save(path, **options)
    assert np.array_equal(pixels(path), clean_fid_reads(path))


@pytest.mark.skipif(not REAL_PHOTOS.exists(), reason="no real photos here")
def test_real_photos_are_what_clean_fid_reads():
    for path in image_files(REAL_PHOTOS)[::10]:
        assert np.array_equal(pixels(path), clean_fid_reads(path))


@pytest.mark.parametrize(
    "name, values",
    [
        ("16.png", RAMP.astype(np.uint16) * 257),
        ("16.tif", RAMP.astype(np.uint16) * 257),
        ("shifted.png", RAMP.astype(np.uint16) * 256),
        ("big_endian.tif", (RAMP.astype(np.uint16) * 257).astype(">u2")),
        ("16.jp2", RAMP.astype(np.uint16) * 257),
        ("16.pgm", RAMP.astype(np.uint16) * 257),
        ("32.tif", RAMP.astype(np.int32) * 257),
        ("32_of_8.tif", RAMP.astype(np.int32)),
        ("float.tif", RAMP.astype(np.float32)),
        ("unit.tif", (RAMP / 255).astype(np.float32)),
    ],
)
def test_deeper_gray_values_are_those_of_the_8_bit_file(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(pixels(tmp_path / name), GRAY)


def test_fid_of_16_bit_files_is_that_of_8_bit_files(tmp_path):
    extractor = judge.DigitFeatures(torch.device("cpu"))
    for name, kind, factor in (("deep", np.uint16, 257), ("plain", np.uint8, 1)):
        (tmp_path / name).mkdir()
        for index in range(4):
            values = np.kron(np.roll(RAMP, index, axis=0), np.ones((4, 4))).astype(kind)
            Image.fromarray(values * kind(factor)).save(tmp_path / name / f"{index}.png")
    deep, plain = (fid.folder_features(tmp_path / name, extractor, "cpu") for name in ("deep", "plain"))
    assert np.array_equal(deep, plain) and plain.std(axis=0).max() > 0


@pytest.mark.parametrize(
    "values, what",
    [
        (RAMP.astype(np.int32) * 1000, "0 to 255000"),
        (RAMP.astype(np.int32) - 1, "-1 to 254"),
        (RAMP.astype(np.float32) / 100, "neither from 0 to 1"),
        (RAMP.astype(np.float32) * 2, "neither from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "neither from 0 to 1"),
    ],
)
def test_gray_values_of_unknown_scale_are_refused(tmp_path, values, what):
    Image.fromarray(values).save(tmp_path / "x.tif")
    message = refusal(read_rgb, tmp_path / "x.tif")
    assert what in message and str(tmp_path / "x.tif") in message


def on_white(alpha):
    """What shows of COLOUR with an alpha channel in front of white."""
    return COLOUR * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None]


def test_transparency_lies_on_white(tmp_path):
    alpha = RAMP.T
    Image.fromarray(np.dstack([COLOUR, alpha])).save(tmp_path / "rgba.png")
    assert np.abs(pixels(tmp_path / "rgba.png") - on_white(alpha)).max() <= 1
    Image.fromarray(np.dstack([RAMP, 255 * (RAMP > 99).astype(np.uint8)]), "LA").save(tmp_path / "la.png")
    assert np.array_equal(pixels(tmp_path / "la.png"), np.where(GRAY > 99, GRAY, 255))


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    Image.fromarray(np.dstack([COLOUR, np.full_like(RAMP, 255)])).save(tmp_path / "rgba.png")
    assert np.array_equal(pixels(tmp_path / "rgba.png"), COLOUR)


@pytest.mark.parametrize("mode, transparent", [("P", 77), ("L", 77), ("RGB", (77, 77, 77))])
def test_a_transparent_colour_lies_on_white(tmp_path, mode, transparent):
    Image.fromarray(RAMP).convert(mode).save(tmp_path / "x.png", transparency=transparent)
    assert np.array_equal(pixels(tmp_path / "x.png"), np.where(GRAY == 77, 255, GRAY))


def test_a_transparent_16_bit_gray_lies_on_white(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in RAMP)
    header, gray = struct.pack(">IIBBBBB", 16, 16, 16, 0, 0, 0, 0), struct.pack(">H", 77 * 257)
    chunks = [(b"IHDR", header), (b"tRNS", gray), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))
    assert np.array_equal(pixels(tmp_path / "x.png"), np.where(GRAY == 77, 255, GRAY))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_counts_which_is_said(tmp_path, caplog, suffix):
    frames = [Image.fromarray(np.full((64, 64, 3), shade, np.uint8)) for shade in (40, 80, 120)]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:], **lossless)
    frames[1].save(tmp_path / "one.png")
    picture, more_frames = read_rgb(tmp_path / f"x.{suffix}")
    assert more_frames and (picture == 40).all()
    fid.folder_features(tmp_path, judge.DigitFeatures(torch.device("cpu")), "cpu")
    assert "1 of 2 images have several frames" in caplog.text


def test_damaged_files_are_named(tmp_path):
    for suffix in ("png", "jpg", "tif", "webp", "bmp", "gif"):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(np.kron(COLOUR, np.ones((8, 8, 1), np.uint8))).save(path)
        whole = path.read_bytes()
        for content in (b"", b"<html>no such image</html>", whole[: len(whole) // 2], whole[:20]):
            path.write_bytes(content)
            message = refusal(read_rgb, path)
            assert message.startswith(f"{path}: an image cannot be used (") and ("an empty file" in message) == (not content)
