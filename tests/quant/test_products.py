"""The operators that multiply by packed weights, beside the same with a decoded weight and simulated activations."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant import QuantizedModel
from quant.activations import quantize_tokens, set_activation_bits
from quant.kernels import int8, products
from quant.kernels.decode import decode
from quant.layers import packed_form, packed_parts
from quant.packing import pack_rows

BITS = range(2, 9)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
needs_int8 = pytest.mark.skipif(not int8.has_units(), reason="this processor multiplies int8 no faster than floats")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_weight(algorithm, bits, channels=37, count=75, table_dtype=torch.float16):
    """Codes, table and zero points of a random weight, as the operators take them."""
    codes = torch.randint(0, 2**bits, (channels, count), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    zero = None
    if algorithm == "mse":
        table = random(channels).abs() / 2**bits + 0.01
        zero = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 1, (channels,), dtype=torch.int16)
    else:
        table = random(*((channels,) if algorithm == "kmeans" else ()), 2**bits).sort(dim=-1).values
    return pack_rows(codes, bits), table.to(table_dtype), zero


def inputs(rows, count, dtype):
    """Tokens of unlike ranges: some all above zero or far from it, one of zeros, one constant, every other one in memory."""
    tokens = random(2 * rows, count) * torch.logspace(-3, 2, 2 * rows)[:, None] + random(2 * rows, 1, seed=1)
    tokens[:1], tokens[2:3] = 0, 3
    return tokens.to(dtype)[::2]


def relative(output, expected):
    return ((output.double() - expected.double()).norm() / expected.double().norm()).item()


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 40])
@pytest.mark.parametrize("algorithm", ["mse", "kmeans", "kmeans_all"])
def test_linear_is_the_product_with_the_decoded_weight(algorithm, rows, dtype):
    for bits in BITS:
        packed, bias = packed_weight(algorithm, bits), random(37).to(dtype)
        weight = decode(*packed, bits, 75).to(dtype)
        input = inputs(rows, 75, dtype)
        for given in (input, input.view(rows, 1, 75), input.unflatten(0, (1, rows))):
            assert torch.equal(products.linear(given, *packed, bits, 0, bias), F.linear(given, weight, bias))
        assert torch.equal(products.linear(input, *packed, bits, 0), F.linear(input, weight))


def test_few_rows_times_a_large_weight_are_the_same_in_parts():
    for algorithm in ("mse", "kmeans", "kmeans_all"):
        packed, bias = packed_weight(algorithm, 4, channels=2200, count=1000), random(2200)
        input = random(2, 1000)
        expected = F.linear(input, decode(*packed, 4, 1000).float(), bias)
        torch.testing.assert_close(products.linear(input, *packed, 4, 0, bias), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("act_bits", [8, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_tokens_are_those_that_are_simulated(dtype, act_bits):
    """Also of tokens of zeros, of one number, of all positive ones, far from zero, and with values that are not finite."""
    tokens = inputs(40, 77, dtype).contiguous()
    tokens[3] = 1000 + tokens[3]
    tokens[4, 5], tokens[5, 6], tokens[6, 7] = torch.inf, torch.nan, -torch.inf
    tokens[7, :2] = torch.tensor([3e38, -3e38])
    q, scale, shift, sums = int8.quantize_rows(tokens, act_bits, torch.empty(tokens.shape, dtype=torch.int8))
    restored = ((q.float() + shift[:, None]) * scale[:, None]).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert torch.equal(restored.to(dtype).nan_to_num(7), quantize_tokens(tokens, act_bits).nan_to_num(7))
    finite = scale.isfinite()
    assert torch.equal(sums[finite], q.sum(dim=1).float()[finite]) and finite.sum() == 37


@needs_int8
@DTYPES
@pytest.mark.parametrize("act_bits", [8, 6])
@pytest.mark.parametrize("rows", [1, 2, 5, 300])
@pytest.mark.parametrize("algorithm", ["mse", "kmeans", "kmeans_all"])
def test_integer_products_are_the_simulated_ones(algorithm, rows, act_bits, dtype):
    """To rounding for UAQ; for codebooks to their centroids' rounding to 255 levels, half a step at most."""
    for bits in BITS:
        packed, bias = packed_weight(algorithm, bits, 70, 75, torch.float32), random(70).to(dtype)
        input = inputs(rows, 75, dtype)
        simulated, weight = quantize_tokens(input.float(), act_bits), decode(*packed, bits, 75)
        output = products.linear_a8(input.unflatten(0, (1, rows)), *packed, bits, act_bits, bias)
        assert output.shape == (1, rows, 70) and output.dtype == dtype
        expected = F.linear(simulated.double(), weight.double(), bias.double())
        slack = 0.0
        if algorithm != "mse" and bits <= int8.MAX_CODEBOOK_BITS:
            span = packed[1].amax(-1) - packed[1].amin(-1)
            slack = (span / 508).expand(70) * simulated.abs().sum(dim=1, keepdim=True) * 1.01
        beside = 2 * ROUNDING[dtype] * (simulated.abs() @ weight.abs().T + bias.abs())
        assert ((output[0].double() - expected).abs() <= beside + slack).all(), bits


