"""Prompts in JSON files: captions of COCO, or lists, objects and lines that hold prompts."""

import itertools
import json

from errors import first_line
from stages.prompt_tables import NONE_NAMED, column_of, told


def from_json(text, count):
    """The first `count` captions of COCO, in its own format or Karpathy's, else all prompts of a list or of objects.

    The objects stand in a list, or under names as MJHQ-30K's; or one object holds the whole column.
    """
    content = _parsed(text)
    if isinstance(content, list):
        return _prompts_of({f"entry {number}": each for number, each in enumerate(content, start=1)})
    if not isinstance(content, dict):
        raise ValueError("holds a single value")
    if "annotations" in content:
        return _coco_captions(content["annotations"], count)
    if _is_karpathys(content.get("images")):
        return _karpathys_captions(content["images"], count)
    if column := column_of(content):
        return _prompts_of(_numbered(column, content[column]))
    if content and all(isinstance(each, dict) for each in content.values()):
        return _prompts_of({f'entry "{name}"': each for name, each in content.items()})
    raise ValueError(f'has no list "annotations" of captions; its keys are {told(content)}, {NONE_NAMED}')


def from_json_lines(text, _count=None):
    """The prompts of lines that are objects or texts."""
    lines = {f"line {number}": line for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    return _prompts_of({where: _parsed(line, where) for where, line in lines.items()})


def _parsed(text, where="this file"):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise ValueError(
            f"not readable JSON in {where} ({first_line(reason)}); a file with an object per line is named .jsonl, "
            "one that is a list or an object as a whole .json"
        ) from None


def _coco_captions(annotations, count):
    if not isinstance(annotations, list):
        raise ValueError('has no list "annotations", as COCO captions files have')
    _check_enough(annotations, count)
    for place, annotation in enumerate(annotations[:count]):
        if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
            raise ValueError(f'annotations[{place}] has no text "caption", as COCO captions files have')
    return [annotation["caption"] for annotation in annotations[:count]]


def _is_karpathys(images):
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _karpathys_captions(images, count):
    """Those of the test split, or of all images where there is none."""
    try:
        images = [image for image in images if image.get("split") == "test"] or images
        captions = _in_turn([[sentence["raw"] for sentence in image["sentences"]] for image in images])
    except (AttributeError, KeyError, TypeError):
        raise ValueError('not every of its images has "sentences" with a text "raw", as Karpathy\'s have') from None
    _check_enough(captions, count)
    return captions[:count]


def _check_enough(captions, count):
    if len(captions) < count:
        raise ValueError(f"holds {len(captions)} captions and {count} are needed; lower --n_imgs")


def _numbered(column, values):
    """{place: value} of a column, a list or an object."""
    if not isinstance(values, list | dict):
        raise ValueError(f'its "{column}" is no list')
    values = values if isinstance(values, list) else list(values.values())
    return {f"{column}[{place}]": value for place, value in enumerate(values)}


def _prompts_of(records):
    """The prompts of {place: a text, several, or an object that holds either}, the first of each place first."""
    column, texts = None, []
    for where, record in records.items():
        if isinstance(record, dict):
            column = column or column_of(record)
            if column not in record:
                raise ValueError(f"{where} has the keys {told(record)}, {'no ' + column if column else NONE_NAMED}")
            record = record[column]
        texts.append(_texts(where, record))
    prompts = _in_turn(texts)
    if not prompts:
        raise ValueError("holds no prompts")
    return prompts


def _texts(where, value):
    """The texts in a value: itself, a list of them, or null."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for each in values:
        if not isinstance(each, str):
            raise ValueError(f"{where} holds {told([json.dumps(each)])} in place of a text")
    return values


def _in_turn(texts):
    """The first text of each list, then the second ones and so on; blank ones are left out."""
    ranks = itertools.zip_longest(*texts, fillvalue="")
    return [text for rank in ranks for text in rank if text.strip()]
