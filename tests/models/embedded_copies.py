"""Copies of the embedded models' folders, changed as people's folders are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import InputError
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER, load_denoiser, load_sampler

CPU = torch.device("cpu")
PROMPT = "a red seven on a blue background"


class Copy:
    """An embedded model's folder to change."""

    def __init__(self, name, folder):
        self.family = FAMILIES.get(name)
        self.folder = shutil.copytree(EMBEDDED_FOLDER / name, folder / name, dirs_exist_ok=True)

    def __str__(self):
        return str(self.folder)

    def weights_file(self, component):
        (file,) = (self.folder / component).glob("*.safetensors")
        return file

    def change_weights(self, component, change):
        """Write what `change`, given the dict of weights, returns, or the dict as it has changed it."""
        file = self.weights_file(component)
        state = load_file(file)
        save_file(change(state) or state, file, metadata={"format": "pt"})

    def change_json(self, name, **changes):
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def load(self, *args, **kwargs):
        return load_sampler(self.family, str(self.folder), CPU, *args, **kwargs)

    def refusals(self):
        """What both loaders say of it: one line each."""
        return [refusal(load, self.family, str(self.folder)) for load in (load_sampler, load_denoiser)]

    def refusal(self):
        """What is said where the whole pipeline is loaded."""
        return refusal(load_sampler, self.family, str(self.folder))


def refusal(load, *arguments, **named):
    with pytest.raises(InputError) as failure:
        load(*arguments, CPU, **named)
    assert "\n" not in str(failure.value)
    return str(failure.value)
