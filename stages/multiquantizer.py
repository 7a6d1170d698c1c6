"""Stage 1: fit all six quantizers, and others if asked for, to every weight of a denoiser and store them."""

import time
from pathlib import Path

from models.lora import open_lora
from models.pipelines import load_denoiser, pick_device
from quant import multiquantizer, published
from quant.files import check_writable
from quant.model import QuantizedModel
from quant.quantizer import FLOAT
from quant.registry import SEARCH_SPACE
from stages.common import in_precision, multiquantizer_of, parser_for
from stages.search_flags import checked_methods


def main(family):
    args = parse_args(family)
    family = in_precision(family, args.dtype)
    path = args.output or multiquantizer_of(args, family)
    check_outputs(args, family, path)
    loras = [open_lora(each) for each in args.lora]
    denoiser = load_denoiser(family, args.model_id, pick_device(args.device), loras)
    model = QuantizedModel(denoiser, **family.quantization)
    if args.stitch:
        stitch(model, family.prefixes, path, args.overwrite)
    elif args.prefix:
        fit(model, multiquantizer.part_path(path, args.prefix), args, args.prefix)
        missing = [prefix for prefix in family.prefixes if not multiquantizer.part_path(path, prefix).exists()]
        if missing:
            print(f"parts still to fit: --prefix {', '.join(missing)}")
        else:
            stitch(model, family.prefixes, path, args.overwrite)
    else:
        fit(model, path, args)


def check_outputs(args, family, path):
    """InputError if what is written cannot be, or would take the place of something else: before the long work."""
    for each in {path, multiquantizer.part_path(path, args.prefix) if args.prefix else path}:
        check_writable(each)
        if not args.overwrite:
            multiquantizer.check_replaceable(each, family.name)


def parse_args(family):
    parser = parser_for(family, "multiquantizer", "fit all six quantizers of every weight layer")
    parser.add_argument("--res", type=int, help="resolution in pixels; the weights do not depend on it")
    parser.add_argument("--output", type=Path, help=f"file to write; default multiquantizers/{family.name}_mq.pt")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a file whatever it holds, the quantizers of other weights too",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="WORD",
        help="fit these too, such as affine-4 or kmeans-5; a file that is there is added to",
    )
    parser.set_defaults(prefix="", stitch=False)
    if family.prefixes:
        parser.add_argument("--prefix", choices=family.prefixes, help="fit this part of the denoiser into a file of its own")
        parser.add_argument("--stitch", action="store_true", help="fit nothing; join the files of all parts into one")
    return parser.parse_args(complete=lambda args: {"methods": words_of(args.methods)})


def words_of(methods):
    """The search space's words and others; `float` needs no fit. InputError for an unknown one."""
    return (*SEARCH_SPACE, *(word for word in checked_methods(methods) if word not in (*SEARCH_SPACE, FLOAT)))


def fit(model, path, args, prefix=""):
    if not args.overwrite and multiquantizer.holds(path, model, prefix, args.methods):
        print(f"{path}: holds the quantizers of these weights already; --overwrite fits them anew")
        return
    start = time.monotonic()
    entries = multiquantizer.build(model, path, prefix, args.overwrite, args.methods)
    own_bytes, published_bytes = path.stat().st_size, published.file_bytes(model, prefix)
    print(
        f"{path}: {len(entries)} layers fitted in {time.monotonic() - start:.1f} s; {own_bytes:,} bytes, "
        f"{published_bytes / own_bytes:.0f} times smaller than the published format's {published_bytes:,}"
    )


def stitch(model, prefixes, path, overwrite):
    entries = multiquantizer.stitch(model, path, prefixes, overwrite)
    print(f"{path}: {len(entries)} layers of {len(prefixes)} parts; {path.stat().st_size:,} bytes")
