"""What benchmarks/quality.py compares: ours and other programs'.

An arm is built by a function of a fresh float denoiser and the sampler that it is in: `build(denoiser, sampler)` gives the
denoiser to draw with, its weights quantized, and what is stored of each weight, {key or path: function from a shape to
bytes} (benchmarks/stored_size.py). The sampler is there for calibration, whose prompts and seeds must not be those that are
measured.
"""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import quality_peers as peers
from benchmarks.embedded_quality import make_pictures
from benchmarks.quality_peers import of_peer
from benchmarks.stored_size import of_words
from quant.model import QuantizedModel
from stages import calibrating, q_config


@dataclass(frozen=True)
class Arm:
    """One way to hold the weights."""

    title: str
    build: Callable
    package: str | None = None  # of another program: its name in the package index
    version: str | None = None  # of what may change under one name


def of_ours(quantize):
    """The build of an arm of ours: `quantize(model, sampler)` lets a QuantizedModel's weights hold quantized values.

    It returns {key: quantizer's word, None for full precision} of what they hold. What corrects weights beyond their words
    needs a build of its own, which counts the correction.
    """

    def build(denoiser, sampler):
        model = QuantizedModel(denoiser, **sampler.family.quantization)
        return denoiser, of_words(quantize(model, sampler), sampler.family.precision_bits)

    return build


def of_configuration(spec):
    """Ours, of what `--q_config` names in the other programs: each weight to its nearest level."""

    def quantize(model, _sampler):
        configuration = q_config.load(spec, model.slots)
        model.apply(configuration)
        return configuration

    return of_ours(quantize)


def of_calibrated(spec):
    """Ours, calibrated (stages/calibrating.py) on images of prompts and noise that are not measured."""

    def quantize(model, sampler):
        configuration = q_config.load(spec, model.slots)
        return calibrated(model, sampler, configuration)

    return of_ours(quantize)


def calibrated(model, sampler, configuration):
    row, count = sampler.family.embedded, calibrating.IMAGES
    prompts = [number % row.num_classes for number in range(count)] if sampler.family.num_classes else None
    prompts = prompts or calibrating.captions({"calibration_images": count})
    draw = functools.partial(make_pictures, sampler, prompts, calibrating.SEED_OFFSET, row.label_guidance)
    with tempfile.TemporaryDirectory() as folder:
        calibrating.calibrate(model, configuration, [draw], Path(folder), "").apply(configuration)
    return configuration


def configuration_arm(path, title, build=of_configuration):
    """The arm of a configuration's file, which is measured again when its content changes."""
    return Arm(title, build(str(path)), version=q_config.key(path).rpartition(" ")[2])


def _ours(title, word):
    return Arm(title, of_configuration(f"uniform:{word}"))


def _calibrated(title, word):
    return Arm(f"{title}, calibrated", of_calibrated(f"uniform:{word}"))


def _sdnq(title, bits, **options):
    return Arm(f"SDNQ uint{bits}{title}", of_peer(peers.sdnq, weights_dtype=f"uint{bits}", **options), "sdnq")


def _gguf(kind, padded):
    title = f"GGUF {kind}, all weights, rows padded" if padded else f"GGUF {kind}, linear layers of whole blocks"
    return Arm(title, of_peer(peers.gguf, kind=kind, padded=padded), "gguf")


# Each is measured under its name here.
ARMS = {
    "float": Arm("full precision", of_ours(lambda model, _sampler: dict.fromkeys(model.slots))),
    "mse-4": _ours("UAQ, 4 bits", "mse-4"),
    "mse-3": _ours("UAQ, 3 bits", "mse-3"),
    "kmeans-4": _ours("K-Means-C, 4 bits", "kmeans-4"),
    "kmeans-3": _ours("K-Means-C, 3 bits", "kmeans-3"),
    "kmeans_all-4": _ours("K-Means-A, 4 bits", "kmeans_all-4"),
    "kmeans_all-3": _ours("K-Means-A, 3 bits", "kmeans_all-3"),
    "affine-4": _ours("affine, 4 bits", "affine-4"),
    "affine-3": _ours("affine, 3 bits", "affine-3"),
    "mse-4-calibrated": _calibrated("UAQ, 4 bits", "mse-4"),
    "mse-3-calibrated": _calibrated("UAQ, 3 bits", "mse-3"),
    "affine-4-calibrated": _calibrated("affine, 4 bits", "affine-4"),
    "affine-3-calibrated": _calibrated("affine, 3 bits", "affine-3"),
    "kmeans-4-calibrated": _calibrated("K-Means-C, 4 bits", "kmeans-4"),
    "kmeans-3-calibrated": _calibrated("K-Means-C, 3 bits", "kmeans-3"),
    "kmeans_all-4-calibrated": _calibrated("K-Means-A, 4 bits", "kmeans_all-4"),
    "kmeans_all-3-calibrated": _calibrated("K-Means-A, 3 bits", "kmeans_all-3"),
    "sdnq-uint6": _sdnq("", 6),
    "sdnq-uint5": _sdnq("", 5),
    "sdnq-uint4": _sdnq("", 4),
    "sdnq-uint3": _sdnq("", 3),
    "sdnq-uint2": _sdnq("", 2),
    "sdnq-uint4-svd4": _sdnq(", SVD of rank 4", 4, rank=4),
    "sdnq-uint4-svd8": _sdnq(", SVD of rank 8", 4, rank=8),
    "sdnq-uint3-svd4": _sdnq(", SVD of rank 4", 3, rank=4),
    "sdnq-uint3-svd8": _sdnq(", SVD of rank 8", 3, rank=8),
    "sdnq-uint4-hadamard": _sdnq(", Hadamard", 4, hadamard=True),
    "sdnq-uint3-hadamard": _sdnq(", Hadamard", 3, hadamard=True),
    "sdnq-uint3-dynamic": _sdnq(", dynamic", 3, dynamic=True),
    "sdnq-uint2-dynamic": _sdnq(", dynamic", 2, dynamic=True),
    "sdnq-uint3-dynamic-hadamard": _sdnq(", dynamic, Hadamard", 3, dynamic=True, hadamard=True),
    "sdnq-uint2-dynamic-hadamard": _sdnq(", dynamic, Hadamard", 2, dynamic=True, hadamard=True),
    "sdnq-uint4-codebook": _sdnq(", codebooks", 4, codebook=True),
    "sdnq-uint3-codebook": _sdnq(", codebooks", 3, codebook=True),
    "quanto-int4": Arm("optimum-quanto qint4", of_peer(peers.quanto), "optimum-quanto"),
    "nf4": Arm("bitsandbytes NF4", of_peer(peers.nf4), "bitsandbytes"),
    "gguf-q4_0": _gguf("Q4_0", padded=False),
    "gguf-q4_0-padded": _gguf("Q4_0", padded=True),
    "gguf-q4_1-padded": _gguf("Q4_1", padded=True),
    "gguf-q5_0-padded": _gguf("Q5_0", padded=True),
}
