"""The files of a model: a diffusers pipeline in a local folder, or a repository on the Hub and its cache.

Everything that configurations tell is known before a weight is read, or fetched. Which files hold a component's weights
is decided here alone, the same for folders and for the Hub.
"""

import errno
import json
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from errors import InputError, first_line

INDEX = "model_index.json"
CHECKPOINTS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin", ".gguf")  # what names of pipelines in a single file end in
SMALL_FILES = ("*.json", "*/*.json", "*/*.txt", "*/*.model")  # configurations, indexes of shards and vocabularies
TIMEOUT_SECONDS = 10
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLED_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "pytorch_model"}
SHARD = r"(?:-\d+-of-\d+)?"
LFS_POINTER = b"version https://git-lfs"
WAY_OUT = "give a folder or Hub id with --model_id; `--model_id embedded` works offline"


def is_single_file(model_id):
    path = Path(model_id)
    return path.suffix.lower() in CHECKPOINTS and not path.is_dir()


class WeightFiles(NamedTuple):
    """The files of a component's weights, and how they are asked for."""

    variant: str | None
    safetensors: bool
    names: list[str]  # in the repository


class Repository:
    """A model's files below `folder`; of a Hub id, those in its cache, and with a network those still to be fetched."""

    def __init__(self, model_id, folder, names, online=False, hub=False):
        self.model_id, self.folder, self.names = str(model_id), Path(folder), set(names)
        self.online, self.hub = online, hub

    @property
    def index(self):
        """What `model_index.json` says: the pipeline's class and its components, {name: [library, class]}."""
        content = self.read_json(INDEX)
        for name, value in content.items():
            if isinstance(value, list) and not (len(value) == 2 and all(isinstance(each, str | None) for each in value)):
                raise InputError(f"{self.folder / INDEX}: its {name} is no [library, class]; fetch it again")
        return content

    def config(self, component):
        """The configuration of a model or scheduler of the pipeline; {} where it has none."""
        names = (f"{component}/config.json", f"{component}/{component}_config.json")
        return next((self.read_json(name) for name in names if name in self.names), {})

    def read_json(self, name):
        """The object in a JSON file; InputError names a missing or damaged one."""
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(self.missing(name)) from None
        except (OSError, ValueError, RecursionError) as reason:
            raise InputError(f"{self.folder / name}: not readable JSON ({first_line(reason)})") from None
        if not isinstance(content, dict):
            raise InputError(f"{self.folder / name}: not a JSON object")
        return content

    def missing(self, name):
        """Says that a file is not there, and what to do."""
        if not self.hub:
            return f"{self.folder / name}: no such file; this folder is not a whole pipeline in diffusers format"
        return (
            f"{self.model_id}: its file {name} is not in the Hub's cache ({self.folder}); run again with a network, or "
            f"fetch it with `hf download {self.model_id}`"
        )

    def weights(self, component, library, variants=()):
        """The component's WeightFiles: the first of the `variants` that is there, else plain ones, else any variant's."""
        found = sorted({match[1] for name in self.names if (match := _variant_of(component, library, name))})
        for variant in (*variants, None, *found):
            for safetensors in (True, False):
                if names := self._weight_names(component, library, variant, safetensors):
                    return WeightFiles(variant, safetensors, names)
        raise InputError(self.missing(f"{component}/{STEMS[library]}.safetensors"))

    def _weight_names(self, component, library, variant, safetensors):
        """Names of the single file or of the shards that are asked for, none if there are none."""
        stem = (STEMS if safetensors else PICKLED_STEMS)[library]
        ending = "safetensors" if safetensors else "bin"
        of_variant = f".{variant}" if variant else ""
        indexes = [f"{component}/{stem}.{ending}.index{of_variant}.json"]
        if variant:  # as some tools name it
            indexes.append(f"{component}/{stem}{of_variant}.{ending}.index.json")
        for index in indexes:
            if index in self.names:
                return self._shards(component, index)
        single = f"{component}/{stem}{of_variant}.{ending}"
        return [single] if single in self.names else []

    def _shards(self, component, index):
        weight_map = self.read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{self.folder / index}: names no shards; fetch it again")
        return [f"{component}/{shard}" for shard in sorted(set(names))]

    def load_component(self, name, dtype, variants=()):
        """The component `name` as models/components.py loads it."""
        from models.components import load_component  # it asks for a repository's files

        return load_component(self, name, dtype, variants)

    def fetch(self, names):
        """See to it that the files are in the folder; InputError names the first that is missing, empty or a pointer."""
        if self.online:
            _download(self.model_id, list(names))
        for name in names:
            path = self.folder / name
            if not path.is_file():
                raise InputError(self.missing(name))
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
            if not start:
                raise InputError(f"{path}: an empty file; fetch it again")
            if start == LFS_POINTER:
                raise InputError(f"{path}: a Git LFS pointer and not the file itself; run `git lfs pull` in that folder")


