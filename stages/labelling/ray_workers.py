"""A run's tasks shared out over processes, GPUs and machines by Ray (Moritz et al., 2018).

Each worker loads the model once and takes tasks until none is left. A worker that dies is replaced and its tasks
are done again. On the CPU a worker computes with one thread, so that labels do not depend on how many there are:
some kernels round differently with another number of threads.
"""

import collections
import contextlib
import logging
import os
import secrets
import socket

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from errors import InputError, first_line
from stages.common import log
from stages.labelling.full_precision import FullPrecision
from stages.labelling.labeller import Labeller, encode
from stages.library_notes import library_notes
from stages.run import heed_sigterm

MOST_DEATHS = 3  # of workers at the same task, until the task is to blame
TASKS_AHEAD = 2  # given to a worker, so that it need not wait for this process


class RayWorkers:
    """Workers on this machine, or, with --ray_address, on a running cluster."""

    def __init__(self, job, watch, stored_prompts):
        self.deaths = collections.Counter()  # of workers, by the task that they were at
        self.said = set()  # of what workers have noted
        try:
            device, count = connect(job.args)
            self.resources = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
            self.start = (ray.put(job), device, os.getcwd())
            self.embeddings = ray.put(self.known_prompts(stored_prompts, watch))
            self.count = count
            self.hands = [self.hire() for _ in range(count)]
        except BaseException:
            ray.shutdown()
            raise
        log.info("%d workers, each on %s", count, "a GPU" if device == "cuda" else "one thread of a CPU")

    def known_prompts(self, stored_prompts, watch):
        """The job's prompt embeddings, read from disk, else encoded once, by one worker for all."""
        embeddings = stored_prompts.load()
        if embeddings is None:
            with watch.phase("encode"):
                embeddings, notes = value_of(ray.remote(**self.resources)(encode_prompts).remote(*self.start))
            self.say(notes)
            stored_prompts.save(embeddings)
        return embeddings

    def hire(self):
        actor = ray.remote(**self.resources)(Worker).remote()
        return Hand(actor, actor.load.remote(*self.start, self.embeddings))

    def replace(self, hand):
        """Put another in the place of a dead worker; returns the tasks that it leaves undone."""
        undone = list(hand.running.values())
        task = undone[0] if undone else None
        at = task.name if task else "start"
        self.deaths[task] += 1
        if self.deaths[task] >= MOST_DEATHS:
            raise InputError(f"{self.deaths[task]} workers died at {at}; too little memory? Try fewer --workers")
        log.warning("a worker died at %s: another takes its place", at)
        with contextlib.suppress(Exception):  # it may be half alive
            ray.kill(hand.actor)
        self.hands[self.hands.index(hand)] = self.hire()
        return undone

    def describe(self, indices):
        """The rows of configurations without what their images tell."""
        while True:
            hand = self.hands[0]
            try:
                value_of(hand.loading)
                return value_of(hand.actor.describe.remote(indices))
            except RayActorError:
                self.replace(hand)

    def run(self, tasks, full_precision, drawn):
        """Yield (task, arrays, seconds by phase) of each task as it is done, in any order; `drawn` is told its images."""
        # Arrays in shared memory: one copy per machine.
        shared = None
        if full_precision is not None:
            shared = ray.put(FullPrecision(full_precision.images[:], full_precision.latents[:], None))
        left = TasksLeft(tasks)
        while left or any(hand.running for hand in self.hands):
            self.give_out(left, shared)
            refs = {ref: hand for hand in self.hands for ref in (*hand.running, *hand.awaited)}
            (ref,), _ = ray.wait(list(refs), num_returns=1)
            hand = refs[ref]
            try:
                result = value_of(ref)
            except RayActorError:
                left.put_back(self.replace(hand))
                continue
            except ObjectLostError:  # a machine left with it
                left.put_back([hand.running.pop(ref)])
                continue
            if ref == hand.loading:
                hand.awaited = ()
                continue
            arrays, seconds, notes = result
            self.say(notes)
            task = hand.running.pop(ref)
            drawn(task.count)
            yield task, arrays, seconds

    def say(self, notes):
        """Log what workers have noted, once if several have."""
        for logger, note in notes:
            if note not in self.said:
                self.said.add(note)
                logging.getLogger(logger).warning("%s", note)

    def give_out(self, left, shared):
        """Give the workers that are ready tasks, one each in turn."""
        for _ in range(TASKS_AHEAD):
            for hand in self.hands:
                if left and not hand.awaited and len(hand.running) < TASKS_AHEAD:
                    task = left.take(hand.index)
                    hand.index = task.index
                    hand.running[hand.actor.measure.remote(task, shared)] = task

    def __enter__(self):
        return self

    def __exit__(self, *_):
        ray.shutdown()


