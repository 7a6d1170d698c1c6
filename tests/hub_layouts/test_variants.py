"""The forms in which people have the weights: fp16 files or plain ones or both, .bin, shards; folders and Hub caches.

Whichever there are, the weights are the model's: those of its whole folder, in half precision.
"""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hub_layouts.builders import save_weights
from hub_layouts.published import files
from models.families import FAMILIES
from models.pipelines import Extras, load_denoiser, load_sampler

CPU = torch.device("cpu")
PLACES = ["folder", "cache", "cache with a listing"]
PARTS = [*PLACES, "cache of a part"]


def weights_of(pipeline):
    """{component and name: tensor} of a pipeline, in half precision."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    states = {name: module.state_dict() for name, module in modules.items()}
    return {f"{part}.{name}": weight.half() for part, state in states.items() for name, weight in state.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(shallow_folder):
    """The weights of a repository that is all there, by its name."""
    return functools.cache(lambda name: weights_of(load_sampler(FAMILIES[name], str(shallow_folder(name)), CPU).pipeline))


@pytest.fixture
def some_files(shallow_folder, tmp_path):
    """A copy of a repository that has some of its files: those that `keep` is true of."""

    def copy(name, keep=lambda file: True):
        target = tmp_path / "copy" / name
        for file in filter(keep, files(name)):
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shallow_folder(name) / file, target / file)
        return target

    return copy


@pytest.fixture
def placed(in_cache, shallow_folder):
    """What to give as --model_id for a folder, in one of PARTS: the last is listed with all that the repository has."""

    def place(name, folder, where):
        if where == "folder":
            return str(folder)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        if where == "cache of a part":
            in_cache(name, shallow_folder(name), files=names, listing=True)
        else:
            in_cache(name, folder, listing=where == "cache with a listing")
        return FAMILIES[name].model_id

    return place


def loads_whole(name, model_id, whole):
    """Both loaders find the model's own weights."""
    family = FAMILIES[name]
    assert same(weights_of(load_sampler(family, model_id, CPU).pipeline), whole(name))
    denoiser = load_denoiser(family, model_id, CPU).state_dict()
    assert same({key: weight.half() for key, weight in denoiser.items()}, of_component(whole(name), family.denoiser))


def of_component(weights, component):
    """The weights of one component by their own names."""
    return {key.removeprefix(f"{component}."): weight for key, weight in weights.items() if key.startswith(f"{component}.")}


def plain(file):
    return "fp16" not in file


def half(name, *components):
    """What keeps the fp16 files, and no others of their components, of the components named or of all that have some."""
    components = components or {path.split("/")[0] for path in files(name) if not plain(path)}

    def keep(file):
        component, _, base = file.partition("/")
        is_plain_weights = plain(base) and ("model.safetensors" in base or "-of-00004" in base)
        return not is_plain_weights if component in components else plain(file)

    return keep


@pytest.mark.parametrize("where", PARTS)
@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha"])
def test_without_fp16_files(some_files, placed, whole, name, where):
    """A fine-tune of Stable Diffusion XL that has none; what a default download leaves of PixArt-alpha."""
    loads_whole(name, placed(name, some_files(name, plain), where), whole)


@pytest.mark.parametrize("where", PARTS)
@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha"])
def test_fp16_files_alone(some_files, placed, whole, name, where):
    """PixArt-alpha's denoiser has none: it is plain beside a text encoder in two fp16 shards."""
    folder = some_files(name, half(name))
    names = {path.name for path in folder.rglob("*.safetensors")}
    assert "diffusion_pytorch_model.fp16.safetensors" in names and "model.safetensors" not in names
    loads_whole(name, placed(name, folder, where), whole)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("halves", [("unet",), ("text_encoder", "text_encoder_2", "vae")])
def test_some_components_have_fp16_files_alone(some_files, placed, whole, halves, where):
    loads_whole("sdxl", placed("sdxl", some_files("sdxl", half("sdxl", *halves)), where), whole)


