import pytest
import torch

from quant import kmeans, methods, uaq


@pytest.fixture(scope="module")
def weight():
    return (torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) * 0.05).half()


def test_the_six():
    assert list(methods.METHODS) == ["mse-4", "mse-3", "kmeans-4", "kmeans-3", "kmeans_all-4", "kmeans_all-3"]


def test_fit_keeps_the_precision(weight):
    for name, parameters in methods.fit(weight).items():
        quantized = methods.apply(name, weight, parameters)
        assert quantized.dtype == torch.float16 and quantized.shape == weight.shape
        assert parameters.get("scale", parameters.get("centroids")).dtype == torch.float16
        levels = len(torch.unique(quantized)) if "kmeans_all" in name else max(len(torch.unique(row)) for row in quantized)
        assert 2 < levels <= 2 ** methods.METHODS[name].bits


def test_codes_and_weights_agree(weight):
    for name, parameters in methods.fit(weight).items():
        codes = methods.quantize(name, weight, parameters)
        assert codes.dtype == torch.uint8
        assert torch.equal(methods.dequantize(name, codes, parameters), methods.apply(name, weight, parameters))


def test_error_is_the_same_measure_for_all(weight):
    parameters = methods.fit(weight)
    for name in methods.METHODS:
        quantized = methods.apply(name, weight, parameters[name]).double()
        by_hand = sum(((w - q).abs() ** 2.4).mean() for w, q in zip(weight.double(), quantized, strict=True))
        assert methods.error(weight, quantized) == pytest.approx(by_hand.item(), rel=1e-5)


def test_more_bits_and_finer_grain_lower_the_error(weight):
    errors = {n: methods.error(weight, methods.apply(n, weight, p)) for n, p in methods.fit(weight).items()}
    for algorithm in methods.ALGORITHMS:
        assert errors[f"{algorithm}-4"] < errors[f"{algorithm}-3"]
    assert errors["kmeans-4"] < errors["mse-4"] and errors["kmeans-4"] < errors["kmeans_all-4"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("mse-4", 512 + 64), ("mse-3", 384 + 64), ("kmeans-4", 512 + 512), ("kmeans_all-3", 384 + 16)],
)
def test_sizes_by_hand(name, expected):
    assert methods.quantized_size_bytes(name, (16, 64), precision_bits=16) == expected
    assert methods.fp_size_bytes((16, 64), 16) == 2048


def test_tiny_scales_do_not_become_zero():
    weight = torch.full((2, 8), 6e-8).half()
    weight[0, 0] = 0
    for name, parameters in methods.fit(weight).items():
        assert torch.isfinite(methods.apply(name, weight, parameters)).all(), name


def test_subnormal_scales_keep_the_offset():
    """A narrow channel far from zero is held at least as well as by its mean."""
    weight = (1e-4 + 1e-6 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))).half()
    mean = weight.float().mean(1, keepdim=True).expand_as(weight)
    for name, parameters in methods.fit(weight).items():
        quantized = methods.apply(name, weight, parameters)
        assert methods.error(weight, quantized) <= 1.5 * methods.error(weight, mean), name


def test_threads_change_nothing():
    """These tests have one; most users have more."""
    weight = (torch.randn(300, 50, generator=torch.Generator().manual_seed(0)) ** 3).half()
    fitted = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        fitted.append(methods.fit_with_errors(weight))
    for parameters, errors in fitted[1:]:
        assert errors == fitted[0][1]
        for name, tensors in parameters.items():
            assert all(torch.equal(tensor, fitted[0][0][name][key]) for key, tensor in tensors.items()), name


def test_kmeans_optimum_survives_rounding_to_half(weight):
    stored = methods.fit(weight)["kmeans-4"]["centroids"]
    exact = kmeans.fit_per_channel(weight)[4]
    error = [uaq.mean_error(weight, kmeans.dequantize(kmeans.assign(weight, c), c)).sum().item() for c in (stored, exact)]
    assert error[0] == pytest.approx(error[1], rel=0.01)
