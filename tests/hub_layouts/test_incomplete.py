"""What an interrupted or partial download leaves: what is needed loads, what is missing is named in one line."""

import pytest
import torch

from errors import InputError
from hub_layouts.hub import REVISION, use_cache
from hub_layouts.published import FILES, files
from models.families import FAMILIES
from models.pipelines import load_denoiser, load_sampler

CPU = torch.device("cpu")
SDV15 = FAMILIES["sdv15"]
MISSING = [
    "pixart_sigma/text_encoder/model-00002-of-00002.safetensors",
    "pixart_sigma/text_encoder/model.safetensors.index.json",
    "pixart_sigma/text_encoder/config.json",
    "pixart_sigma/transformer/diffusion_pytorch_model.safetensors",
    "pixart_sigma/transformer/config.json",
    "pixart_sigma/vae/diffusion_pytorch_model.safetensors",
    "pixart_sigma/scheduler/scheduler_config.json",
    "pixart_sigma/tokenizer/spiece.model",
    "hunyuan/tokenizer/vocab.txt",
    "hunyuan/text_encoder/model.safetensors",
    "sdxl/tokenizer/vocab.json",  # one blob with tokenizer_2's
    "sdxl/tokenizer/merges.txt",
    "dit/transformer/diffusion_pytorch_model.bin",
]


def refusal(load, family, model_id):
    """What a loader says to what it does not load: one line."""
    with pytest.raises(InputError) as failure:
        load(family, model_id, CPU)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def names(said, file):
    """Whether a message names a file: weights by what the names of all their forms begin with."""
    component, _, base = file.partition("/")
    if "-of-" not in base and base.endswith((".safetensors", ".bin", ".index.json")):
        base = base.split(".")[0]
    return component in said and base in said


def take_away(snapshot, file):
    path = snapshot / file
    path.resolve().unlink()
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("place", MISSING)
def test_a_file_that_a_snapshot_lacks_is_named(shallow_folder, in_cache, place):
    name, _, file = place.partition("/")
    take_away(in_cache(name, shallow_folder(name)), file)
    said = refusal(load_sampler, FAMILIES[name], FAMILIES[name].model_id)
    assert names(said, file), said
    if file.startswith("transformer"):
        assert names(refusal(load_denoiser, FAMILIES[name], FAMILIES[name].model_id), file)


@pytest.mark.parametrize("place", MISSING)
def test_a_file_that_a_folder_lacks_is_named(shallow_folder, in_cache, place):
    """A snapshot given as a folder, one of its files never fetched: the link is there, its blob is not."""
    name, _, file = place.partition("/")
    snapshot = in_cache(name, shallow_folder(name))
    (snapshot / file).resolve().unlink()
    said = refusal(load_sampler, FAMILIES[name], str(snapshot))
    assert names(said, file) and str(snapshot) in said and "cannot be fetched" not in said, said


@pytest.mark.parametrize("file", ["tokenizer/tokenizer_config.json", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_listing_tells_what_else_a_snapshot_lacks(shallow_folder, in_cache, file):
    """Without its configuration a tokenizer would pad and cut otherwise, and nobody would know."""
    take_away(in_cache("pixart_sigma", shallow_folder("pixart_sigma"), listing=True), file)
    assert names(refusal(load_sampler, FAMILIES["pixart_sigma"], FAMILIES["pixart_sigma"].model_id), file)


@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("name", ["pixart_alpha", "hunyuan", "sdxl", "dit"])
def test_the_denoiser_needs_no_other_component(shallow_folder, in_cache, name, listing):
    family = FAMILIES[name]
    needed = {"model_index.json"} | {file for file in files(name) if file.startswith(f"{family.denoiser}/")}
    in_cache(name, shallow_folder(name), files=needed, listing=listing)
    assert type(load_denoiser(family, family.model_id, CPU)).__name__.endswith("Model")
    said, lacking = refusal(load_sampler, family, family.model_id), set(FILES[name]) - {"", family.denoiser}
    assert any(f"{component}/" in said for component in lacking), said


@pytest.mark.parametrize("listing", [False, True])
@pytest.mark.parametrize("name", ["pixart_alpha", "sdxl"])
def test_a_cache_of_the_index_alone(shallow_folder, in_cache, name, listing):
    """What is left where the network went away after the first request."""
    family = FAMILIES[name]
    in_cache(name, shallow_folder(name), files={"model_index.json"}, listing=listing)
    assert family.denoiser in refusal(load_denoiser, family, family.model_id)
    assert family.model_id in refusal(load_sampler, family, family.model_id)


@pytest.mark.parametrize("load", [load_sampler, load_denoiser])
def test_a_revision_that_is_not_there(shallow_folder, in_cache, load):
    """`refs/main` was written before the snapshot, or names a newer one."""
    family = FAMILIES["dit"]
    snapshot = in_cache("dit", shallow_folder("dit"))
    (snapshot.parents[1] / "refs" / "main").write_text(REVISION[::-1])
    assert family.model_id in refusal(load, family, family.model_id)


@pytest.mark.parametrize("load", [load_sampler, load_denoiser])
def test_a_snapshot_without_an_index(shallow_folder, in_cache, load):
    take_away(in_cache("dit", shallow_folder("dit")), "model_index.json")
    assert FAMILIES["dit"].model_id in refusal(load, FAMILIES["dit"], FAMILIES["dit"].model_id)


def test_a_network_that_fails_is_as_good_as_none(shallow_folder, in_cache, monkeypatch, tmp_path, nobody_is_asked):
    """Not told to work offline, the program finds out by itself that it has to."""
    family = FAMILIES["dit"]
    in_cache("dit", shallow_folder("dit"))
    use_cache(monkeypatch, tmp_path / "home", offline=False)
    load_sampler(family, family.model_id, CPU)
    load_denoiser(family, family.model_id, CPU)
    nobody_is_asked.clear()


@pytest.mark.parametrize("cached", ["vocab.json merges.txt", "vocab.json merges.txt tokenizer_config.json", "all"])
def test_the_vocabulary_of_the_checkpoint_is_in_the_cache(published_folder, checkpoint, in_cache, cached):
    in_cache("clip", published_folder("clip"), files=files("clip") if cached == "all" else cached.split())
    tokenizer = load_sampler(SDV15, str(checkpoint), CPU).pipeline.tokenizer
    end = len(tokenizer) - 1
    assert tokenizer("red", padding="max_length").input_ids == [end - 1, *tokenizer("red").input_ids[1:2], *[end] * 75]


@pytest.mark.parametrize("cached", ["vocab.json", "merges.txt tokenizer_config.json", "config.json"])
def test_a_vocabulary_that_is_not_all_there(published_folder, checkpoint, in_cache, cached):
    """transformers makes a tokenizer of less, without a word."""
    in_cache("clip", published_folder("clip"), files=cached.split())
    assert "vocab.json and merges.txt" in refusal(load_sampler, SDV15, str(checkpoint))