class Hand:
    """A worker as the driver sees it."""

    def __init__(self, actor, loading):
        self.actor, self.loading = actor, loading
        self.awaited = (loading,)  # nothing once the model is loaded
        self.running = {}  # {result to come: task}, the one that it is at first
        self.index = -1  # of the configuration last given to it


class TasksLeft:
    """Tasks that nobody has, by configuration."""

    def __init__(self, tasks):
        self.by_index = {}
        self.begun = set()
        for task in tasks:
            self.by_index.setdefault(task.index, collections.deque()).append(task)

    def __bool__(self):
        return bool(self.by_index)

    def take(self, index):
        """The next task of configuration `index`, else of one that nobody has begun, else of the one with most left."""
        if index not in self.by_index:
            fresh = (each for each in self.by_index if each not in self.begun)
            index = next(fresh, max(self.by_index, key=lambda each: len(self.by_index[each])))
        self.begun.add(index)
        task = self.by_index[index].popleft()
        if not self.by_index[index]:
            del self.by_index[index]
        return task

    def put_back(self, tasks):
        for task in reversed(tasks):
            self.by_index.setdefault(task.index, collections.deque()).appendleft(task)


class Worker:
    """The process of a worker."""

    def load(self, job, device, folder, embeddings):
        settle(folder, device)
        self.listening = noted()  # for as long as the worker lives
        self.notes = self.listening.__enter__()
        self.labeller = Labeller(job, torch.device(device), embeddings)

    def describe(self, indices):
        return self.labeller.describe(indices)

    def measure(self, task, full_precision):
        """What `Labeller.measure` has, and what was noted until then."""
        measured = self.labeller.measure(task, full_precision)
        notes = list(self.notes)
        self.notes.clear()
        return *measured, notes


def encode_prompts(job, device, folder):
    settle(folder, device)
    with noted() as notes:
        return encode(job, torch.device(device)), notes


@contextlib.contextmanager
def noted():
    """[(logger's name, note)] of what is logged here, and of what libraries warn of."""
    notes = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: notes.append((log.name, record.getMessage()))
    log.addHandler(handler)
    try:
        with library_notes(lambda note: notes.append(("workers", note))):
            yield notes
    finally:
        log.removeHandler(handler)


def settle(folder, device):
    """Make this process like the driver's: relative paths, and as many threads as every other worker."""
    with contextlib.suppress(OSError):  # another machine
        os.chdir(folder)
    if device == "cpu":
        torch.set_num_threads(1)


def value_of(ref):
    """What a worker returned; its error is raised as if it happened here."""
    try:
        return ray.get(ref)
    except RayTaskError as reason:
        raise reason.cause from reason  # whose text is the worker's traceback


def connect(args):
    """Start Ray or join a cluster; returns the workers' kind of device and their number."""
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(f"--device {args.device}: workers take a GPU each; leave --device out, or say cpu")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    settings = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        check_reachable(args.ray_address)
        if args.ray_address is None:
            cores = max(args.workers, os.cpu_count())
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())  # else Ray keeps one in the home folder
            ray.init("local", num_cpus=cores, include_dashboard=False, **settings)
        else:
            ray.init(args.ray_address, **settings)
    except (OSError, ValueError, RuntimeError) as reason:
        where = (
            "--workers: Ray does not start"
            if args.ray_address is None
            else f"--ray_address {args.ray_address}: no cluster there"
        )
        raise InputError(f"{where} ({first_line(reason)})") from reason
    finally:
        heed_sigterm()  # Ray has put its own in place, which ends this process out of order
    there = ray.cluster_resources()
    device = "cuda" if there.get("GPU") and args.device != "cpu" else "cpu"
    if args.device == "cuda" and device == "cpu":
        raise InputError("--device cuda: Ray finds no GPU")
    most = int(there.get("GPU" if device == "cuda" else "CPU", 1))
    if args.ray_address is None and args.workers > most:
        raise InputError(f"--workers {args.workers}: there is one for each GPU, and this machine has {most}")
    return device, args.workers or most


def check_reachable(address):
    """OSError where nobody listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
