import json
import runpy

import pytest
from conftest import ROOT

from errors import InputError
from evaluation import prompts

REAL_CAPTIONS = ROOT.parent / "shared" / "data" / "coco" / "captions_val2017.json"


@pytest.fixture
def captions(tmp_path):
    """Writes captions in the official layout, or any other content as it is, to a JSON file."""

    def write(content):
        if isinstance(content, list):
            content = {"annotations": [{"image_id": 9, "id": i, "caption": text} for i, text in enumerate(content)]}
        path = tmp_path / "captions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.fixture
def lines(tmp_path):
    def write(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, count=1):
    """The message of the error, which must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        prompts.load(path, count)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


def test_first_captions_in_file_order(captions):
    path = captions(["a zebra", " an apple.\n", "a zebra", "a bus"])
    assert prompts.load(path, 3) == ["a zebra", "an apple.", "a zebra"]
    assert prompts.load(str(path), 4)[-1] == "a bus"


def test_only_captions_in_use_are_checked(captions):
    path = captions(["a zebra", None])
    assert prompts.load(path, 1) == ["a zebra"]
    assert "annotations[1]" in refusal(path, 2)


def test_lines_without_blank_ones(lines):
    path = lines("one cat \n\n  \t\r\n two dogs\r\ndrei Vögel, 三只鸟")
    assert prompts.load(path, 3) == ["one cat", "two dogs", "drei Vögel, 三只鸟"]


def test_lines_are_used_in_turn(lines):
    assert prompts.load(lines("a\nb\nc\n"), 7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert prompts.load(lines("a\nb\nc\n"), 2) == ["a", "b"]


def test_byte_order_mark_is_no_part_of_a_prompt(lines, captions):
    assert prompts.load(lines("a cat".encode("utf-8-sig")), 1) == ["a cat"]
    path = captions(["a dog"])
    path.write_bytes(path.read_text().encode("utf-8-sig"))
    assert prompts.load(path, 1) == ["a dog"]


def test_too_few_captions(captions):
    assert "holds 2 captions and 3 are needed" in refusal(captions(["a", "b"]), 3)


def test_missing_file_says_where_to_name_another(tmp_path):
    message = refusal(tmp_path / "none.json")
    assert "no such file" in message and "constants.py" in message and "--prompts" in message


@pytest.mark.parametrize(
    "content, what",
    [
        ('{"annotations": [', "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ('["a cat", "a dog"]', 'no list "annotations"'),
        ({"images": []}, 'no list "annotations"'),
        ({"annotations": {"0": "a cat"}}, 'no list "annotations"'),
        ({"annotations": ["a cat"]}, r"annotations[0] has no text"),
        ({"annotations": [{"bbox": [1, 2, 3, 4]}]}, r"annotations[0] has no text"),
        ([7], r"annotations[0] has no text"),
        (" \n", "an empty file"),
    ],
)
def test_json_that_is_not_captions(captions, content, what):
    assert what in refusal(captions(content))


def test_text_that_holds_no_prompts(lines, tmp_path):
    assert "an empty file" in refusal(lines("\n  \n"))
    assert "not a readable UTF-8 text file" in refusal(lines(b"\xff\xfe\x00caf\xe9"))
    assert "not a readable UTF-8 text file" in refusal(tmp_path)


def test_key_tells_prompts_apart():
    assert prompts.key(["a", "b"]) == prompts.key(("a", "b"))
    assert len(prompts.key(["a"])) == 32 and int(prompts.key(["a"]), 16)
    others = (["a", "b"], ["b", "a"], ["ab"], ["a, b"], ['a", "b'], ["a\nb"], ["a", "b", ""], [])
    assert len({prompts.key(other) for other in others}) == len(others)


def test_key_is_the_same_in_every_run():
    assert prompts.key(["ein Vögelchen", "三只鸟"]) == "808f469b446f99bf7c43ab8ad1bc8fc7"


def test_paths_from_the_environment(monkeypatch):
    names = ("COCO_2017_PROMPTS", "COCO_2017_IMAGES", "IMAGENET_VAL_IMAGES")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    placeholders = runpy.run_path(ROOT / "constants.py")
    assert all(placeholders[name].startswith("/your/path/to/") for name in names)
    for name in names:
        monkeypatch.setenv(name, f"/somewhere/{name}")
    assert all(runpy.run_path(ROOT / "constants.py")[name] == f"/somewhere/{name}" for name in names)


@pytest.mark.skipif(not REAL_CAPTIONS.exists(), reason="no real captions here")
def test_real_captions():
    everything = prompts.load(REAL_CAPTIONS, 25_014)
    assert all(everything) and everything[:1000] == prompts.load(REAL_CAPTIONS, 1000)
    assert everything[0] == "A black Honda motorcycle parked in front of a garage."
    assert "holds 25014 captions" in refusal(REAL_CAPTIONS, 25_015)
