"""Quantize the denoisers of any diffusers pipeline and write a pipeline folder that diffusers loads.

Everything is made in a folder beside the output, which takes the output's name once it is whole; what was computed before a
run was cut off is found there by the next.
"""

import functools
import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from autobuild.replay import Replay, record_steps
from errors import InputError
from models import any_pipeline as pipelines
from models.components import one_line, quiet_loading, refuse_quantized
from models.pipelines import pick_device
from quant import config
from quant.files import check_writable
from quant.leftovers import remove_leftovers
from quant.memory import return_free_memory
from quant.model import QuantizedModel
from quant.registry import quantizer
from quant.slots import find_slots
from stages import calibrating
from stages import quantize_choice as choice
from stages.common import PRECISIONS
from stages.library_notes import Once, library_notes
from stages.quantize_card import Packed, base_name, write_card
from stages.quantize_files import (
    AFTER,
    BEFORE,
    FITS,
    HEARD,
    PIPELINE,
    check_disk,
    check_output,
    make_work_folder,
    place_files,
    publish,
    save_denoiser,
    weight_file_bytes,
)
from stages.quantize_flags import parse_args
from stages.quantize_images import Wanted, all_there, draw_missing, prompts_of, sheet_of
from stages.quantize_weights import Left, kept_in_float, matching, rules_of, slots_without, use_of_weights, with_true_ties
from stages.record_file import RecordFile
from stages.run_folder import only_run_in
from stages.sensitivities import probe_settings

SHEET = "contact_sheet.png"


def main():
    args = parse_args()
    check_output(args.output, args.model_id, args.overwrite)
    device = pick_device(args.device)
    if args.offload != "none" and device.type == "cpu":
        raise InputError(f"--offload {args.offload}: is for GPUs, whose memory it saves; leave it out on the CPU")
    with one_line(args.model_id, "configuration"):
        job = Job(args, device)
    work = make_work_folder(args.output.resolve())
    with only_run_in(work), library_notes(Once(lambda note: None)):
        remove_leftovers(work)
        try:
            job.run(work)
        except BaseException:
            if not (work / FITS).exists():  # nothing to go on from
                shutil.rmtree(work, ignore_errors=True)
            raise
    shutil.rmtree(work, ignore_errors=True)