def open_repository(model_id):
    """The Repository of a local folder, or of a Hub id, whose small files are fetched if they are not in the cache."""
    path = Path(model_id)
    if path.is_dir():
        return Repository(model_id, path, names_below(path))
    if path.exists():
        raise InputError(f"{model_id}: neither a folder nor a checkpoint in a format that is read here; {WAY_OUT}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model_id)) or str(model_id).startswith("."):
        raise InputError(f"{model_id}: no such folder, and no Hub id either; {WAY_OUT}")
    return _on_hub(str(model_id))


def _on_hub(model_id):
    names, reason = None, None
    try:
        names = [file.rfilename for file in HfApi().model_info(model_id, timeout=TIMEOUT_SECONDS).siblings]
    except Exception as failure:  # whatever the network raises: the cache may do
        reason = failure
    if names is not None:
        return Repository(model_id, _download(model_id, SMALL_FILES), names, online=True, hub=True)
    try:
        folder = snapshot_download(model_id, local_files_only=True, allow_patterns=[INDEX])
    except LocalEntryNotFoundError:
        raise InputError(not_fetched(model_id, reason)) from None
    except (OSError, ValueError) as failure:
        raise InputError(not_fetched(model_id, failure)) from None
    return Repository(model_id, folder, names_below(Path(folder)), hub=True)


def _download(model_id, patterns):
    """The snapshot's folder, with the files that match in it."""
    try:
        return snapshot_download(model_id, allow_patterns=list(patterns))
    except OSError as reason:
        if reason.errno == errno.ENOSPC:
            raise InputError(f"{model_id}: the disk of the Hub's cache is full; free some space, or set HF_HOME") from None
        raise InputError(not_fetched(model_id, reason)) from None
    except Exception as reason:  # as many types as the network has
        raise InputError(not_fetched(model_id, reason)) from None


def not_fetched(model_id, reason):
    """Says that a Hub id cannot be had, and why."""
    why = why_not_fetched(reason)
    return f"{model_id!r} is no local folder, not in the Hub's cache, and cannot be fetched from the Hub ({why}); {WAY_OUT}"


def why_not_fetched(reason):
    """The network's, or the Hub's, own reason in a line."""
    if isinstance(reason, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(reason, HfHubHTTPError):
        said = getattr(reason, "server_message", None) or first_line(reason)
        why = f"the Hub says: {first_line(said)}"
        if getattr(getattr(reason, "response", None), "status_code", 0) in (401, 403):
            why += "; log in with `hf auth login`, and accept the model's terms on its page if it has any"
        return why
    return first_line(reason)


def names_below(folder):
    """Names of the files in a folder and in the folders in it."""
    files = (*folder.glob("*"), *folder.glob("*/*"))
    return [path.relative_to(folder).as_posix() for path in files if path.is_file()]


def _variant_of(component, library, name):
    """Matches the name of a variant's weight file of the component; group 1 is the variant."""
    stems = "|".join({STEMS[library], PICKLED_STEMS[library]})
    return re.fullmatch(rf"{re.escape(component)}/(?:{stems}){SHARD}\.(\w+?){SHARD}\.(?:safetensors|bin)", name)
