import itertools
import math

import pytest
import torch

from errors import InputError
from quant import kmeans, registry, uaq
from quant.quantizer import fp_size_bytes
from quant.registry import quantizer

ALGORITHMS = (*registry.ALGORITHMS, "affine")
WIDTHS = [f"{algorithm}-{bits}" for algorithm in ALGORITHMS for bits in range(2, 9)]
GROUPED = ["mse-4-g16", "kmeans-3-g16", "mse-8-g7", "kmeans-4-g7", "kmeans-2-g39", "mse-3-g40", "kmeans-4-g64", "mse-2-g2"]
GROUPED += ["affine-3-g16", "affine-8-g7", "affine-4-g39"]


@pytest.fixture(scope="module")
def weight():
    return (torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.05).half()


@pytest.fixture(scope="module")
def fitted(weight):
    return registry.fit(weight, [*WIDTHS, *GROUPED])


def test_the_six():
    assert registry.SEARCH_SPACE == ("mse-4", "mse-3", "kmeans-4", "kmeans-3", "kmeans_all-4", "kmeans_all-3")


@pytest.mark.parametrize("word", [*WIDTHS, *GROUPED])
def test_words(word):
    found = quantizer(word)
    assert found.name == word and quantizer(word) is found and found.algorithm == word.split("-")[0]
    assert found == type(found)(int(word.split("-")[1]), int(word.split("-g")[1]) if "-g" in word else None)


@pytest.mark.parametrize(
    "word",
    [
        *("mse-1", "mse-9", "mse-04", "mse", "mse-4-g1", "mse-4-g0", "mse-4-g064", "mse-4-g", "mse-4-64"),
        *(
            "kmeans_all-4-g64",
            "float-16",
            "float-g64",
            "MSE-4",
            "mse-4 ",
            "mse-4\n",
            "mse-\u0664",
            "other-4",
            "",
            None,
            4,
            ["mse-4"],
        ),
    ],
)
def test_unknown_words_are_refused_with_the_possible_ones(word):
    with pytest.raises(
        InputError, match=r"^unknown quantizer .*mse, affine, kmeans and kmeans_all take 2 to 8 bits.*mse-4-g64"
    ):
        quantizer(word)


