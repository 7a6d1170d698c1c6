"""Fixtures of the published layouts: each repository is built once for all tests."""

import functools

import numpy as np
import pytest
from no_network import no_network
from PIL import Image

from hub_layouts import builders
from hub_layouts.hub import hub_cache, use_cache
from hub_layouts.published import REPOSITORIES

CHECKPOINT = "models/ldm/stable-diffusion-v1/v1-5-pruned-emaonly.ckpt"  # below the folder that a stage is started in


@pytest.fixture(scope="session")
def published_folder(tmp_path_factory):
    """Folder of a repository by its name, built once; tests do not change it."""
    root = tmp_path_factory.mktemp("published")
    builds = {"clip": builders.build_vocabulary}
    return functools.cache(lambda name: builds.get(name, functools.partial(builders.build, name))(root / name))


@pytest.fixture(scope="session")
def shallow_folder(tmp_path_factory):
    """As `published_folder`, with as few layers as there can be: what files hold which weights does not depend on them."""
    root = tmp_path_factory.mktemp("shallow")
    fewer = {"sdxl": {"transformer_layers_per_block": [1, 1, 1]}, "sdxl_refiner": {"transformer_layers_per_block": 1}}
    return functools.cache(lambda name: builders.build(name, root / name, **fewer.get(name, {"num_layers": 2})))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Path of Stable Diffusion 1.5's checkpoint in a working folder of its own, built once."""
    path = tmp_path_factory.mktemp("sdv15") / CHECKPOINT
    path.parent.mkdir(parents=True)
    return builders.build_checkpoint(path)


@pytest.fixture
def in_cache(tmp_path, monkeypatch):
    """Lay a repository's folder into a Hub cache of the test's own under the published name, and work on it offline."""
    use_cache(monkeypatch, tmp_path / "home")

    def lay(name, folder, **how):
        return hub_cache(tmp_path / "home", REPOSITORIES[name], folder, **how)

    return lay


@pytest.fixture(autouse=True)
def nobody_is_asked():
    """Every look-up of a host fails and, at the end of the test, is a fault of it."""
    with no_network() as asked:
        yield asked
    assert asked == []


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """A small folder of real images: smooth random colours."""
    folder = tmp_path_factory.mktemp("reference")
    for number in range(12):
        colors = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(colors).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder
