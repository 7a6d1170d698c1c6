"""Who does a run's tasks: this process. Several processes and machines do as stages/labelling/ray_workers.py has it."""

from models import prompt_memo
from stages.common import check_extra
from stages.labelling.labeller import Labeller, encode
from stages.sampling import show_steps


def needs_ray(args):
    """Whether several processes are asked for; InputError if they cannot be had."""
    if args.workers is None and args.ray_address is None:
        return False
    check_extra("ray", "distributed", "--workers and --ray_address need Ray")
    return True


def start_workers(job, device, extractor, watch):
    """The workers that the flags ask for. A context: leaving it ends them."""
    stored_prompts = StoredPrompts(job)
    if not needs_ray(job.args):
        return ThisProcess(job, device, extractor, stored_prompts, watch)
    from stages.labelling.ray_workers import RayWorkers

    return RayWorkers(job, watch, stored_prompts)


class ThisProcess:
    """One labeller, here."""

    count = 1

    def __init__(self, job, device, extractor, stored_prompts, watch):
        self.labeller = Labeller(job, device, known_prompts(job, device, stored_prompts, watch), extractor)
        show_steps(self.labeller.sampler)

    def describe(self, indices):
        return self.labeller.describe(indices)

    def run(self, tasks, full_precision, drawn):
        """Yield (task, arrays, seconds by phase) of each task, as `Labeller.measure` has them.

        `drawn` is told how many images have come, as they come.
        """
        self.labeller.on_drawn = drawn
        for task in tasks:
            yield task, *self.labeller.measure(task, full_precision)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def known_prompts(job, device, stored_prompts, watch):
    """The job's prompt embeddings, read from disk, else encoded and kept there."""
    embeddings = stored_prompts.load()
    if embeddings is None:
        with watch.phase("encode"):
            embeddings = encode(job, device)
        stored_prompts.save(embeddings)
    return embeddings


class StoredPrompts:
    """A job's prompt embeddings, in <outdir>."""

    def __init__(self, job):
        args = job.args
        self.needed = not job.family.num_classes
        self.path = args.outdir / "prompt_embeddings.pt"
        names = (args.model_id, getattr(args, "refiner_id", None), job.prompts_key, args.guidance)
        more = (args.negative_prompt, args.dtype, args.lora_key)
        self.key = " ".join(map(str, (*names, *more) if any(more) else names))

    def load(self):
        """The embeddings, none for classes; None if they are still to be computed."""
        return prompt_memo.load(self.path, self.key) if self.needed else []

    def save(self, embeddings):
        prompt_memo.save(embeddings, self.path, self.key)
