"""The model card of a quantized pipeline, written from what is known of it."""

import inspect
from collections import Counter
from typing import NamedTuple

import yaml

from models.inputs import prompt_argument
from stages.units import as_size

KEPT_LINES = ("license", "license_name", "license_link", "language", "pipeline_tag")  # of the base's card


class Packed(NamedTuple):
    """What is told of one packed denoiser."""

    name: str
    class_name: str
    weights: int  # that are quantized
    float_bytes: int  # of its weight files at the base's precision
    packed_bytes: int
    avg_bits: float
    words: Counter  # {method: number of layers' weights under it}
    left: dict  # {reason: paths of layers that stay float}


def write_card(path, base, packed, title, made, sheet, precision, pipeline_class):
    """Write the card at `path`.

    `base` is the source, `made` lines on how it was made, `sheet` the contact sheet's name or None.
    """
    header = header_of(base)
    lines = ["---", yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(), "---", "", f"# {title}", ""]
    lines += [f"{base_name(base)} with its {' and '.join(each.name for each in packed)} quantized to low-bit codes."]
    if sheet:
        lines += ["", f"![The same prompts and noise before and after]({sheet})"]
    lines += ["", "## Use", "", *usage(title, pipeline_class, precision)]
    lines += ["", "## Sizes", "", *sizes(packed)]
    lines += ["", "## How it was made", "", *[f"- {line}" for line in made]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def base_name(base):
    """The Hub id of the base model, or its folder's name: whole paths are the owner's own matter."""
    return base.model_id if base.hub else base.folder.resolve().name


def header_of(base):
    """The card's header: what the base's own tells of licence and kind, and what this one is."""
    told = {name: value for name, value in base_header(base).items() if name in KEPT_LINES}
    if base.hub:
        told |= {"base_model": base.model_id, "base_model_relation": "quantized"}
    return told | {"library_name": "diffusers", "tags": ["qua2sedimo", "quantized", "diffusers"]}


def base_header(base):
    """The header of the base's own card; {} where there is none that can be read."""
    if "README.md" not in base.names:
        return {}
    try:
        base.fetch(["README.md"])
        text = (base.folder / "README.md").read_text(encoding="utf-8")
        header = yaml.safe_load(text.split("---", 2)[1]) if text.startswith("---") else {}
    except Exception:  # as many types as of the values that YAML may hold
        return {}
    return header if isinstance(header, dict) else {}


def usage(title, pipeline_class, precision):
    """The lines that load it and draw; on a GPU in the `precision`, a dtype's name, that it was quantized from."""
    known = inspect.signature(pipeline_class.__call__).parameters
    what = '"a red seven"' if prompt_argument(pipeline_class) == "prompt" else "class_labels=[3]"
    made = "frames" if "num_frames" in known else "images"
    return [
        "```python",
        "import quant, torch  # quant is of this program: it lets diffusers read what is packed",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("{title}", dtype=torch.{precision})',
        f"{made} = pipe({what}).{made}",
        "```",
    ]


def sizes(packed):
    lines = [
        "| component | class | quantized weights | average bits | bytes before | bytes after |",
        "|---" * 6 + "|",
    ]
    for each in packed:
        lines.append(
            f"| {each.name} | {each.class_name} | {each.weights:,} | {each.avg_bits:.3f} | {each.float_bytes:,} "
            f"({as_size(each.float_bytes)}) | {each.packed_bytes:,} ({as_size(each.packed_bytes)}) |"
        )
    for each in packed:
        words = ", ".join(f"{count} {word}" for word, count in each.words.most_common())
        lines += ["", f"{each.name}: {words} (weights of layers by quantizer)."]
        lines += [f"{len(paths)} layers stay float: {reason}." for reason, paths in each.left.items() if paths]
    return lines