@pytest.mark.parametrize("where", PLACES)
def test_a_refiner_need_not_have_the_base_s_variant(some_files, placed, in_cache, shallow_folder, where):
    base, refiner = some_files("sdxl", half("sdxl")), some_files("sdxl_refiner", plain)
    model_id, refiner_id = placed("sdxl", base, where), str(refiner)
    if where != "folder":
        in_cache("sdxl_refiner", refiner)
        refiner_id = FAMILIES["sdxl"].refiner.model_id
    loaded = weights_of(load_sampler(FAMILIES["sdxl"], model_id, CPU, Extras(refiner_id=refiner_id)).refiner)
    published = load_file(shallow_folder("sdxl_refiner") / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(of_component(loaded, "unet"), published)


def state_of(folder, stem):
    """All plain weights of a component, whether in one file or in shards."""
    paths = [path for path in sorted(folder.glob(f"{stem}*.safetensors")) if plain(path.name)]
    return {key: weight for path in paths for key, weight in load_file(path).items()}


def rewrite(folder, num_files=1, zeros=False, keep=False, **form):
    """Write a component's weights in another form, by its libraries' names, and take the old files away unless `keep`."""
    stem = "model" if folder.name.startswith("text_encoder") else "diffusion_pytorch_model"
    state = state_of(folder, stem)
    for path in [] if keep else list(folder.glob(f"{stem}*safetensors*")):
        path.unlink()
    state = {key: torch.zeros_like(weight) for key, weight in state.items()} if zeros else state
    bin_stem = "pytorch_model" if stem == "model" and form.get("suffix") == "bin" else stem
    save_weights(folder, bin_stem, state, num_files, **form)


@pytest.mark.parametrize("where", PLACES)
def test_pickled_weights_alone(some_files, placed, whole, where):
    """As DiT is published, in each library's names, of one file or of several."""
    loads_whole("dit", placed("dit", some_files("dit"), where), whole)
    folder = some_files("pixart_sigma")
    rewrite(folder / "transformer", suffix="bin")
    rewrite(folder / "vae", suffix="bin")
    rewrite(folder / "text_encoder", num_files=2, suffix="bin")
    assert not list(folder.rglob("*.safetensors")) and (folder / "text_encoder/pytorch_model.bin.index.json").exists()
    loads_whole("pixart_sigma", placed("pixart_sigma", folder, where), whole)


@pytest.mark.parametrize("where", PLACES)
def test_safetensors_go_before_pickles(some_files, placed, whole, where):
    folder = some_files("pixart_sigma")
    for component in ("transformer", "vae", "text_encoder"):
        rewrite(folder / component, suffix="bin", zeros=True, keep=True)
    loads_whole("pixart_sigma", placed("pixart_sigma", folder, where), whole)


@pytest.mark.parametrize("where", PLACES)
def test_a_denoiser_in_shards(some_files, placed, whole, where):
    folder = some_files("pixart_alpha", plain)
    rewrite(folder / "transformer", num_files=3)
    loads_whole("pixart_alpha", placed("pixart_alpha", folder, where), whole)


@pytest.mark.parametrize("where", PLACES)
def test_fp16_shards_in_their_older_names(some_files, placed, whole, where):
    """The variant behind the number; the index tells."""
    folder = some_files("pixart_alpha", half("pixart_alpha"))
    index = folder / "text_encoder" / "model.safetensors.index.fp16.json"
    content = json.loads(index.read_text())
    for number in (1, 2):
        new, old = f"model.fp16-0000{number}-of-00002.safetensors", f"model-0000{number}-of-00002.fp16.safetensors"
        (index.parent / new).rename(index.parent / old)
        content["weight_map"] = {key: old if file == new else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    loads_whole("pixart_alpha", placed("pixart_alpha", folder, where), whole)


def test_a_snapshot_is_a_folder_too(some_files, in_cache, whole):
    """Its files are links out of it."""
    snapshot = in_cache("dit", some_files("dit"))
    assert all(path.is_symlink() for path in snapshot.rglob("*.*"))
    loads_whole("dit", str(snapshot), whole)


def test_a_whole_repository_with_what_other_programs_read(some_files, placed, whole):
    """ONNX, OpenVINO and Flax files beside the weights, second autoencoders, single files at the root."""
    folder = some_files("sdxl")
    assert (folder / "text_encoder" / "openvino_model.bin").exists() and (folder / "sd_xl_base_1.0.safetensors").exists()
    loads_whole("sdxl", placed("sdxl", folder, "cache with a listing"), whole)