@needs_int8
def test_integer_products_are_taken_where_they_are_said_to_be(monkeypatch):
    taken = []
    monkeypatch.setattr(int8, "linear", lambda input, room, codes, *rest: taken.append(1) or input.new_zeros(len(input), 37))
    for algorithm, bits in (("mse", 8), ("mse", 4), ("kmeans", 6), ("kmeans_all", 3)):
        products.linear_a8(random(5, 75), *packed_weight(algorithm, bits), bits, 8)
    assert len(taken) == 4
    products.linear_a8(random(5, 75), *packed_weight("kmeans", 7), 7, 8)
    monkeypatch.setattr(int8, "has_units", lambda: False)
    input, packed = random(5, 75), packed_weight("mse", 4)
    output = products.linear_a8(input, *packed, 4, 8)
    assert len(taken) == 4
    assert torch.equal(output, F.linear(quantize_tokens(input, 8), decode(*packed, 4, 75).float()))


def test_rounded_codebooks_cost_little():
    """Squared error of normally distributed centroids, against that of 16 of them as a codebook of a normal weight."""
    centroids = torch.linspace(-1, 1, 16).expand(50, 16) * random(50, 1).abs() + random(50, 16) * 0.05
    levels, scale, shift = int8.round_codebooks(centroids)
    rounded = scale[:, None] * (levels.float() + shift[:, None])
    assert (rounded - centroids).abs().max() <= (scale.max() / 2) * 1.001
    for constant in (0.0, 3.0, -2.5, 1e-30):
        levels, scale, shift = int8.round_codebooks(torch.full((1, 8), constant))
        assert torch.equal(scale[:, None] * (levels.float() + shift[:, None]), torch.full((1, 8), constant))


def quantized(layer, words, inputs=(None,)):
    """The packed layer of `layer`, each part fitted anew."""
    packed = packed_form(layer, packed_parts(layer.weight.shape, words, inputs))
    for part, channels in zip(packed.parts, inputs, strict=True):
        weight = layer.weight.detach() if channels is None else layer.weight.detach()[:, slice(*channels)].contiguous()
        packed.fill(part, weight, part.quantizer.fit(weight))
    return packed.requires_grad_(False)


CONVOLUTIONS = [
    (nn.Conv1d(6, 8, 3, padding=1, dilation=2), (2, 6, 19)),
    (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 8)),
    (nn.Conv2d(6, 8, (3, 2), groups=2, padding=(1, 0)), (6, 9, 8)),
    (nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), (1, 6, 9, 8)),
    (nn.Conv2d(6, 8, 3, padding="same"), (1, 6, 9, 8)),
    (nn.Conv3d(6, 8, (1, 3, 3), bias=False), (2, 6, 3, 7, 8)),
]
LAYERS = [*CONVOLUTIONS, (nn.Linear(75, 37), (2, 3, 75)), (nn.Linear(75, 37, bias=False), (75,))]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
@pytest.mark.parametrize("word", ["mse-4", "kmeans-3", "mse-5-g8"])
def test_layers_compute_and_have_gradients_as_their_float_form(word, layer, shape):
    packed = quantized(layer, [word])
    reference = packed.dequantized()
    given, ours = random(*shape).requires_grad_(), random(*shape).requires_grad_()
    expected, output = reference(given), packed(ours)
    assert torch.equal(output, expected)
    upstream = random(*expected.shape, seed=5)
    expected.backward(upstream)
    output.backward(upstream)
    torch.testing.assert_close(ours.grad, given.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), LAYERS[:3] + LAYERS[-2:-1], ids=str)
