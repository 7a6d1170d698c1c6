"""Stage 1: fit all six quantizers to every weight of a denoiser and store them."""

import time
from pathlib import Path

from errors import InputError
from models.lora import open_lora
from models.pipelines import load_denoiser, pick_device
from quant import multiquantizer, published
from stages.common import in_precision, multiquantizer_of, parser_for


def main(family):
    args = parse_args(family)
    family = in_precision(family, args.dtype)
    path = args.output or multiquantizer_of(args, family)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the long work, in case it fails
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder")
    loras = [open_lora(each) for each in args.lora]
    denoiser = load_denoiser(family, args.model_id, pick_device(args.device), loras)
    if args.stitch:
        stitch(denoiser, family, path)
    elif args.prefix:
        fit(denoiser, family, multiquantizer.part_path(path, args.prefix), args.prefix)
        missing = [prefix for prefix in family.parts if not multiquantizer.part_path(path, prefix).exists()]
        if missing:
            print(f"parts still to fit: --prefix {', '.join(missing)}")
        else:
            stitch(denoiser, family, path)
    else:
        fit(denoiser, family, path)


def parse_args(family):
    parser = parser_for(family, "multiquantizer", "fit all six quantizers of every weight layer")
    parser.add_argument("--res", type=int, help="resolution in pixels; the weights do not depend on it")
    parser.add_argument("--output", type=Path, help=f"file to write; default multiquantizers/{family.name}_mq.pt")
    parser.set_defaults(prefix="", stitch=False)
    if family.parts:
        parser.add_argument("--prefix", choices=family.parts, help="fit this part of the denoiser into a file of its own")
        parser.add_argument("--stitch", action="store_true", help="fit nothing; join the files of all parts into one")
    return parser.parse_args()


def fit(denoiser, family, path, prefix=""):
    start = time.monotonic()
    entries = multiquantizer.build(denoiser, family, path, prefix)
    own_bytes, published_bytes = path.stat().st_size, published.file_bytes(denoiser, family, prefix)
    print(
        f"{path}: {len(entries)} layers fitted in {time.monotonic() - start:.1f} s; {own_bytes:,} bytes, "
        f"{published_bytes / own_bytes:.0f} times smaller than the published format's {published_bytes:,}"
    )


def stitch(denoiser, family, path):
    entries = multiquantizer.stitch(denoiser, family, path)
    print(f"{path}: {len(entries)} layers of {len(family.parts)} parts; {path.stat().st_size:,} bytes")