def test_fit_keeps_the_precision(weight, fitted):
    for word, parameters in fitted.items():
        found = quantizer(word)
        quantized = found.apply(weight, parameters)
        assert quantized.dtype == torch.float16 and quantized.shape == weight.shape
        assert tuple(parameters) == found.tables and parameters[found.tables[0]].dtype == torch.float16
        levels = torch.unique(quantized) if "kmeans_all" in word else max(map(torch.unique, quantized), key=len)
        most = 2**found.bits * (1 if found.group is None else -(-40 // found.group))
        assert 2 < len(levels) <= most, word


@pytest.mark.parametrize("shape", [(6, 30), (6, 10, 3), (6, 5, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_codes_and_weights_agree(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for word, parameters in registry.fit(weight, [*WIDTHS, *GROUPED]).items():
        codes = quantizer(word).encode(weight, parameters)
        assert codes.dtype == torch.uint8 and codes.shape == weight.shape and codes.int().max() < 2 ** quantizer(word).bits
        assert torch.equal(quantizer(word).decode(codes, parameters), quantizer(word).apply(weight, parameters)), word


def test_several_at_once_are_each_alone(weight, fitted):
    """Rows that are sorted once for all: whatever is fitted together, the parameters are those of each by itself."""
    for word, parameters in fitted.items():
        alone = quantizer(word).fit(weight, statistics=None)
        assert alone.keys() == parameters.keys()
        assert all(torch.equal(alone[name], tensor) for name, tensor in parameters.items()), word
    together, errors = registry.fit_with_errors(weight, ["kmeans-3-g16", "mse-8"])
    assert list(together) == list(errors) == ["kmeans-3-g16", "mse-8"]
    assert torch.equal(together["kmeans-3-g16"]["centroids"], fitted["kmeans-3-g16"]["centroids"])


def test_error_is_the_same_measure_for_all(weight, fitted):
    _, errors = registry.fit_with_errors(weight, [*WIDTHS, *GROUPED])
    for word, parameters in fitted.items():
        quantized = quantizer(word).apply(weight, parameters).double()
        by_hand = sum(((w - q).abs() ** 2.4).mean() for w, q in zip(weight.double(), quantized, strict=True)).item()
        assert quantizer(word).error(weight, parameters) == pytest.approx(by_hand, rel=1e-5), word
        assert errors[word] == pytest.approx(by_hand, rel=1e-5), word


def test_more_bits_and_finer_grain_lower_the_error(weight, fitted):
    errors = {word: quantizer(word).error(weight, parameters) for word, parameters in fitted.items()}
    for algorithm in ALGORITHMS:
        for more, fewer in itertools.pairwise(range(8, 1, -1)):
            assert errors[f"{algorithm}-{more}"] <= errors[f"{algorithm}-{fewer}"]
        assert errors[f"{algorithm}-5"] < 0.3 * errors[f"{algorithm}-4"] < 0.1 * errors[f"{algorithm}-3"]
    assert errors["kmeans-4"] < errors["mse-4"] and errors["kmeans-4"] < errors["kmeans_all-4"]
    assert errors["mse-4-g16"] < errors["mse-4"] and errors["kmeans-3-g16"] < errors["kmeans-3"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("mse-4", 512 + 64),
        ("mse-3", 384 + 64),
        ("kmeans-4", 512 + 512),
        ("kmeans_all-3", 384 + 16),
        ("mse-8", 1024 + 64),
        ("affine-4", 512 + 64),
        ("affine-4-g16", 512 + 64 * 4),
        ("float", 2048),
        ("mse-5", 640 + 64),
        ("kmeans-2", 256 + 16 * 4 * 2),
        ("kmeans_all-8", 1024 + 512),
        ("mse-4-g16", 512 + 4 * 64),
        ("mse-4-g60", 512 + 2 * 64),  # 60 and 4
        ("mse-4-g64", 512 + 64),
        ("mse-4-g100", 512 + 64),
        ("kmeans-3-g32", 384 + 2 * 16 * 8 * 2),
    ],
)
def test_sizes_by_hand(word, expected):
    """Of [16, 64] weights of two bytes."""
    assert quantizer(word).size_bytes((16, 64), precision_bits=16) == expected
    assert quantizer(word).size_bytes((16, 4, 4, 4), precision_bits=16) == expected
    assert fp_size_bytes((16, 64), 16) == 2048


@pytest.mark.parametrize("word", ["kmeans-4", "kmeans-8", "kmeans-4-g4", "kmeans-2-g3", "kmeans_all-8", "kmeans_all-4"])
def test_told_codebooks_are_as_large_as_those_stored(word):
    """Channels of 9 weights, 45 in all: fewer than many a codebook could have centroids."""
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).half()
    stored = quantizer(word).fit(weight)["centroids"].nbytes
    assert quantizer(word).size_bytes(weight.shape, 16) == 45 * quantizer(word).bits // 8 + stored


# Groups.


def test_groups_by_hand():
    """Groups of four and a rest of two in each of two channels, each a grid or a codebook that holds it exactly."""
    weight = torch.tensor([[0.0, 1, 2, 3, 10, 20, 30, 40, 5, 6], [-3.0, -2, -1, 0, 7, 7, 7, 7, 0, 9]])
    parameters = quantizer("mse-2-g4").fit(weight)
    assert parameters["scale"].tolist() == [[1, 10, pytest.approx(1 / 3)], [1, 7, 3]]
    assert parameters["zero_point"].tolist() == [[0, -1, -15], [3, 0, 0]]
    assert quantizer("mse-2-g4").encode(weight, parameters).tolist() == [
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 3],
        [0, 1, 2, 3, 1, 1, 1, 1, 0, 3],
    ]
    torch.testing.assert_close(quantizer("mse-2-g4").apply(weight, parameters), weight)
    parameters = quantizer("kmeans-2-g4").fit(weight)
    expected = [[[0, 1, 2, 3], [10, 20, 30, 40], [5, 6, 6, 6]], [[-3, -2, -1, 0], [7, 7, 7, 7], [0, 9, 9, 9]]]
    assert parameters["centroids"].tolist() == expected  # a rest has fewer: its largest is repeated
    assert torch.equal(quantizer("kmeans-2-g4").apply(weight, parameters), weight)


@pytest.mark.parametrize("algorithm", ["mse", "kmeans"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("group", [5, 16, 39, 40, 64])
def test_groups_are_fitted_by_themselves(algorithm, dtype, group):
    """Each group's tables and weights are those of its columns as a weight of their own."""
    weight = torch.randn(7, 4, 10, generator=torch.Generator().manual_seed(0)).to(dtype) ** 3
    grouped, plain = quantizer(f"{algorithm}-4-g{group}"), quantizer(f"{algorithm}-4")
    parameters = grouped.fit(weight)
    count = math.ceil(40 / group)
    assert all(tensor.shape[:2] == (7, count) for tensor in parameters.values())
    quantized = grouped.apply(weight, parameters).flatten(1)
    for place, columns in enumerate(weight.flatten(1).split(group, dim=1)):
        expected = plain.fit(columns)
        for name, table in expected.items():
            own = parameters[name][:, place]
            own = own[:, : table.shape[1]] if table.ndim == 2 else own
            assert torch.equal(own, table.to(own.dtype)), (place, name)
        own = slice(place * group, place * group + columns.shape[1])
        assert torch.equal(quantized[:, own], plain.apply(columns, expected)), place


def test_groups_take_less_room_for_what_they_gain():
    """Channels whose mean changes along the input: 4 bits in groups are better than 5 without."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(16, 256, generator=generator) + torch.linspace(-1, 1, 4).repeat_interleave(64)
    words = ["mse-4-g64", "mse-5", "kmeans-4-g64", "kmeans-5"]
    errors = registry.fit_with_errors(weight, words)[1]
    sizes = {word: quantizer(word).size_bytes(weight.shape, 16) for word in words}
    assert errors["mse-4-g64"] < 0.5 * errors["mse-5"] and sizes["mse-4-g64"] < sizes["mse-5"]
    assert errors["kmeans-4-g64"] < 0.5 * errors["kmeans-5"]


# Odd weights.


def test_tiny_scales_do_not_become_zero():
    weight = torch.full((2, 8), 6e-8).half()
    weight[0, 0] = 0
    for word, parameters in registry.fit(weight, [*WIDTHS, *GROUPED]).items():
        assert torch.isfinite(quantizer(word).apply(weight, parameters)).all(), word


def test_subnormal_scales_keep_the_offset():
    """A narrow channel far from zero is held at least as well as by its mean."""
    weight = (1e-4 + 1e-6 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))).half()
    mean = weight.float().mean(1, keepdim=True).expand_as(weight)
    for word, parameters in registry.fit(weight, [*WIDTHS, *GROUPED]).items():
        assert quantizer(word).error(weight, parameters) <= 1.5 * uaq.total_error(weight, mean), word


@pytest.mark.parametrize("word", ["mse-4", "mse-4-g3", "kmeans-8", "kmeans-4-g3", "kmeans_all-5"])
@pytest.mark.parametrize("weight", [torch.ones(0, 4), torch.ones(3, 0), torch.tensor([[1.0, torch.nan, 2.0, 3.0]])])
def test_nothing_is_fitted_to_nothing_and_nan(word, weight):
    with pytest.raises(ValueError, match="no quantizer can be fitted"):
        quantizer(word).fit(weight)


def test_threads_change_nothing():
    """These tests have one; most users have more."""
    weight = (torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) ** 3).half()
    fitted = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        fitted.append(registry.fit_with_errors(weight, [*registry.SEARCH_SPACE, "mse-8", "kmeans-5-g16"]))
    for parameters, errors in fitted[1:]:
        assert errors == fitted[0][1]
        for word, tensors in parameters.items():
            assert all(torch.equal(tensor, fitted[0][0][word][key]) for key, tensor in tensors.items()), word


def test_kmeans_optimum_survives_rounding_to_half(weight, fitted):
    stored, exact = fitted["kmeans-4"]["centroids"], kmeans.fit_per_channel(weight)[4]
    error = [uaq.mean_error(weight, kmeans.dequantize(kmeans.assign(weight, c), c)).sum().item() for c in (stored, exact)]
    assert error[0] == pytest.approx(error[1], rel=0.01)


# Parameters that hold more, and what is read from files.


@pytest.mark.parametrize("word", ["mse-4", "kmeans-3", "kmeans_all-4", "mse-4-g16", "kmeans-3-g16"])
def test_own_codes_are_taken(word, weight, fitted):
    own = quantizer(word).encode(weight, fitted[word])
    moved = torch.where(own > 0, own - 1, own)  # none of them the nearest but the lowest
    parameters = fitted[word] | {"codes": moved}
    assert torch.equal(quantizer(word).encode(weight, parameters), moved)
    assert torch.equal(quantizer(word).apply(weight, parameters), quantizer(word).decode(moved, fitted[word]))
    assert quantizer(word).error(weight, parameters) > quantizer(word).error(weight, fitted[word])
    assert quantizer(word).check(parameters, weight.shape)


def test_boundaries_send_weights_elsewhere():
    weight = torch.tensor([[0.0, 0.4, 0.6, 1.0, 2.0, 3.0]])
    for word, lead in (("kmeans-2", (1,)), ("kmeans_all-2", ()), ("kmeans-2-g4", (1, 2))):
        tables = {"centroids": torch.tensor([0.0, 1, 2, 3]).expand(*lead, 4)}
        moved = tables | {"boundaries": torch.tensor([0.3, 1.5, torch.inf]).expand(*lead, 3)}
        assert quantizer(word).encode(weight, tables).tolist() == [[0, 0, 1, 1, 2, 3]]
        assert quantizer(word).encode(weight, moved).tolist() == [[0, 1, 1, 1, 2, 2]]
        assert quantizer(word).apply(weight, moved).tolist() == [[0, 1, 1, 1, 2, 2]]
        assert quantizer(word).check(moved, weight.shape)


@pytest.mark.parametrize("shape", [(24, 40), (24, 10, 2, 2), (24, 3), (1, 1)])
def test_what_is_fitted_is_sound(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    for word, parameters in registry.fit(weight, [*WIDTHS, *GROUPED]).items():
        assert quantizer(word).check(parameters, shape), word
        assert not quantizer(word).check(parameters, (shape[0] + 1, *shape[1:])) or "kmeans_all" in word, word


UNSOUND = {
    "mse-4": [
        {"scale": torch.ones(23).half()},
        {"scale": torch.ones(24, 1).half()},
        {"scale": torch.zeros(24).half()},
        {"scale": torch.full([24], torch.nan)},
        {"scale": torch.ones(24).int()},
        {"zero_point": torch.ones(24)},
        {"scale": None},
        {"centroids": torch.ones(24, 16)},
        {"codes": torch.zeros(24, 39, dtype=torch.uint8)},
        {"codes": torch.zeros(24, 40, dtype=torch.int8)},
        {"codes": torch.full((24, 40), 16, dtype=torch.uint8)},
        {"codes": "text"},
        {"codes": None},
    ],
    "kmeans-3": [
        {"centroids": torch.ones(24, 9)},
        {"centroids": torch.ones(24, 7)},
        {"centroids": torch.ones(8)},
        {"centroids": torch.arange(8.0).flip(0).repeat(24, 1)},
        {"centroids": torch.full((24, 8), torch.inf)},
        {"boundaries": torch.ones(24, 8)},
        {"boundaries": torch.ones(24, 7).int()},
        {"boundaries": torch.arange(7.0).flip(0).repeat(24, 1)},
        {"boundaries": torch.full((24, 7), torch.nan)},
        {"boundaries": None},
        {"codes": torch.full((24, 40), 8, dtype=torch.uint8)},
    ],
    "kmeans_all-3": [{"centroids": torch.ones(24, 8)}, {"centroids": torch.ones(7)}, {"boundaries": torch.ones(8)}],
    "mse-4-g16": [{"scale": torch.ones(24, 2).half()}, {"scale": torch.ones(72).half()}],
    "kmeans-3-g16": [{"centroids": torch.ones(24, 3, 7)}, {"centroids": torch.ones(24, 2, 8)}],
    "kmeans-4-g7": [{"centroids": torch.ones(24, 6, 16)}, {"boundaries": torch.ones(24, 6, 7)}],
}


@pytest.mark.parametrize(("word", "change"), [(word, change) for word, changes in UNSOUND.items() for change in changes])
def test_unsound_parameters_are_told(word, change, weight, fitted):
    assert not quantizer(word).check(fitted[word] | change, weight.shape)


@pytest.mark.parametrize("parameters", [None, [], "text", {}, {"scale": torch.ones(24)}, {1: 2}])
def test_other_things_are_no_parameters(parameters, weight):
    assert not quantizer("mse-4").check(parameters, weight.shape)
