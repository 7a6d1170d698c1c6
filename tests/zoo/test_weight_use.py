"""How the zoo's denoisers use their weights, found on the CPU and on the meta device, alone and in a pipeline."""

import pytest
import torch
from weights_elsewhere import weights_elsewhere

from quant.discovery import weight_use
from quant.slots import weight_layers
from zoo import ZOO
from zoo.test_zoo import output

# Layers of whose weight the forward asks the precision before it calls them. Wan takes the first parameter of its
# time embedder, whatever that is, and casts its input to that unless it is int8 (so never pack to uint8 parameters
# there); Z-Image takes `weight`. No weight is read, and none is idle.
ASKED = {
    "wan": ("condition_embedder.time_embedder.linear_1",),
    "wan_2_2": ("condition_embedder.time_embedder.linear_1",),
    "z_image": ("t_embedder.mlp.0",),
}
pytestmark = pytest.mark.parametrize("name", ZOO)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_weight_layer_is_called_and_none_is_read(name, device):
    denoiser = ZOO[name].build_denoiser().to(device)
    inputs = ZOO[name].inputs(denoiser)
    found = weight_use(denoiser, lambda: denoiser(**inputs))
    assert found.called == tuple(path for path, _ in weight_layers(denoiser))
    assert (found.read, found.asked, found.idle) == ((), ASKED.get(name, ()), ())


def test_every_layer_may_hold_its_weight_elsewhere(name):
    denoiser = ZOO[name].build_denoiser()
    expected = output(ZOO[name], denoiser)
    weights_elsewhere(denoiser)
    assert torch.equal(output(ZOO[name], denoiser), expected)


def test_same_is_found_in_a_pipeline(name):
    pipeline = ZOO[name].build_pipeline()
    for attribute in ZOO[name].denoiser_names:
        denoiser = getattr(pipeline, attribute)
        found = weight_use(denoiser, lambda: ZOO[name].draw(pipeline))
        assert found.called == tuple(path for path, _ in weight_layers(denoiser))
        assert set(found.asked) >= set(ASKED.get(name, ()))  # a pipeline asks a denoiser's first parameter, too
        assert (found.read, found.idle) == ((), ())
