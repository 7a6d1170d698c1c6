import json
import runpy

import pytest
from conftest import ROOT

from errors import InputError
from stages import prompt_files

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
    def write(content, name="prompts.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def refusal(path, count=1):
    """The message of the error, which must be one line that names the file."""
    with pytest.raises(InputError) as caught:
        prompt_files.load(path, count)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    return message


def test_first_captions_in_file_order(captions):
    path = captions(["a zebra", " an apple.\n", "a zebra", "a bus"])
    assert prompt_files.load(path, 3) == ["a zebra", "an apple.", "a zebra"]
    assert prompt_files.load(str(path), 4)[-1] == "a bus"


def test_only_captions_in_use_are_checked(captions):
    path = captions(["a zebra", None])
    assert prompt_files.load(path, 1) == ["a zebra"]
    assert "annotations[1]" in refusal(path, 2)


def test_lines_without_blank_ones(lines):
    path = lines("one cat \n\n  \t\r\n two dogs\r\ndrei Vögel, 三只鸟")
    assert prompt_files.load(path, 3) == ["one cat", "two dogs", "drei Vögel, 三只鸟"]


def test_lines_are_used_in_turn(lines):
    assert prompt_files.load(lines("a\nb\nc\n"), 7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert prompt_files.load(lines("a\nb\nc\n"), 2) == ["a", "b"]


def test_byte_order_mark_is_no_part_of_a_prompt(lines, captions):
    assert prompt_files.load(lines("a cat".encode("utf-8-sig")), 1) == ["a cat"]
    path = captions(["a dog"])
    path.write_bytes(path.read_text().encode("utf-8-sig"))
    assert prompt_files.load(path, 1) == ["a dog"]


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
        ('["a cat", 7]', "entry 2 holds 7"),
        ('"a cat"', "holds a single value"),
        ('[" ", null]', "holds no prompts"),
        ({"version": "1", "name": "mine"}, "keys are version, name, none of them named prompt"),
        ({"1": {"tag": "a"}}, 'entry "1" has the keys tag, none of them named prompt'),
        ('[{"prompt": "a"}, {"text": "b"}]', "entry 2 has the keys text, no prompt"),
        ({"prompt": "a cat", "data": []}, '"prompt" is no list'),
        ({"images": [{"id": 1}], "categories": []}, 'no list "annotations"'),
        ({"images": [{"sentences": [{"raw": "a"}]}, {"sentences": [{"tokens": []}]}]}, 'a text "raw"'),
        ({"images": [{"sentences": [{"raw": 1}]}]}, 'a text "raw"'),
        ('{"prompt": "a"}\n{"prompt": "b"}', "named .jsonl"),
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
    assert prompt_files.key(["a", "b"]) == prompt_files.key(("a", "b"))
    assert len(prompt_files.key(["a"])) == 32 and int(prompt_files.key(["a"]), 16)
    others = (["a", "b"], ["b", "a"], ["ab"], ["a, b"], ['a", "b'], ["a\nb"], ["a", "b", ""], [])
    assert len({prompt_files.key(other) for other in others}) == len(others)


def test_key_is_the_same_in_every_run():
    assert prompt_files.key(["ein Vögelchen", "三只鸟"]) == "808f469b446f99bf7c43ab8ad1bc8fc7"


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
    everything = prompt_files.load(REAL_CAPTIONS, 25_014)
    assert all(everything) and everything[:1000] == prompt_files.load(REAL_CAPTIONS, 1000)
    assert everything[0] == "A black Honda motorcycle parked in front of a garage."
    assert "holds 25014 captions" in refusal(REAL_CAPTIONS, 25_015)


# Tables

THREE = ["a red seven", "“two”, drei Vögel", "4"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("parti.tsv", "Prompt\tCategory\tNote\na red seven\tAbstract\t\n“two”, drei Vögel\tBasic\tx\n4\tBasic\tx\n"),
        ("drawbench.csv", 'Prompts,Category\na red seven,Colors\n"“two”, drei Vögel",Colors\n4,Counting\n'),
        ("last.CSV", 'id, CAPTION \r\n1,a red seven\r\n\r\n2,"“two”, drei Vögel"\r\n , \r\n3,\r\n4,4'),
        ("marked.csv", '\ufeffprompt\na red seven\n"“two”, drei Vögel"\n4'),
        ("semicolons.csv", "nr;text\n1;a red seven\n2;“two”, drei Vögel\n3;4\n"),
        ("tabs.csv", "nr\tprompt\n1\ta red seven\n2\t“two”, drei Vögel\n3\t4\n"),
        ("several.csv", 'text,caption,prompt\nx,y,a red seven\nx,y,"“two”, drei Vögel"\nx,y,4\n'),
        (
            "lines.jsonl",
            '{"id": 1, "prompt": "a red seven"}\n\n{"prompt": "“two”, drei Vögel"}\n{"prompt": ""}\n{"prompt": "4"}',
        ),
        ("texts.ndjson", '"a red seven"\n"“two”, drei Vögel"\n"4"\n'),
        ("hpsv2.json", '["a red seven", "", " “two”, drei Vögel", "4"]'),
        ("objects.json", '[{"text": "a red seven"}, {"text": "“two”, drei Vögel"}, {"text": null}, {"text": "4"}]'),
        ("mjhq.json", '{"0a": {"prompt": "a red seven"}, "0b": {"prompt": "“two”, drei Vögel"}, "0c": {"prompt": "4"}}'),
        ("column.json", '{"Prompts": ["a red seven", "“two”, drei Vögel", "4"], "seed": [1, 2, 3]}'),
        (
            "pandas.json",
            '{"prompt": {"0": "a red seven", "1": "“two”, drei Vögel", "2": "4"}, "n": {"0": 1, "1": 2, "2": 3}}',
        ),
        ("several.json", '[{"caption": ["a red seven", "4"]}, {"caption": "“two”, drei Vögel"}]'),
    ],
)
def test_prompts_of_tables(lines, name, content):
    path = lines(content, name)
    assert prompt_files.load(path, 3) == THREE
    assert prompt_files.load(path, 7) == [*THREE, *THREE, THREE[0]]  # used in turn


def test_line_breaks_and_quotation_marks_in_a_cell(lines):
    path = lines('id,prompt\n1,"a handwritten 3,\nwhite on ""green"""\n2,a sign "stop"\n', "x.csv")
    assert prompt_files.load(path, 2) == ['a handwritten 3,\nwhite on "green"', 'a sign "stop"']


def test_quotation_marks_that_belong_to_a_prompt(lines):
    """PartiPrompts has one that begins so."""
    path = lines('Prompt\tNote\n"STOP" painted on a wall\t\na cat\t"x\n', "parti.tsv")
    assert prompt_files.load(path, 2) == ['"STOP" painted on a wall', "a cat"]
    assert prompt_files.load(lines('Prompt\tNote\n"a ""cat"""\tx\n', "quoted.tsv"), 1) == ['a "cat"']


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("x.csv", "id,Category\n1,a cat\n", "its columns, by the first line, are id, Category, none of them named prompt"),
        ("x.csv", "a red seven\na blue two\n", "columns, by the first line, are a red seven, none"),
        ("x.csv", "prompt\na cat, on a mat\n", "line 2 has 2 cells where the first line has 1; a prompt"),
        ("x.csv", "prompt,note\na cat\non a mat,x\n", "line 2 has 1 cells where the first line has 2"),
        ("x.csv", 'prompt,note\n"a cat,x\nb,y\n', "not one of a table"),
        ("x.csv", "prompt,note\n,x\n", "its column prompt is empty"),
        ("x.csv", f"prompt{'x' * 200_000}\na\n", "none of them named prompt"),
        ("x.csv", f"prompt\n{'x' * 200_000}\n", "line 2 is not one of a table"),
        ("x.tsv", "Prompt\tNote\na cat\n", "line 2 has 1 cells"),
        ("x.csv", '[{"prompt": "a"}]', "none of them named prompt"),
        ("x.csv", "prompt\nein grüner Hund\n".encode("latin-1"), "not a readable UTF-8 text file"),
        ("x.csv", "prompt\na\n".encode("utf-16"), "not a readable UTF-8 text file"),
        ("x.txt", "a cat\na dog\n".encode("utf-16-le"), "holds null characters"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', "not readable JSON in line 2"),
        ("x.jsonl", '[{"prompt": "a"}]', "line 1 holds {"),
        ("x.jsonl", '{"tag": "a"}', "line 1 has the keys tag, none of them named prompt"),
        ("x.jsonl", "7", "line 1 holds 7 in place of a text"),
        ("prompts.json.gz", b"\x1f\x8b", "prompts are not read from .gz files"),
        ("prompts.parquet", "a", "prompts are not read from .parquet files"),
        ("prompts.yaml", "- a cat\n", "prompts are not read from .yaml files"),
        ("x.txt", '["a cat", "a dog"]', "holds JSON; name it .json"),
        ("x.txt", '{"annotations": []}', "holds JSON; name it .json"),
        ("x.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "or .jsonl if each line"),
        ("x.txt", "Prompt\tCategory of it\na\tb\n", "holds a table; name it .tsv"),
        ("x.txt", "1.jpg#0\ta cat\n1.jpg#1\ta dog\n", "holds a table; name it .tsv"),
        ("captions.txt", "image,caption\n1.jpg,a cat\n", "holds a table; name it .csv"),
        ("captions", "prompt\na cat\n", "holds a table"),
        ("x.txt", '[\n {"prompt": "a cat"},\n', "holds JSON; name it"),
        ("x.txt", "<!DOCTYPE html>\n<html>", "holds a web page"),
        ("x.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", "Git LFS pointer"),
        ("x.txt", "# nothing\n", "holds comments alone"),
    ],
)
def test_what_is_refused(lines, name, content, what):
    assert what in refusal(lines(content, name))


def test_comments_are_no_prompts_and_hashtags_are(lines, caplog):
    path = lines("# my prompts\n\na red seven\n#sunset over a lake\n  ## more\n#\n")
    assert prompt_files.load(path, 2) == ["a red seven", "#sunset over a lake"]
    assert "left out as comments" in caplog.text and caplog.text.rstrip().endswith(": 3")


def test_plain_lines_are_not_taken_for_something_else(lines, caplog):
    plain = ["a cat, text", "[a cat] (a dog:1.3)", "{a cat}", "a dog\ton a mat", '"a cat"', "prompt: a cat"]
    assert prompt_files.load(lines("\n".join(plain)), 6) == plain and not caplog.text


def test_karpathys_captions(lines):
    """Of the test split, the first caption of each image before the second ones."""

    def image(split, *captions):
        return {"split": split, "sentences": [{"raw": caption, "tokens": []} for caption in captions]}

    images = [image("train", "x"), image("test", "a1", "a2 "), image("restval", "y"), image("test", "b1"), image("val", "z")]
    path = lines(json.dumps({"images": images, "dataset": "coco"}), "dataset_coco.json")
    assert prompt_files.load(path, 3) == ["a1", "b1", "a2"]
    assert "holds 3 captions and 4 are needed" in refusal(path, 4)
    path = lines(json.dumps({"images": images[2:3] + images[4:]}), "others.json")
    assert prompt_files.load(path, 2) == ["y", "z"]
