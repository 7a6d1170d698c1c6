"""What labelling costs beside the denoiser, and against the published loop: `python -m benchmarks.eval_overhead`.

Both label full precision and the same random configurations of an embedded model, on the same prompts and noise, one
after the other. The published loop draws images one by one, encodes each prompt each time, writes PNG files, and has
clean-fid read them and the whole reference set again for every configuration. Loading the model counts for neither.
Then Ray's workers label the configurations. Writes benchmarks/results/eval_overhead_<machine>.json.
"""

import argparse
import tempfile
import time
from pathlib import Path

from cleanfid import fid as clean_fid
from tqdm import tqdm

from benchmarks.machine import write_result
from evaluation import fid
from models.drawing import noise_generators
from models.embedded.judge import digit_reference_folder
from models.families import FAMILIES
from models.listening import timed
from models.pipelines import load_denoiser, pick_device
from quant import config, multiquantizer
from quant.files import save_png
from quant.model import QuantizedModel
from stages import multi_chkpt
from stages.labelling import eval_random
from stages.labelling.labeller import Job, make_extractor
from stages.labelling.labelling_run import LabellingRun
from stages.labelling.stopwatch import Stopwatch
from stages.labelling.workers import StoredPrompts, ThisProcess, start_workers
from stages.sampling import load_for, prompts_for


def job_of(args, folder, *more):
    """The labelling run that `<family>_eval_random.py --model_id embedded` makes of these flags, and `more` of its own."""
    family = FAMILIES[args.family]
    flags = ["--model_id", "embedded", "--outdir", folder / "labels", "--multi_chkpt", folder / "mq.pt"]
    flags += ["--num_archs", args.num_archs, "--n_imgs", args.n_imgs, "--batch_size", args.batch_size]
    flags += ["--no_refiner"] if family.refiner else []
    flags = eval_random.parse_args(family, [str(each) for each in (*flags, *more)])
    return Job(args.family, flags, prompts_for(flags, family))


def label_ours(job, device, reference):
    """FIDs of full precision and the configurations; all seconds, and those of the denoiser among them."""
    watch = Stopwatch(device)
    workers = ThisProcess(job, device, make_extractor(job, device), StoredPrompts(job), watch)
    denoiser = workers.labeller.sampler.denoiser
    encoding = watch.take().get("encode", 0.0)
    start = time.perf_counter()
    labelling = LabellingRun(job, workers, reference, watch)
    with timed(workers.labeller.watch, "denoiser", denoiser, "forward"):
        fids = [labelling.measure_full_precision()["FID-GT-1k"]]
        fids += [row["FID-GT-1k"] for row in labelling.label(list(labelling.indices))]
    return fids, encoding + time.perf_counter() - start, watch.seconds["denoiser"]


def label_as_published(job, device, folder):
    """FIDs of full precision and the configurations, and all seconds, by the published loop."""
    args, family = job.args, job.family
    sampler = load_for(args, family, device)
    model = multi_chkpt.load(args.multi_chkpt, family, sampler.denoiser)
    extractor, fids = make_extractor(job, device), []
    folder.mkdir()
    start = time.perf_counter()
    for index in (None, *range(args.num_archs)):
        if index is not None:
            model.apply(config.draw_random(model.slots, args.seed, index))
        for number, prompt in enumerate(tqdm(job.prompts, desc="published loop", unit="img", leave=False)):
            generators = noise_generators(args.seed, [number])
            (image,) = sampler.images([prompt], generators, args.steps, args.guidance, args.res)
            save_png((image * 255).round().astype("uint8"), folder / f"{number:05d}.png")
        options = {"mode": "clean", "device": device, "custom_fn_resize": extractor.resize, "verbose": False}
        reference = str(digit_reference_folder())
        fids.append(clean_fid.compare_folders(str(folder), reference, extractor.model, num_workers=0, **options))
    return fids, time.perf_counter() - start


def label_by_workers(job, device, reference):
    """Seconds in which the job's workers, once started, label the configurations; the bytes of their labels."""
    watch = Stopwatch(device)
    with start_workers(job, device, make_extractor(job, device), watch) as workers:
        labelling = LabellingRun(job, workers, reference, watch)
        labelling.measure_full_precision()
        start = time.perf_counter()
        labelling.label(list(labelling.indices))
        return time.perf_counter() - start, labelling.cache_path.read_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=list(FAMILIES), default="pixart_alpha")
    parser.add_argument("--num_archs", type=int, default=3)
    parser.add_argument("--n_imgs", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of Ray workers to compare")
    parser.add_argument("--device")
    parser.add_argument("--machine", default="cpu", help="last part of the result's name")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as temporary:
        job = job_of(args, Path(temporary))
        denoiser = load_denoiser(job.family, "embedded", device)
        multiquantizer.build(QuantizedModel(denoiser, **job.family.quantization), job.args.multi_chkpt)
        reference = fid.reference_statistics(digit_reference_folder(), make_extractor(job, device), device)
        ours, seconds, in_denoiser = label_ours(job, device, reference)
        published, published_seconds = label_as_published(job, device, Path(temporary) / "png")
        by_workers = {}
        for count in args.workers:
            shared = job_of(args, Path(temporary), "--workers", count, "--outdir", Path(temporary) / f"labels_{count}")
            by_workers[count] = label_by_workers(shared, device, reference)
    images = args.n_imgs * (args.num_archs + 1)
    result = {
        "family": args.family,
        "images": images,
        "batch_size": args.batch_size,
        "seconds": round(seconds, 2),
        "seconds_published": round(published_seconds, 2),
        "speedup_vs_published": round(published_seconds / seconds, 2),
        "share_outside_denoiser": round(1 - in_denoiser / seconds, 4),
        "seconds_by_workers": {count: round(seconds, 2) for count, (seconds, _) in by_workers.items()},
        "fids": [round(value, 4) for value in ours],
        "fids_published": [round(value, 4) for value in published],
    }
    print(f"{'':<12}{'seconds':>10}{'images/s':>10}   FID of full precision and each configuration")
    for name, time_s, fids in (("ours", seconds, ours), ("published", published_seconds, published)):
        print(f"{name:<12}{time_s:>10.1f}{images / time_s:>10.2f}   {', '.join(f'{value:.4f}' for value in fids)}")
    print(f"speedup {result['speedup_vs_published']:.2f}; outside the denoiser {result['share_outside_denoiser']:.1%}")
    for count, (time_s, labels) in by_workers.items():
        same = labels == by_workers[args.workers[0]][1]
        print(
            f"{count} workers: {args.num_archs} configurations in {time_s:.1f} s, labels {'the same' if same else 'DIFFER'}"
        )
    write_result(f"eval_overhead_{args.machine}", result)


if __name__ == "__main__":
    main()