class Job:
    """One pipeline on its way to a folder of packed denoisers."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.source = pipelines.open_pipeline(args.model_id)
        self.found_class = pipelines.pipeline_class(self.source)
        self.names = pipelines.denoiser_names(self.source)
        for name in self.names:
            refuse_quantized(self.source, name)
        self.variants = {"float16": ("fp16",), "bfloat16": ("bf16",)}.get(args.dtype, ())
        own = [pipelines.own_precision(self.source, name, self.variants) for name in self.names]
        self.dtype = PRECISIONS[args.dtype] if args.dtype else own[0]
        self.compute_dtype = torch.float32 if device.type == "cpu" else self.dtype
        self.shapes = {name: pipelines.empty_denoiser(self.source, name) for name in self.names}
        self.rules = {name: rules_of(self.found_class.__name__, name) for name in self.names}
        self.left = self._left_by_shapes()
        self._check_choice()
        classes = max(getattr(module.config, "num_embeds_ada_norm", None) or 0 for module in self.shapes.values())
        calibrating.check_calibration_flags(args)
        prompts = prompts_of(self.found_class, args.prompt, max(args.n_imgs, 1), classes)
        self.wanted = Wanted(self.found_class, prompts, args)
        self.wanted.call(0)  # refuses arguments that the pipeline has not
        self.asked = self._asked()
        if args.calibrate:
            chosen = calibrating.calibration_prompts(args) if pipelines.takes_words(self.found_class) else None
            others = prompts_of(self.found_class, chosen, calibrating.image_count(args), classes)
            own_noise = args | {"seed": args.seed + calibrating.SEED_OFFSET}
            self.listening = Wanted(self.found_class, others, own_noise)

    @property
    def bits(self):
        return torch.finfo(self.dtype).bits

    @property
    def words(self):
        """What a weight may be put under; None where a file tells."""
        if self.args.avg_bits is not None:
            return self.args.methods
        spec = self.args.config
        return (spec.removeprefix(config.UNIFORM),) if spec.startswith(config.UNIFORM) else None

    def _left_by_shapes(self):
        """{denoiser: Left} of what stays float whatever the model does with it; InputError for an idle --exclude."""
        found, used = {}, set()
        for name, module in self.shapes.items():
            slots = find_slots(module, self.rules[name])
            paths = list(dict.fromkeys(slot.module_path for slot in slots.values()))
            matches = {pattern: matching(paths, pattern) for pattern in self.args.exclude}
            used |= {pattern for pattern, matched in matches.items() if matched}
            excluded = tuple(path for path in paths if any(path in matched for matched in matches.values()))
            small = tuple(slot.module_path for slot in slots.values() if self._grows(slot))
            found[name] = Left(excluded, tuple(kept_in_float(module, paths)), small=small)
        if idle := [pattern for pattern in self.args.exclude if pattern not in used]:
            raise InputError(f"--exclude {idle[0]}: no weight of {' or '.join(self.names)} lies there")
        return found

    def _grows(self, slot):
        """Whether every form that the weight may take is as large as its float one."""
        if self.words is None:
            return False
        return (
            min(quantizer(word).size_bytes(slot.shape, self.bits) for word in self.words) * 8
            >= slot.shape.numel() * self.bits
        )

    def slots(self, name, module):
        """The slots of a denoiser that are quantized; InputError if there are none."""
        rules = self.rules[name] if module is self.shapes[name] else with_true_ties(module, self.rules[name])
        slots = slots_without(module, rules, self.left[name].paths)
        if not slots:
            raise InputError(f"{self.args.model_id}: its {name} has no weight that can be quantized, or all are left out")
        return slots

    def _check_choice(self):
        """InputError for a configuration that cannot be, before anything large is read."""
        for name, module in self.shapes.items():
            slots = self.slots(name, module)
            if self.args.avg_bits is None:
                config.load(self.args.config, slots)
            else:
                choice.check_avg_bits(self._space(name, slots), self.args.avg_bits)

    def run(self, work):
        """Make the folder, from the files of the base to the card."""
        files = pipelines.needed_files(self.source, self.names, self.variants)
        self.source.fetch(files.values())
        check_disk(work, files, self.source, self._packed_bytes())
        self.folder = work / PIPELINE
        place_files(self.folder, files, self.source)
        self.pictures = self._look_at_use()
        recorded = self._record() if self.args.avg_bits is not None else {}
        kept = choice.Kept(work / FITS, {"bits": self.bits})
        packed = [self._pack(name, kept, recorded.pop(name, None), work) for name in self.names]
        rows = self._draw(work, packed)
        if rows:
            sheet_of(rows, self.folder / SHEET)
        title, precision = self.args.output.resolve().name, str(self.dtype).removeprefix("torch.")
        made, sheet = self._how(packed), SHEET if rows else None
        write_card(self.folder / "README.md", self.source, packed, title, made, sheet, precision, self.found_class)
        publish(self.folder, self.args.output.resolve())
        self._tell(packed, rows)

    def _packed_bytes(self):
        """Bytes of all packed denoisers, at most."""
        total = 0
        for name, module in self.shapes.items():
            slots = self.slots(name, module)
            weights = sum(slot.shape.numel() for slot in slots.values())
            rest = sum(parameter.numel() for parameter in module.parameters()) - weights
            if self.args.avg_bits is not None:
                packed = self.args.avg_bits * weights / 8
            else:
                words = config.load(self.args.config, slots)
                packed = sum(quantizer(word).size_bytes(slots[key].shape, self.bits) for key, word in words.items())
            total += packed + 4 * rest
        return int(total)

    def _look_at_use(self):
        """Find which weights are read without being called, and whether the pipeline can draw at all: tells that."""
        try:
            given = {name: pipelines.stand_in(self.source, name) for name in self.names}
            pipeline = self._load(given)
            with pipelines.without_bars(pipeline):
                found = use_of_weights(pipeline, self.names, self.wanted.call(0))
        except InputError as reason:
            if self.args.calibrate:
                raise InputError(f"{reason}; nothing can be heard for --calibrate: leave it out, or see --call") from None
            if self.args.avg_bits is not None:
                raise InputError(f"{reason}; sensitivities cannot be measured: choose by --config, or see --call") from None
            if self.args.n_imgs:
                say(f"no pictures, and not looked for weights that are read without being called: {reason}")
            return False
        for name in self.names:
            if name not in found:
                say(f"{name}: it could not be found which weights are read without being called")
                continue
            left, use = self.left[name], found[name]
            self.left[name] = Left(left.excluded, left.kept, use.read, left.small, use.idle)
            self._say_use(name, use)
        self._check_choice()
        return bool(self.args.n_imgs)

    def _say_use(self, name, use):
        if use.read:
            say(f"{name}: {len(use.read)} weights are read without a call of their layer, so stay float: {few(use.read)}")
        if use.idle:
            say(f"{name}: {len(use.idle)} weights took no part in a short call, and are quantized: {few(use.idle)}")

    def _load(self, given):
        return pipelines.load_pipeline(self.found_class, self.folder, given, self.compute_dtype)

    def _denoiser(self, name):
        return self.source.load_component(name, self.dtype, self.variants)

    def _computing(self, denoiser):
        """In the precision that the device computes in; what the model keeps in float32 stays so."""
        return denoiser.to(torch.float32) if self.compute_dtype == torch.float32 else denoiser

    def _float_pipeline(self):
        """The pipeline in full precision, on the device."""
        given = {name: self._computing(self._denoiser(name)) for name in self.names}
        return self._placed(self._load(given))

    def _placed(self, pipeline):
        with quiet_loading():
            if self.args.offload == "model":
                pipeline.enable_model_cpu_offload(device=self.device)
            elif self.args.offload == "sequential":
                pipeline.enable_sequential_cpu_offload(device=self.device)
            else:
                pipeline.to(self.device)
        return pipeline

    def _record(self):
        """{denoiser: [Step]} of what the float pipeline asks on its pictures' way, and its weights let go of."""
        pipeline = self._float_pipeline()
        with pipelines.without_bars(pipeline):
            calls = [self.wanted.call(number) for number in range(len(self.wanted.prompts))]
            recorded = record_steps(
                pipeline, self.names, tqdm(calls, desc="listening", unit="img", leave=False), self.args.calls
            )
        del pipeline
        return_free_memory()
        return recorded

    def _pack(self, name, kept, steps, work):
        """Fit, choose, pack and save a denoiser; returns what is told of it."""
        denoiser = self._denoiser(name)
        class_name, float_bytes = type(denoiser).__name__, sum(each.nbytes for each in denoiser.state_dict().values())
        model = QuantizedModel.of_slots(denoiser, self.slots(name, denoiser), self.dtype)
        configuration = self._configuration(name, model, kept, steps)
        if self.args.calibrate:
            model.entries = self._calibrated(name, model, configuration, work)
        bits, words = model.avg_bits(configuration), Counter(configuration.values())
        weights = sum(slot.shape.numel() for slot in model.slots.values())
        save_denoiser(model.pack(configuration), self.folder / name)
        del denoiser, model
        return_free_memory()
        packed_bytes = weight_file_bytes(self.folder / name)
        say(f"{name}: average {bits:.3f} bits, {float_bytes:,} -> {packed_bytes:,} bytes")
        return Packed(name, class_name, weights, float_bytes, packed_bytes, bits, words, self._reasons(name))

    def _configuration(self, name, model, kept, steps):
        if self.args.avg_bits is None:
            configuration = config.load(self.args.config, model.slots)
            choice.fit(model, name, lambda key: [configuration[key]], kept, self.device)
            return configuration
        choice.fit(model, name, lambda key: self.args.methods, kept, self.device)
        space = self._space(name, model.slots)
        measured = choice.known_of(self.asked, model, name, space)
        if not measured.is_complete:
            asking = QuantizedModel.of_slots(self._computing(self._denoiser(name)), model.slots, self.dtype, model.entries)
            replay = Replay(asking.module.to(self.device), steps, self.device)
            measured.measure(choice.weights_of(asking, space), space.methods, replay, self.args, name)
        configuration, found = choice.choose(space, measured, self.args.avg_bits)
        say(f"{name}: the output's squared shift is at most {found.excess:.1%} above what any choice within the size has")
        return configuration

    def _space(self, name, slots):
        """The search space of a denoiser's slots; InputError for patterns that match nothing in it."""
        args = self.args
        told = f"{args.model_id} ({name})"
        return choice.space_of(slots, self.bits, told, args.methods, args.min_bits, args.fix)

    def _calibrated(self, name, model, configuration, work):
        """The entries of a configuration, calibrated on the float pipeline's pictures and the quantized one's."""
        pipeline, wanted = self._float_pipeline(), self.listening
        heard = QuantizedModel.of_slots(getattr(pipeline, name), model.slots, self.dtype, model.entries)
        heard.keep_originals()
        calls = [functools.partial(pipeline, **wanted.call(number)) for number in range(len(wanted.prompts))]
        settings = f"{wanted.settings} {self.dtype} {self.compute_dtype} {self.device.type}"
        with pipelines.without_bars(pipeline):
            entries = calibrating.calibrate(heard, configuration, calls, work / HEARD / name, settings).entries
        del pipeline, heard, calls
        return_free_memory()
        return entries

    def _asked(self):
        """The file of sensitivities, which tells what they depend on beside the weights; None if none are asked for."""
        if self.args.avg_bits is None:
            return None
        check_writable(self.args.sensitivity)
        settings = {"pictures": self.wanted.settings, "calls": self.args.calls, "seed": self.args.seed}
        return RecordFile(self.args.sensitivity, probe_settings(self.args, self.args.methods) | settings)

    def _reasons(self, name):
        left = self.left[name]
        return {
            "left out by --exclude": left.excluded,
            "their model keeps them in float32": left.kept,
            "read without their layer being called": left.read,
            "packed they would be no smaller": left.small,
        }

    def _draw(self, work, packed):
        """Rows of the contact sheet: before, unless left out, and after, drawn by the folder as it will be loaded."""
        if not self.pictures:
            return []
        rows, settings = [], f"{self.wanted.settings} {self.dtype} {self.compute_dtype} {self.device.type}"
        if not self.args.no_compare:
            before = work / BEFORE
            pipeline = None if all_there(before, self.args.n_imgs, settings) else self._float_pipeline()
            paths = draw_missing(pipeline, self.wanted, before, "before", settings)
            rows.append((f"{base_name(self.source)}, {self.bits} bits", paths))
            del pipeline
            return_free_memory()
        shutil.rmtree(work / AFTER, ignore_errors=True)
        paths = draw_missing(self._placed(self._load({})), self.wanted, work / AFTER, "after", settings)
        bits = ", ".join(f"{each.avg_bits:.2f}" for each in packed)
        return [*rows, (f"quantized, {bits} bits", paths)]

    def _how(self, packed):
        """Lines on how the pipeline was made, for its card."""
        chosen = self.args.config and without_folder(self.args.config)
        chosen = chosen or f"at most {self.args.avg_bits:g} average bits, by the denoiser's own sensitivities"
        lines = [f"base model: {base_name(self.source)}", f"configuration: {chosen}", f"command: `{self._command()}`"]
        if self.args.calibrate:
            lines.append(f"calibrated on {len(self.listening.prompts)} images; see quant/calibration.py")
        if self.pictures:
            told = ", ".join(f"{key} {value}" for key, value in json.loads(self.wanted.settings).items() if value)
            lines.append(f"pictures: {told}" + ("" if self.args.no_compare else "; above full precision, below quantized"))
        return lines

    def _command(self):
        """The command line, folders told by their names."""
        own = {self.args.model_id: base_name(self.source), str(self.args.output): self.args.output.resolve().name}
        return shlex.join(["python", "scripts/quantize.py", *(own.get(word, without_folder(word)) for word in sys.argv[1:])])

    def _tell(self, packed, rows):
        before, after = (sum(sizes) for sizes in zip(*((p.float_bytes, p.packed_bytes) for p in packed), strict=True))
        sheet = f"; contact sheet: {self.args.output / SHEET}" if rows else ""
        say(f"{self.args.output}: denoisers {before:,} -> {after:,} bytes{sheet}")


def without_folder(word):
    """A word of the command line, a file in it by its name alone: whole paths are the owner's own matter."""
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def say(text):
    tqdm.write(text)


def few(paths):
    return ", ".join(paths[:3]) + (" ..." if len(paths) > 3 else "")