def test_biases_can_be_trained(layer, shape):
    packed, reference = quantized(layer, ["mse-4"]), copy.deepcopy(layer).requires_grad_()
    packed.bias = nn.Parameter(layer.bias.detach().clone())
    packed(random(*shape)).square().sum().backward()
    reference.weight = nn.Parameter(packed.decoded(), requires_grad=False)
    reference(random(*shape)).square().sum().backward()
    torch.testing.assert_close(packed.bias.grad, reference.bias.grad, rtol=1e-4, atol=1e-4)


def test_training_keeps_no_decoded_weight():
    packed = quantized(nn.Linear(300, 200), ["mse-4"])
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.nbytes) or saved, lambda saved: saved):
        packed(random(4, 300).requires_grad_())
    assert sum(sizes) < 200 * 300


def test_autocast_is_followed():
    packed = quantized(nn.Linear(75, 37), ["mse-4"])
    with torch.autocast("cpu", torch.bfloat16):
        output = packed(random(5, 75))
    expected = F.linear(random(5, 75).bfloat16(), packed.decoded(torch.bfloat16), packed.bias.bfloat16())
    assert torch.equal(output, expected)


@pytest.mark.parametrize("words", [("mse-4", "kmeans-3"), ("kmeans_all-4", "mse-5-g8")])
def test_split_layers(words):
    for layer, shape in ((nn.Linear(75, 37), (5, 75)), (nn.Conv2d(7, 8, 3), (2, 7, 6, 6))):
        packed = quantized(layer, words, ((0, 3), (3, layer.weight.shape[1])))
        assert torch.equal(packed(random(*shape)), packed.dequantized()(random(*shape)))
        set_activation_bits(packed, 8)
        assert packed(random(*shape)).isfinite().all()


class Attending(nn.Module):
    """A linear layer and a convolution, attention between them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(24, 24), nn.Conv1d(24, 8, 3)

    def forward(self, tokens):
        tokens = self.first(tokens)
        return self.last(F.scaled_dot_product_attention(tokens, tokens, tokens).mT)


def attending():
    torch.manual_seed(0)
    model = Attending()
    QuantizedModel(model).pack("mse-4", show=False)
    return model


def test_packed_layers_quantize_linear_inputs_alone_unless_simulated():
    model, tokens = attending(), random(2, 9, 24)
    before = model(tokens)
    set_activation_bits(model, 8)
    output = model(tokens)
    hidden = F.linear(quantize_tokens(tokens, 8), model.first.decoded(torch.float32), model.first.bias)
    expected = model.last(F.scaled_dot_product_attention(hidden, hidden, hidden).mT)
    assert relative(output, expected) < 1e-4 < 1e-3 < relative(output, before)
    set_activation_bits(model, 8, simulated=True)
    assert relative(model(tokens), expected) > 1e-3
    set_activation_bits(model, 8)
    assert torch.equal(model(tokens), output)
    set_activation_bits(model, None)
    assert torch.equal(model(tokens), before)


def test_what_stays_float_is_said(caplog):
    model = attending()
    with caplog.at_level("INFO", "qua2sedimo"):
        set_activation_bits(model, 8)
        model(random(2, 9, 24))
        model(random(2, 9, 24))
    (message,) = caplog.messages
    assert message == "activations: the inputs of 1 linear layers in 8 bits; convolutions and attention stay float"


@pytest.mark.parametrize("act_bits", [None, 8])
def test_a_model_is_one_compiled_graph(act_bits):
    model, tokens = attending(), random(2, 9, 24)
    set_activation_bits(model, act_bits)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(tokens), model(tokens))
    given, ours = random(2, 9, 24).requires_grad_(), random(2, 9, 24).requires_grad_()
    if act_bits is None:
        compiled(ours).square().sum().backward()
        model(given).square().sum().backward()
        torch.testing.assert_close(ours.grad, given.grad)


def test_copies_and_tied_layers_share_the_room_and_nothing_else():
    model, tokens = attending(), random(2, 9, 24)
    expected = model(tokens)
    other = copy.deepcopy(model)
    other.first.codes.zero_()
    assert not torch.equal(other(tokens), expected) and torch.equal(model(tokens), expected)
    twice = nn.Sequential(model.first, model.first)
    first = model.first.dequantized()
    assert torch.equal(twice(tokens), first(first(tokens)))
