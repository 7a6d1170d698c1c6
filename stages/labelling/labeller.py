"""What one process measures configurations with: the quantizable model and all that judges its images."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from bops.bops import tera_bops
from bops.macs import count_macs
from evaluation import fid
from evaluation.clip_score import ClipScore
from evaluation.constant_images import is_constant
from evaluation.proxies import paired
from models.clip import load_clip
from models.drawing import generate_batches
from models.embedded.judge import DigitFeatures
from models.families import FAMILIES
from models.listening import timed
from models.pipelines import is_embedded, meta_denoiser
from quant import config
from quant.file_keys import by_file_key
from stages import multi_chkpt, prompt_files, q_config
from stages.common import in_precision
from stages.labelling.stopwatch import Stopwatch
from stages.sampling import encode_for, load_encoded, settings_of


class Job(NamedTuple):
    """A labelling run, as every worker of it is told."""

    family_name: str
    args: object  # the stage's flags
    prompts: list  # or class numbers

    @property
    def family(self):
        return in_precision(FAMILIES[self.family_name], self.args.dtype)

    @property
    def prompts_key(self):
        return prompt_files.key(self.prompts)


class Task(NamedTuple):
    """Images number `first` to `last` of a configuration, the unit of work."""

    index: int | None  # of the configuration; None is full precision
    first: int
    last: int

    @property
    def name(self):
        return name_of(self.index)

    @property
    def count(self):
        return self.last - self.first


def name_of(index):
    return "full_precision" if index is None else f"config_{index:03d}"


def make_extractor(job, device):
    """What turns images into the features that FID compares."""
    return (DigitFeatures if is_embedded(job.family, job.args.model_id) else fid.InceptionFeatures)(device)


def encode(job, device):
    """The job's prompt embeddings, by a pipeline that is loaded for nothing else."""
    return [] if job.family.num_classes else encode_for(job.args, job.family, device, job.prompts)


class AtOnce(Executor):
    """Runs what it is given when it is given it, timed as `features`."""

    def __init__(self, watch):
        self.watch = watch

    def submit(self, function, *args):
        done = Future()
        with self.watch.phase("features"):
            done.set_result(function(*args))
        return done


class Labeller:
    """Measures configurations of a job; `embeddings` are its prompts'."""

    def __init__(self, job, device, embeddings, extractor=None):
        self.args, self.family, self.prompts, self.device = job.args, job.family, job.prompts, device
        self.settings = settings_of(job.args)
        self.extractor = extractor or make_extractor(job, device)
        self.clip = ClipScore(*load_clip(self.args.clip_model), device) if self.args.clip_score else None
        self.watch = Stopwatch(device)
        self.on_drawn = lambda count: None  # told how many images have come
        self.sampler = load_encoded(self.args, self.family, device, embeddings)
        denoiser = self.sampler.denoiser
        self.model = multi_chkpt.load(self.args.multi_chkpt, self.family, denoiser)
        self.macs = count_macs(meta_denoiser(denoiser), self.sampler.denoiser_inputs(self.args.res))

    def configuration(self, index):
        if self.args.q_config:
            return q_config.load(self.args.q_config[index], self.model.slots)
        return config.draw_random(self.model.slots, self.args.seed, index, self.args.a_l, self.args.a_u)

    def describe(self, indices):
        """The rows of configurations without what their images tell."""
        return [self._describe(index) for index in indices]

    def _describe(self, index):
        precision_bits = self.family.precision_bits
        if index is None:
            description = config.describe_full_precision(self.model.slots, precision_bits)
        else:
            description = self.model.describe(self.configuration(index))
        return {
            "quantized_size": config.quantized_size(description),
            "avg_bits": config.avg_bits(description, precision_bits),
            "quantized_error": float(sum(row[3] for row in description.values())),
            "bops": tera_bops(self.macs, self.model.slots, {key: row[0] for key, row in description.items()}),
            "config": by_file_key(description, self.model.slots),
        }

    def measure(self, task, full_precision=None):
        """({name: array [N, ...]}, {phase: seconds}) of the task's N images.

        `features` [N, F] are not numbers where an image is not; `constant` [N] says which are of one colour. With a
        `full_precision`, also the proxies: distances to its images; with --clip_score `clip_score` [N]; without it, and with
        --keep_samples, the `images`, and `latents`.
        """
        with self.watch.phase("quantize"):
            self.put(task.index)
        decoding = timed(self.watch, "decode", self.sampler.pipeline.vae, "decode")
        with decoding, self.judges() as judge, self.watch.phase("denoise"):
            numbers = task.name, task.first, task.last
            batches = generate_batches(self.sampler, self.prompts, self.settings, *numbers, show=False)
            judged = [judge.submit(self.judge, batch, full_precision) for batch in self.told(batches)]
            with self.watch.phase("features"):
                judged = [each.result() for each in judged]
        return {name: np.concatenate([each[name] for each in judged]) for name in judged[0]}, self.watch.take()

    def told(self, batches):
        for batch in batches:
            yield batch
            self.on_drawn(len(batch.indices))

    def judges(self):
        """Who judges images: on a GPU a thread, while the next are made; on a CPU two would be in each other's way."""
        return AtOnce(self.watch) if self.device.type == "cpu" else ThreadPoolExecutor(max_workers=1)

    def put(self, index):
        if index is None:
            self.model.restore()
        else:
            self.model.apply(self.configuration(index))

    def judge(self, batch, full_precision):
        """{name: array [N, ...]} of a batch of images, as `measure` has it."""
        features = fid.image_features(batch.images, self.extractor, self.device)
        judged = {
            "features": np.where(batch.broken[:, None], np.nan, features),
            "constant": is_constant(batch.images, batch.broken),
        }
        chosen = slice(batch.indices.start, batch.indices.stop)
        if full_precision is not None:
            originals = (np.array(each[chosen]) for each in (full_precision.images, full_precision.latents))
            judged |= paired(batch.images, batch.latents, *originals, self.device)
        if self.clip:
            judged["clip_score"] = self.clip.scores(batch.images, self.prompts[chosen])
        if full_precision is None or self.args.keep_samples:
            judged["images"] = batch.images
        if full_precision is None:
            judged["latents"] = batch.latents.numpy()
        return judged
