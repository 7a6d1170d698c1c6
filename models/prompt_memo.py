"""Prompt embeddings, computed once per run: `encode_prompts` makes them and `PromptMemo` hands them out.

Each prompt is encoded by itself, so that its embedding does not depend on the batch that it comes in. The
embeddings are kept on disk, so that a run that goes on, and every worker of it, samples without text encoders
(T5-XXL alone has 4.7 G parameters).
"""

import hashlib
import inspect

import torch
from tqdm import tqdm

from models.components import TEXT_ENCODERS
from models.listening import StandIn
from models.pipelines import ANY_PROMPT
from quant.checked_files import load_content, save_content


class PromptMemo:
    """Answers for a pipeline's `encode_prompt`, for good, and remembers what it returned.

    `known` are the embeddings of an earlier memo: {hash of prompt and arguments: [tensor or None, ...]}.
    """

    def __init__(self, pipeline, known=None):
        self.pipeline = pipeline
        self.signature = inspect.signature(pipeline.encode_prompt)
        self.known = {} if known is None else known
        self.distinct = {}
        StandIn(pipeline, "encode_prompt", self.answer).put()  # its encoders go: there is nothing to come back to

    @torch.no_grad()
    def answer(self, encode, *args, **kwargs):
        """As the pipeline's own: tensors [N x images per prompt, ...] or None, for N prompts."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        prompts = arguments.pop("prompt")
        if not isinstance(prompts, list) or any(torch.is_tensor(value) for value in arguments.values()):
            return encode(*args, **kwargs)
        device = self.pipeline._execution_device
        rows = [self._of(encode, prompt, _share(arguments, place, len(prompts))) for place, prompt in enumerate(prompts)]
        columns = zip(*rows, strict=True)
        return tuple(None if column[0] is None else torch.cat(column).to(device) for column in columns)

    def _of(self, encode, prompt, arguments):
        rest = repr(sorted((name, value) for name, value in arguments.items() if name != "device"))
        name = hashlib.sha256(f"{prompt}\n{rest}".encode()).hexdigest()[:32]
        if name not in self.known:
            if self.is_released:
                raise RuntimeError(f"the text encoders are released and {prompt!r} was never encoded")
            tensors = encode(prompt=[prompt], **arguments)
            self.known[name] = [None if tensor is None else self._shared(tensor.cpu()) for tensor in tensors]
        return self.known[name]

    def _shared(self, tensor):
        """One object for equal tensors: all prompts have the same negative one."""
        return self.distinct.setdefault(hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).digest(), tensor)

    def release(self):
        """Let the text encoders go: from here on only known prompts can be drawn."""
        for name in TEXT_ENCODERS:
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    @property
    def is_released(self):
        return all(getattr(self.pipeline, name, None) is None for name in TEXT_ENCODERS)


def _share(arguments, place, count):
    """The arguments of one of `count` prompts: of lists with an item for each, such as negative prompts, its own."""
    return {
        name: value[place : place + 1] if isinstance(value, list) and len(value) == count else value
        for name, value in arguments.items()
    }


def remember(sampler, embeddings=None):
    """Memos for the `encode_prompt` of each of the sampler's pipelines that has one.

    `embeddings` is what `encode_prompts` returned: with it no text encoder is asked, nor kept.
    """
    pipelines = [pipeline for pipeline in sampler.pipelines if hasattr(pipeline, "encode_prompt")]
    memos = [PromptMemo(pipeline, embeddings and embeddings[place]) for place, pipeline in enumerate(pipelines)]
    if embeddings is not None:
        for memo in memos:
            memo.release()
    return memos


def encode_prompts(sampler, prompts, guidance, resolution):
    """The embeddings of all prompts, a dict per pipeline that has a text encoder; the encoders are released.

    With them all that `Sampler.images` and `Sampler.denoiser_inputs` ask for is known.
    """
    memos = remember(sampler)
    if memos:
        sampler.encode(ANY_PROMPT, 1.0, resolution)
    for prompt in tqdm(dict.fromkeys(prompts) if memos else (), desc="prompts", unit="prompt", leave=False):
        sampler.encode(prompt, guidance, resolution)
    for memo in memos:
        memo.release()
    return [memo.known for memo in memos]


def save(embeddings, path, key):
    """Write what `encode_prompts` returned; `key` says what it depends on: model, prompts, guidance."""
    save_content({"key": key, "embeddings": embeddings}, path)


def load(path, key):
    """What `save` wrote under the same key; None if that is not there, or damaged."""
    content = load_content(path)
    known = isinstance(content, dict) and content.get("key") == key and _are_embeddings(content.get("embeddings"))
    return content["embeddings"] if known else None


def _are_embeddings(content):
    """Whether it is what `encode_prompts` returns: [{name: [tensor or None, ...]}]."""
    return isinstance(content, list) and all(
        isinstance(known, dict)
        and all(isinstance(each, list) and all(t is None or torch.is_tensor(t) for t in each) for each in known.values())
        for known in content
    )
