"""Prompt embeddings, computed once per run: each prompt is encoded the first time a pipeline asks for it.

A prompt is encoded by itself, so that its embedding does not depend on the batch that it comes in, and kept on
disk, so that a run that goes on need not encode it again. Once all prompts are known, `release` lets the text
encoders leave memory (T5-XXL alone has 4.7 G parameters).
"""

import hashlib
import inspect

import torch

from errors import InputError
from quant.storage import atomic_write, load_checkpoint

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class PromptMemo:
    """Stands in for a pipeline's `encode_prompt` and remembers what it returned, at `path` too.

    `key` says which model the embeddings are of: a file of another one is not used.
    """

    def __init__(self, pipeline, path, key):
        self.pipeline, self.path, self.key = pipeline, path, key
        self.encode = pipeline.encode_prompt
        self.signature = inspect.signature(self.encode)
        self.known = self._read()
        self.changed = False
        self.distinct = {}
        pipeline.encode_prompt = self

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        """As the pipeline's own: tensors [N x images per prompt, ...] or None, for N prompts."""
        arguments = self.signature.bind(*args, **kwargs).arguments
        prompts = arguments.pop("prompt")
        if not isinstance(prompts, list) or any(torch.is_tensor(value) for value in arguments.values()):
            return self.encode(*args, **kwargs)
        device = self.pipeline._execution_device
        rest = repr(sorted((name, value) for name, value in arguments.items() if name != "device"))
        rows = [self._of(prompt, rest, arguments) for prompt in prompts]
        columns = zip(*rows, strict=True)
        return tuple(None if column[0] is None else torch.cat(column).to(device) for column in columns)

    def _of(self, prompt, rest, arguments):
        name = hashlib.sha256(f"{prompt}\n{rest}".encode()).hexdigest()[:32]
        if name not in self.known:
            if self.is_released:
                raise RuntimeError(f"the text encoders are released and {prompt!r} was never encoded")
            tensors = self.encode(prompt=[prompt], **arguments)
            self.known[name] = [None if tensor is None else self._shared(tensor.cpu()) for tensor in tensors]
            self.changed = True
        return self.known[name]

    def _shared(self, tensor):
        """One object for equal tensors: all prompts have the same negative one."""
        return self.distinct.setdefault(hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).digest(), tensor)

    def save(self):
        if self.changed:
            with atomic_write(self.path) as file:
                torch.save({"key": self.key, "embeddings": self.known}, file)
            self.changed = False

    def release(self):
        """Let the text encoders go: from here on only known prompts can be drawn."""
        for name in TEXT_ENCODERS:
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    @property
    def is_released(self):
        return all(getattr(self.pipeline, name, None) is None for name in TEXT_ENCODERS)

    def _read(self):
        if not self.path.exists():
            return {}
        try:
            content = load_checkpoint(self.path)
        except InputError:  # damaged: made anew
            return {}
        return content["embeddings"] if isinstance(content, dict) and content.get("key") == self.key else {}
