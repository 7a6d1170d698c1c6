"""Stage 1: fit all six quantizers to every weight of a denoiser and store them."""

import time
from pathlib import Path

from errors import InputError
from models.pipelines import denoiser_of, load_pipeline, pick_device
from quant import multiquantizer, published
from stages.common import check_fits_model, multiquantizer_path, parser_for


def main(family):
    parser = parser_for(family, "multiquantizer", "fit all six quantizers of every weight layer")
    parser.add_argument("--res", type=int, help="resolution in pixels; the weights do not depend on it")
    parser.add_argument("--output", type=Path, help=f"file to write; default multiquantizers/{family.name}_mq.pt")
    args = parser.parse_args()
    path = args.output or multiquantizer_path(family, args.model_id)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the long work, in case it fails
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder")

    pipeline = load_pipeline(family, args.model_id, pick_device(args.device))
    check_fits_model(args, pipeline, family)
    denoiser = denoiser_of(pipeline, family)
    start = time.monotonic()
    entries = multiquantizer.build(denoiser, family, path)
    published_bytes = published.file_bytes(denoiser, family)
    own_bytes = path.stat().st_size
    print(
        f"{path}: {len(entries)} layers fitted in {time.monotonic() - start:.1f} s; {own_bytes:,} bytes, "
        f"{published_bytes / own_bytes:.0f} times smaller than the published format's {published_bytes:,}"
    )
