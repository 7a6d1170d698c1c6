"""The folders that the other tests load are the published ones, but for their widths."""

import pytest
import torch
from safetensors import safe_open

from hub_layouts import builders
from hub_layouts.configs import CONFIGS
from hub_layouts.published import GIGABYTES, INDICES, REPOSITORIES, files
from models import geometry
from models.families import FAMILIES
from models.single_file import SD1_CONFIG


def test_the_default_models_are_these_repositories():
    expected = {name: family.model_id for name, family in FAMILIES.items() if name != "sdv15"}
    expected["sdxl_refiner"] = FAMILIES["sdxl"].refiner.model_id
    assert {name: REPOSITORIES[name] for name in INDICES} == expected


@pytest.mark.parametrize("name", [*INDICES, "clip"])
def test_a_folder_holds_the_published_files_and_no_more(published_folder, name):
    folder = published_folder(name)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == files(name)


def test_the_checkpoint_is_configured_by_the_project_s_own_files(checkpoint):
    beside = checkpoint.with_suffix("")
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*.*")} for folder in (SD1_CONFIG, beside)]
    assert names[0] == names[1] and "unet/config.json" in names[0]


def real(name, component):
    with torch.device("meta"):
        return builders.module_of(name, component, CONFIGS[name][component])


@pytest.mark.parametrize("name", list(GIGABYTES))
def test_the_published_configurations_give_the_published_sizes(name):
    for component, gigabytes in GIGABYTES[name].items():
        size = sum(weight.nbytes for weight in real(name, component).parameters()) / 1e9
        assert size == pytest.approx(gigabytes, rel=0.01), component


@pytest.mark.parametrize("name", [name for name in INDICES if name in geometry.GEOMETRIES])
def test_the_published_denoisers_are_the_real_geometries(name):
    with torch.device("meta"):
        expected = geometry.build(name)
    denoiser = real(name, FAMILIES[name].denoiser)
    shapes, expected = ({key: weight.shape for key, weight in model.state_dict().items()} for model in (denoiser, expected))
    assert shapes == expected


def precisions(folder):
    """{file: {its weights' dtypes}} of the files that the libraries read."""
    found = {}
    for path in sorted(folder.glob("*/*model*.safetensors")):
        with safe_open(path, "pt") as weights:
            found[path.name] = {weights.get_tensor(key).dtype for key in weights.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", [name for name in INDICES if name != "dit"])
def test_weights_are_float32_and_half_in_the_fp16_files(published_folder, name):
    for file, dtypes in precisions(published_folder(name)).items():
        assert dtypes == {torch.float16 if "fp16" in file else torch.float32}, file
