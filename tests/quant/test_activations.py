import copy
import functools
import inspect
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import tiny, tiny_dit, tiny_inputs
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as HookOfDiffusers
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn
from zoo import denoisers

from quant import activations
from quant.activations import quantize_channels, quantize_tokens, set_activation_bits
from quant.exchangeable import ExchangeableLayer, exchangeable_form, install
from quant.slots import find_slots


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Loop references, one number at a time in double precision


def loop_token(token, bits):
    """A list of numbers in 2^bits levels from its min to its max."""
    low, high = min(token), max(token)
    if low == high:
        return token
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    codes = [min(max(round(x / scale) + zero_point, 0), 2**bits - 1) for x in token]
    return [(code - zero_point) * scale for code in codes]


def loop_tokens(values, bits):
    rows = [loop_token(row, bits) for row in values.reshape(-1, values.shape[-1]).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(values.shape)


def loop_row_attention(query, keys, values, added, scale, bits):
    """One query [D] over the keys [S][D] and values [S][E] with `added` [S] to its scores."""
    query, keys, values = loop_token(query, bits), [loop_token(k, bits) for k in keys], [loop_token(v, bits) for v in values]
    scores = [sum(q * k for q, k in zip(query, key, strict=True)) * scale + a for key, a in zip(keys, added, strict=True)]
    top = max(scores)
    exponentials = [math.exp(score - top) for score in scores]
    probabilities = [e / sum(exponentials) for e in exponentials]
    step = max(probabilities) / 255
    quantized = [round(p / step) * step for p in probabilities]
    return [sum(p * value[e] for p, value in zip(quantized, values, strict=True)) for e in range(len(values[0]))]


def loop_attention(query, key, value, added, scale, bits):
    """query [B, H, L, D], key [B, H, S, D], value [B, H, S, E], added [B, H, L, S] -> [B, H, L, E]."""
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    for b, h, token in itertools.product(*map(range, query.shape[:-1])):
        arguments = (query[b, h, token], key[b, h], value[b, h], added[b, h, token])
        row = loop_row_attention(*(a.tolist() for a in arguments), scale, bits)
        out[b, h, token] = torch.tensor(row, dtype=torch.float64)
    return out


# Tokens and channels


@pytest.mark.parametrize("bits", [8, 6, 3])
@pytest.mark.parametrize("shape", [(7,), (5, 9), (2, 3, 5, 7)])
def test_tokens_equal_a_loop(shape, bits):
    """Also for tokens far from zero, on either side of it, whose zero point is no code."""
    values = random(*shape, dtype=torch.float64)
    for shift in (0, 4, -4):
        assert torch.equal(quantize_tokens(values + shift, bits), loop_tokens(values + shift, bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_follow_the_loop(dtype):
    values = random(4, 5, 33, dtype=dtype)
    quantized = quantize_tokens(values, 6)
    assert quantized.dtype == dtype
    torch.testing.assert_close(quantized, loop_tokens(values.double(), 6).to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_tokens_by_hand():
    # Range -1 ... 2 in 4 levels: scale 1, zero point 1.
    assert quantize_tokens(torch.tensor([-1.0, -0.4, 0.6, 1.4, 2.0]), 2).tolist() == [-1, 0, 1, 1, 2]
    # Range -1.5 ... 1.5: scale 1, zero point 2 (1.5 rounds to even), and 1.5 would be code 4.
    assert quantize_tokens(torch.tensor([-1.5, 0.0, 1.5]), 2).tolist() == [-2, 0, 1]


def test_every_token_has_its_own_scale():
    small, large = random(1, 16), random(1, 16, seed=1) * 1000
    together = quantize_tokens(torch.cat([small, large]), 8)
    assert torch.equal(together, torch.cat([quantize_tokens(small, 8), quantize_tokens(large, 8)]))
    assert (together[0] - small).abs().max() <= (small.max() - small.min()) / 255


@pytest.mark.parametrize(("shape", "places"), [((2, 3, 5, 7), (2, 3)), ((2, 3, 9), (2,)), ((2, 3, 2, 3, 4), (2, 3, 4))])
def test_channels_equal_a_loop(shape, places):
    values = random(*shape, dtype=torch.float64) * torch.arange(1, 4).reshape(1, 3, *[1] * len(places))
    expected = torch.stack([torch.stack([loop_tokens(c.flatten(), 6).view_as(c) for c in sample]) for sample in values])
    assert torch.equal(quantize_channels(values, 6), expected)


def test_channels_of_channels_last_values():
    values = random(2, 6, 4, 4)
    quantized = quantize_channels(values.to(memory_format=torch.channels_last), 8)
    assert torch.equal(quantized, quantize_channels(values, 8))
    assert quantized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_constant_tokens_come_back(dtype):
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    constants = torch.tensor([0, 1, -0.3, limits.max, limits.min, smallest, -smallest, -0.0], dtype=dtype)
    values = constants[:, None].expand(-1, 5)
    assert torch.equal(quantize_tokens(values, 8), values)
    assert torch.equal(quantize_channels(values[None], 6), values[None])


def test_half_precision_extremes():
    largest, smallest = 65504.0, 2**-24  # 6e-8
    wide = torch.tensor([[-largest, -largest / 3, 0, largest / 2, largest]], dtype=torch.half)
    narrow = torch.tensor([[-2, 0, smallest, 3 * smallest, 2.0]], dtype=torch.half)
    tiny = torch.tensor([[0, smallest, 2 * smallest, 3 * smallest]], dtype=torch.half)
    assert (quantize_tokens(wide, 8).double() - wide.double()).abs().max() <= 2 * largest / 255
    assert quantize_tokens(narrow, 8)[0, 1:4].tolist() == [0, 0, 0]
    assert torch.equal(quantize_tokens(tiny, 8), tiny)
    mixed = quantize_tokens(torch.tensor([[smallest, largest]], dtype=torch.half), 6)
    assert mixed.tolist() == [[0, largest]]


def test_single_precision_extremes():
    limits = torch.finfo(torch.float32)
    values = torch.tensor([[limits.min, limits.max], [0, 2**-149], [1000, 1000 + 2**-13]])
    torch.testing.assert_close(quantize_tokens(values, 8), values, rtol=0.01, atol=0)


def test_nan_is_not_hidden():
    quantized = quantize_tokens(torch.tensor([[0.0, torch.nan, 1], [0, 1, 2], [0, torch.inf, 1]]), 8)
    assert quantized.isnan().any(dim=1).tolist() == [True, False, True]


# Attention


BATCH, HEADS, QUERIES, KEYS, WIDTH, VALUE_WIDTH = 2, 3, 5, 7, 4, 6


@pytest.fixture
def query_key_value():
    query = random(BATCH, HEADS, QUERIES, WIDTH, dtype=torch.float64)
    key = random(BATCH, HEADS, KEYS, WIDTH, dtype=torch.float64, seed=1)
    return query, key, random(BATCH, HEADS, KEYS, VALUE_WIDTH, dtype=torch.float64, seed=2)


FULL = (BATCH, HEADS, QUERIES, KEYS)
MASK_SHAPES = [FULL, (BATCH, 1, 1, KEYS), (1, HEADS, QUERIES, 1), (QUERIES, KEYS), (KEYS,)]


def boolean_mask(shape):
    mask = random(*shape, seed=3) > 0
    return mask.index_fill_(-1, torch.tensor([0]), True)  # something to attend to


@pytest.mark.parametrize("bits", activations.ACT_BITS)
@pytest.mark.parametrize("scale", [None, 0.9])
def test_attention_equals_a_loop(query_key_value, bits, scale):
    expected = loop_attention(*query_key_value, torch.zeros(FULL), scale or WIDTH**-0.5, bits)
    quantized = activations.attention(*query_key_value, scale=scale, bits=bits)
    torch.testing.assert_close(quantized, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_masked_attention_equals_a_loop(query_key_value, shape):
    boolean, additive = boolean_mask(shape), random(*shape, seed=4)
    infinite = torch.zeros(shape).masked_fill(~boolean, -torch.inf)
    for mask, added in ((boolean, infinite), (infinite, infinite), (additive, additive)):
        expected = loop_attention(*query_key_value, added.expand(FULL), WIDTH**-0.5, 8)
        torch.testing.assert_close(activations.attention(*query_key_value, mask, bits=8), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_is_near_the_float_one(query_key_value, dtype):
    tensors = [tensor.to(dtype) for tensor in query_key_value]
    mask = boolean_mask(FULL)
    expected = F.scaled_dot_product_attention(*query_key_value, mask)
    quantized = activations.attention(*tensors, mask, bits=8)
    assert quantized.dtype == dtype
    assert (quantized - expected).abs().max() < 0.04
    six = activations.attention(*tensors, mask, bits=6)
    assert (six - expected).square().mean() > 2 * (quantized - expected).square().mean()


def test_a_row_without_keys_is_zero(query_key_value):
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool)
    mask[2] = False
    output = activations.attention(*query_key_value, mask, bits=8)
    assert (output[..., 2, :] == 0).all()
    assert torch.equal(output[..., 3, :], activations.attention(*query_key_value, bits=8)[..., 3, :])


def test_half_precision_scores_do_not_overflow():
    query = torch.full((1, 1, 2, 64), 100.0, dtype=torch.half) + random(1, 1, 2, 64, dtype=torch.half)
    value = random(1, 1, 2, 64, dtype=torch.half)
    assert activations.attention(query, query, value, bits=8).isfinite().all()  # 64 x 100 x 100 > 65504


def test_softmax_codes_by_hand():
    scores = torch.tensor([[0.0, math.log(0.5), math.log(0.25), -torch.inf]])
    codes, scale = activations.softmax_codes(scores)
    assert codes.tolist() == [[255, 128, 64, 0]]
    assert scale.item() == pytest.approx(1 / 1.75 / 255)


@pytest.mark.parametrize("shape", [None, *MASK_SHAPES])
@pytest.mark.parametrize("queries_at_a_time", [0, 1, 2, 4])
def test_chunks_change_nothing(query_key_value, monkeypatch, shape, queries_at_a_time):
    for mask in (None,) if shape is None else (boolean_mask(shape), random(*shape)):
        whole = activations.attention(*query_key_value, mask, bits=8)
        with monkeypatch.context() as patch:
            patch.setattr(activations, "MAX_SCORES", queries_at_a_time * BATCH * HEADS * KEYS)
            chunks = activations.attention(*query_key_value, mask, bits=8)
        torch.testing.assert_close(chunks, whole, rtol=1e-12, atol=1e-14)


def test_chunks_bound_the_scores(query_key_value, monkeypatch):
    sizes = []
    softmax_codes = activations.softmax_codes
    monkeypatch.setattr(activations, "softmax_codes", lambda s: sizes.append(s.numel()) or softmax_codes(s))
    monkeypatch.setattr(activations, "MAX_SCORES", 100)
    activations.attention(*query_key_value, bits=8)
    assert sizes == [84, 84, 42]


def test_attention_leaves_its_arguments_alone(query_key_value):
    before = [tensor.clone() for tensor in query_key_value]
    activations.attention(*query_key_value, random(*FULL), bits=8)
    assert all(map(torch.equal, query_key_value, before))


def test_causal_attention_looks_back_only(query_key_value):
    past = torch.arange(QUERIES)[:, None] >= torch.arange(KEYS)
    causal = activations.attention(*query_key_value, is_causal=True, bits=8)
    assert torch.equal(causal, activations.attention(*query_key_value, past, bits=8))
    first_value = quantize_tokens(query_key_value[2], 8)[..., 0, :]  # the first query has one key to look at
    torch.testing.assert_close(causal[..., 0, :], first_value, rtol=1e-12, atol=0)


def test_grouped_heads_share_their_keys(query_key_value):
    """Four query heads on two of keys and values: heads 0 and 1 of the first, 2 and 3 of the second."""
    query, (key, value) = random(BATCH, 4, QUERIES, WIDTH), (each.float()[:, :2] for each in query_key_value[1:])
    grouped = activations.attention(query, key, value, enable_gqa=True, bits=6)
    for head in range(4):
        alone = (query[:, [head]], key[:, [head // 2]], value[:, [head // 2]])
        torch.testing.assert_close(grouped[:, [head]], activations.attention(*alone, bits=6))


def test_what_it_does_not_compute_is_refused(query_key_value):
    with pytest.raises(NotImplementedError, match=r"dropout_p \(given 0.5\); call eval"):
        activations.attention(*query_key_value, dropout_p=0.5, bits=8)
    with pytest.raises(ValueError, match="attn_mask or is_causal"):
        activations.attention(*query_key_value, boolean_mask(FULL), is_causal=True, bits=8)


# Layers


@pytest.mark.parametrize(
    ("layer", "shape", "quantize"),
    [
        (nn.Linear(24, 10), (3, 5, 24), quantize_tokens),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8), quantize_channels),
        (nn.Conv1d(4, 6, 3), (2, 4, 9), quantize_channels),
        (nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), (2, 4, 3, 8, 8), quantize_channels),
    ],
)
def test_a_layer_quantizes_its_input(layer, shape, quantize):
    layer.requires_grad_(False)
    input = random(*shape)
    quantized = exchangeable_form(copy.deepcopy(layer), torch.float32)
    assert torch.equal(quantized(input), layer(input))
    quantized.act_bits = 6
    assert torch.equal(quantized(input), layer(quantize(input, 6)))
    assert not torch.allclose(quantized(input), layer(input), atol=1e-3)


# Denoisers


FAMILIES = ("dit", "pixart_alpha", "hunyuan", "sdxl", "sdv15")


@pytest.fixture(params=FAMILIES)
def made(request):
    return make(request.param)


def make(name):
    """A family's tiny denoiser with quantizable layers, and arguments of a call for two pictures."""
    changes = {"sample_size": 16} if name == "sdv15" else {}  # else its innermost attention has one token
    denoiser = tiny(name, **changes)
    install(denoiser, find_slots(denoiser), torch.float32)
    return denoiser, inputs_of(name, denoiser)


def inputs_of(name, denoiser):
    """Those of `tiny_inputs`, of two pictures whose texts are of different lengths."""
    inputs = tiny_inputs(name, denoiser)
    for key, value in inputs.items():
        if "mask" in key:
            value[0, value.shape[1] // 2 :] = 0
    return inputs


def attentions(denoiser):
    return [module for module in denoiser.modules() if isinstance(module, Attention)]


def layers(denoiser):
    return [module for module in denoiser.modules() if isinstance(module, ExchangeableLayer)]


def error(output, reference):
    return (output - reference).square().mean().item()


def test_fewer_bits_move_the_output_further_and_none_restores_it(made):
    denoiser, inputs = made
    attributes = dict(vars(denoiser))
    before = denoiser(**inputs).sample
    outputs = {}
    for bits in activations.ACT_BITS:
        set_activation_bits(denoiser, bits)
        outputs[bits] = denoiser(**inputs).sample
    assert 0 < error(outputs[8], before) < error(outputs[6], before) < before.var()
    assert error(outputs[8], before) < error(outputs[6], before) / 4  # a step is 4 times as wide, its square 16 times
    set_activation_bits(denoiser, None)
    assert torch.equal(denoiser(**inputs).sample, before)
    assert vars(denoiser) == attributes and not denoiser._forward_hooks
    assert all(layer.act_bits is None for layer in layers(denoiser))


def test_layers_and_attention_both_act(made):
    denoiser, inputs = made
    before = denoiser(**inputs).sample
    set_activation_bits(denoiser, 6)
    both = denoiser(**inputs).sample
    for layer in layers(denoiser):
        layer.act_bits = None
    attention_alone = denoiser(**inputs).sample
    assert error(both, attention_alone) > 0
    assert error(attention_alone, before) > 0


@pytest.fixture
def attention_calls(monkeypatch):
    """Bits of each call of quantized attention."""
    calls, attention = [], activations.attention
    monkeypatch.setattr(
        activations, "attention", lambda *args, bits, **kw: calls.append(bits) or attention(*args, bits=bits, **kw)
    )
    return calls


def test_every_attention_is_quantized_once(made, attention_calls):
    denoiser, inputs = made
    for bits in (8, 8, 6):
        set_activation_bits(denoiser, bits)
        denoiser(**inputs)
    assert attention_calls == [8] * 2 * len(attentions(denoiser)) + [6] * len(attentions(denoiser))
    assert {layer.act_bits for layer in layers(denoiser)} == {6}


def test_layers_without_a_configuration_are_not_touched():
    denoiser = tiny_dit()
    inputs, seen = tiny_inputs("dit", denoiser), []
    denoiser.proj_out_2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    set_activation_bits(denoiser, 6)
    output = denoiser(**inputs).sample
    projected = F.linear(seen[0], denoiser.proj_out_2.weight, denoiser.proj_out_2.bias)  # [N, 4 x 4, 2 x 2 x 8]
    expected = projected.reshape(2, 4, 4, 2, 2, 8).permute(0, 5, 1, 3, 2, 4).reshape(2, 8, 8, 8)
    torch.testing.assert_close(output, expected)
    assert not hasattr(denoiser.proj_out_2, "act_bits")


def test_hunyuan_keeps_its_rotary_embedding():
    denoiser, inputs = make("hunyuan")
    set_activation_bits(denoiser, 8)
    output = denoiser(**inputs).sample
    turned = denoiser(**inputs | {"image_rotary_emb": tuple(part.flip(0) for part in inputs["image_rotary_emb"])}).sample
    without = denoiser(**inputs | {"image_rotary_emb": None}).sample
    set_activation_bits(denoiser, None)
    noise = error(output, denoiser(**inputs).sample)
    assert error(output, turned) > 2 * noise
    assert error(output, without) > 2 * noise


# The forward


def output_of(denoiser, inputs):
    output = denoiser(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output  # Z-Image answers image by image


ALL = {name: lambda name=name: (denoisers.build(name), denoisers.inputs(name)) for name in denoisers.CONFIGS}
ALL |= {name: functools.partial(make, name) for name in FAMILIES}


def replaced(query, *args, float_attention=F.scaled_dot_product_attention, **kwargs):
    """Hunyuan-DiT's pool over the text, of one query, goes through PyTorch's whole multi-head function and stays float."""
    is_pool = query.shape[-2] == 1
    return (float_attention if is_pool else functools.partial(activations.attention, bits=6))(query, *args, **kwargs)


@pytest.mark.parametrize("name", ALL)
def test_attention_of_any_class_equals_that_with_the_function_replaced(name, monkeypatch):
    denoiser, inputs = ALL[name]()
    before = output_of(denoiser, inputs)
    set_activation_bits(denoiser, 6)
    quantized = output_of(denoiser, inputs)
    assert torch.equal(denoiser.forward(**inputs, return_dict=False)[0][0], quantized[0])
    with monkeypatch.context() as patch:
        for each in layers(denoiser):
            each.act_bits = None
        attention_alone = output_of(denoiser, inputs)
        set_activation_bits(denoiser, None)
        patch.setattr(F, "scaled_dot_product_attention", replaced)
        assert torch.equal(output_of(denoiser, inputs), attention_alone)
    assert 0 < error(attention_alone, before) < before.var()
    assert torch.equal(output_of(denoiser, inputs), before)


def test_attention_is_quantized_nowhere_else():
    """Not in another denoiser, not after the forward, not where the forward fails."""
    (denoiser, inputs), (other, _) = make("dit"), make("dit")
    before, query = other(**inputs).sample, random(1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(query, query, query)
    set_activation_bits(denoiser, 6)
    quantized = denoiser(**inputs).sample
    with pytest.raises(TypeError):
        denoiser(no_such_argument=1)
    assert torch.equal(other(**inputs).sample, before)
    assert torch.equal(F.scaled_dot_product_attention(query, query, query), expected)
    assert torch.equal(denoiser(**inputs).sample, quantized)


def test_a_denoiser_in_another_s_forward_has_its_own_bits(attention_calls):
    (outer, inputs), (inner, _) = make("dit"), make("dit")
    outer.proj_out_1.register_forward_pre_hook(lambda *_: inner(**inputs) and None)
    set_activation_bits(outer, 8)
    set_activation_bits(inner, 6)
    outer(**inputs)
    assert attention_calls == [8, 8, 6, 6]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda denoiser: pickle.loads(pickle.dumps(denoiser))])
def test_a_copy_is_quantized_for_itself(again):
    denoiser, inputs = make("pixart_alpha")
    before = denoiser(**inputs).sample
    set_activation_bits(denoiser, 6)
    quantized = denoiser(**inputs).sample
    copied = again(denoiser)
    set_activation_bits(denoiser, None)
    assert torch.equal(copied(**inputs).sample, quantized)
    set_activation_bits(copied, None)
    assert torch.equal(copied(**inputs).sample, before)


def test_offloading_hooks_come_and_go_around_it():
    """Bits are set, changed and taken off with hooks on and with hooks off, in every order."""
    denoiser, inputs = make("dit")
    changes = {
        "put": lambda: add_hook_to_module(denoiser, ModelHook()),
        "remove": lambda: remove_hook_from_module(denoiser),
        **{bits: functools.partial(set_activation_bits, denoiser, bits) for bits in (8, 6, None)},
    }
    outputs = {}
    for bits in (8, 6, None):
        set_activation_bits(denoiser, bits)
        outputs[bits] = denoiser(**inputs).sample
    for order in [
        ("put", 8, 6, "remove", None),
        (8, "put", None, "remove", 6, "put", "remove"),
        ("put", 6, None, 8, "remove"),
    ]:
        bits = None
        for change in order:
            changes[change]()
            bits = bits if isinstance(change, str) else change
            assert torch.equal(denoiser(**inputs).sample, outputs[bits]), (order, change)
        set_activation_bits(denoiser, None)
        assert denoiser.forward.__func__ is type(denoiser).forward


def test_it_is_put_back_where_another_library_takes_it_off():
    """diffusers' own hooks, taken off from beneath, put back the forward that they found."""
    denoiser, inputs = make("dit")
    before = denoiser(**inputs).sample
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(HookOfDiffusers(), "beneath")
    set_activation_bits(denoiser, 6)
    quantized = denoiser(**inputs).sample
    registry.remove_hook("beneath")
    assert torch.equal(denoiser(**inputs).sample, quantized)
    registry.register_hook(HookOfDiffusers(), "above")
    assert torch.equal(denoiser(**inputs).sample, quantized)
    set_activation_bits(denoiser, None)
    assert torch.equal(denoiser(**inputs).sample, before)


def test_who_answers_for_the_denoiser_above_it_is_let_be():
    """As caches do that skip a forward."""
    denoiser, inputs = make("dit")
    set_activation_bits(denoiser, 6)
    quantized = denoiser(**inputs).sample
    below = denoiser.forward
    denoiser.forward = functools.update_wrapper(lambda **_: "cached", below)
    assert denoiser(**inputs) == "cached"
    denoiser.forward = below
    assert torch.equal(denoiser(**inputs).sample, quantized)


def test_the_forward_shows_its_parameters():
    denoiser, _ = make("dit")
    before = inspect.signature(denoiser.forward)
    set_activation_bits(denoiser, 8)
    assert inspect.signature(denoiser.forward) == before


# What stays float


def test_linear_attention_is_said_to_stay_float_once(caplog):
    denoiser, inputs = ALL["sana"]()
    for bits in (8, 6):
        set_activation_bits(denoiser, bits)
        denoiser(**inputs)
        denoiser(**inputs)
    (message,) = caplog.messages
    assert message.startswith("2 of 4 attention modules keep float activations")
    assert message.endswith(": 2 Attention with SanaLinearAttnProcessor2_0")


def test_a_processor_without_the_function_is_said_to_stay_float(caplog, attention_calls):
    denoiser, inputs = make("dit")
    attentions(denoiser)[1].set_processor(AttnProcessor())
    set_activation_bits(denoiser, 8)
    denoiser(**inputs)
    assert len(attention_calls) == 1
    assert [message.partition(":")[2] for message in caplog.messages] == [" 1 Attention with AttnProcessor"]


def test_a_module_without_known_attention_is_said_to_stay_float(caplog):
    net = nn.Sequential(nn.Linear(3, 3))
    set_activation_bits(net, 8)
    net(torch.ones(1, 3))
    assert [message.partition(",")[0] for message in caplog.messages] == ["Sequential keeps float attention"]


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("sana", "hunyuan")])
def test_nothing_is_said_where_all_attention_is_quantized(name, caplog):
    denoiser, inputs = ALL[name]()
    set_activation_bits(denoiser, 8)
    denoiser(**inputs)
    assert not caplog.messages


@pytest.mark.parametrize("bits", [0, 7, True, "8"])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="8 or 6 bits"):
        set_activation_bits(nn.Linear(2, 2), bits)
