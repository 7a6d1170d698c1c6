"""Who does a run's tasks: this process. Several processes and machines do as stages/ray_workers.py has it."""

from models import prompt_memo
from stages.common import check_extra
from stages.labeller import Labeller


def start_workers(job, device, extractor, watch):
    """The workers that the flags ask for. A context: leaving it ends them."""
    stored_prompts = StoredPrompts(job)
    if job.args.workers is None and job.args.ray_address is None:
        return ThisProcess(job, device, extractor, stored_prompts)
    check_extra("ray", "distributed", "--workers and --ray_address need Ray")
    from stages.ray_workers import RayWorkers

    return RayWorkers(job, watch, stored_prompts)


class ThisProcess:
    """One labeller, here."""

    def __init__(self, job, device, extractor, stored_prompts):
        embeddings = stored_prompts.load()
        self.labeller = Labeller(job, device, embeddings, extractor)
        if embeddings is None:
            stored_prompts.save(self.labeller.embeddings)

    def describe(self, indices):
        return self.labeller.describe(indices)

    def run(self, tasks, baseline=None):
        """Yield (task, arrays, seconds by phase) of each task, as `Labeller.measure` has them."""
        for task in tasks:
            yield task, *self.labeller.measure(task, baseline)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class StoredPrompts:
    """A job's prompt embeddings, in <outdir>."""

    def __init__(self, job):
        args = job.args
        self.needed = not job.family.num_classes
        self.path = args.outdir / "prompt_embeddings.pt"
        self.key = f"{args.model_id} {getattr(args, 'refiner_id', None)} {args.prompts_key} {args.guidance}"

    def load(self):
        """The embeddings, none for classes; None if they are still to be computed."""
        return prompt_memo.load(self.path, self.key) if self.needed else []

    def save(self, embeddings):
        prompt_memo.save(embeddings, self.path, self.key)
