"""Multiplication by quantized weights, by every path, against float64."""

import sys
from itertools import product

import pytest
import torch
from quantization_cases import all_cases, float_bound, random_case, rounding_bound
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(scope="module")
def kernels(chatglm):
    return sys.modules[sys.modules[chatglm.modeling.quantize.__module__].quantized_linear.__module__]


def test_dequantize(kernels):
    for bits, (_, weight, scale, exact) in all_cases(kernels):
        assert torch.equal(kernels.dequantize_weight(weight, scale, bits), exact.float())


def test_exact_activations(kernels):
    for bits, (x, weight, scale, exact) in all_cases(kernels):
        error = (kernels.quantized_linear(x, weight, scale, bits, exact=True).double() - x.double() @ exact.T).abs()
        assert (error <= 1e-5 * float_bound(x, exact)).all()


def test_plain_torch(kernels):
    for bits, (x, weight, scale, exact) in all_cases(kernels):
        error = (kernels.torch_linear(x, weight, scale, bits).double() - x.double() @ exact.T).abs()
        assert (error <= 1e-5 * float_bound(x, exact)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("rows", [2, 20])
def test_dtypes(kernels, dtype, group_size, rows):
    """Scales and activations in other dtypes, the output in that of the activations."""
    for bits in (4, 8):
        x, weight, scale, exact = random_case(kernels, bits, 70, 256, group_size, rows, dtype)
        for y in (
            kernels.quantized_linear(x, weight, scale, bits),
            kernels.quantized_linear(x, weight, scale, bits, exact=True),
            kernels.torch_linear(x, weight, scale, bits),
        ):
            assert y.dtype == dtype
            bound = 1.001 * rounding_bound(x, exact) + 2 * torch.finfo(dtype).eps * float_bound(x, exact)
            assert ((y.double() - x.double() @ exact.T).abs() <= bound + 1e-5).all()


def test_zeros_and_tiny_activations(kernels):
    x, weight, scale, _ = random_case(kernels, 8, 64, 256)
    assert (kernels.quantized_linear(0 * x, weight, scale, 8) == 0).all()
    tiny = kernels.quantized_linear(torch.full_like(x, 1e-44), weight, scale, 8)
    assert torch.isfinite(tiny).all() and tiny.abs().max() < 1e-37


def test_layout_of_activations(kernels):
    """Strides and leading dimensions change nothing."""
    x, weight, scale, _ = random_case(kernels, 8, 64, 256)
    y = kernels.quantized_linear(x.T.contiguous().T[None, :, None], weight, scale, 8)
    assert torch.equal(y, kernels.quantized_linear(x, weight, scale, 8)[None, :, None])
    assert torch.equal(kernels.quantized_linear(x[0], weight, scale, 8), y[0, 0, 0])


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("bits", [4, 8])
def test_least_value(kernels, bits, rows):
    """-8 and -128, which this package never writes, but the published code made of bfloat16."""
    weight = torch.full((64, 256), -128 if bits == 8 else -8, dtype=torch.int8)
    packed = kernels.pack_int4(weight) if bits == 4 else weight
    x = torch.ones(rows, 256)
    expected = torch.full((rows, 64), 256.0 * weight[0, 0].item())
    torch.testing.assert_close(kernels.quantized_linear(x, packed, torch.ones(64), bits), expected)
    torch.testing.assert_close(kernels.torch_linear(x, packed, torch.ones(64), bits), expected)
    assert torch.equal(kernels.dequantize_weight(packed, torch.ones(64), bits), weight.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_wrong_activations(kernels, bits):
    """C++ reads what it is told to: shapes and dtypes are checked before."""
    x, weight, scale, _ = random_case(kernels, bits, 64, 256)
    for wrong in (x[:, :-2], torch.cat((x, x), 1), x.long()):
        with pytest.raises(ValueError, match="Cannot multiply"):
            kernels.quantized_linear(wrong, weight, scale, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_wrong_weights(kernels, bits):
    x, weight, scale, _ = random_case(kernels, bits, 64, 256)
    for wrong in (weight.float(), weight[0], weight[None], weight.view(torch.uint8)):
        with pytest.raises(ValueError, match="must be int8 with 2 dimensions"):
            kernels.quantized_linear(x, wrong, scale, bits)
    with pytest.raises(ValueError, match="A weight of 2 bits"):
        kernels.quantized_linear(x, weight, scale, 2)


# For a weight of [37, 96]: too few rows or columns of scales, too many, groups of 48, 16 and 96 that no kernel reads
@pytest.mark.parametrize("shape", [(5, 3), (36,), (38,), (37, 2), (37, 6), (37, 4), (37, 0), (), (37, 1, 1), (3, 37)])
def test_scales_that_fit_no_weight(kernels, shape):
    x, weight, scale, _ = random_case(kernels, 4, 37, 96)
    for call in (
        lambda scale: kernels.quantized_linear(x, weight, scale, 4),
        lambda scale: kernels.quantized_linear(x, weight, scale, 4, exact=True),
        lambda scale: kernels.dequantize_weight(weight, scale, 4),
    ):
        with pytest.raises(ValueError, match=r"do not fit a weight \[37, 96\]"):
            call(torch.ones(shape))
        with pytest.raises(ValueError, match="torch.int64 do not fit"):
            call(torch.ones(37, dtype=torch.long))


@pytest.mark.parametrize("group_size", [None, 32, 64, 128])
def test_scales_that_fit(kernels, group_size):
    """Also one a row with a second dimension."""
    x, weight, scale, exact = random_case(kernels, 4, 37, 384, group_size)
    scale = scale[:, None] if group_size is None else scale
    error = (kernels.quantized_linear(x, weight, scale, 4).double() - x.double() @ exact.T).abs()
    assert (error <= 1.001 * rounding_bound(x, exact) + 1e-5 * float_bound(x, exact)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows, out, columns", [(0, 64, 256), (3, 0, 256), (3, 64, 0), (0, 0, 0)])
def test_zero_rows_and_columns(kernels, bits, rows, out, columns):
    x, weight, scale = torch.ones(rows, columns), torch.ones(out, columns * bits // 8).to(torch.int8), torch.ones(out)
    for exact in (False, True):
        y = kernels.quantized_linear(x, weight, scale, bits, exact)
        assert y.shape == (rows, out) and not y.any()
    assert kernels.dequantize_weight(weight, scale, bits).shape == (out, columns)
    assert kernels.quantized_linear_backward(torch.ones(rows, out), weight, scale, bits).shape == (rows, columns)


def test_no_data(kernels):
    """Tensors on the meta device, and those of a tracer, get the right shape."""
    x, weight, scale, _ = random_case(kernels, 4, 64, 256)
    on_meta = kernels.quantized_linear(x.to("meta"), weight.to("meta"), scale.to("meta"), 4)
    assert on_meta.shape == (3, 64) and on_meta.is_meta
    with FakeTensorMode() as mode:
        fake = kernels.quantized_linear(*(mode.from_tensor(t) for t in (x, weight, scale)), 4)
    assert fake.shape == (3, 64)


@pytest.mark.parametrize("i", range(3))
def test_tensors_on_several_devices(kernels, i):
    """No pointer of another device reaches C++; and torch's own INT8 matmul would give anything."""
    tensors = list(random_case(kernels, 8, 64, 256)[:3])
    tensors[i] = tensors[i].to("meta")
    with pytest.raises(ValueError, match="on meta"):
        kernels.quantized_linear(*tensors, 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [None, 32])
def test_float16_stays_finite(kernels, bits, group_size):
    """The scale is rounded: 7 times that of 65504 is more than float16 can hold."""
    scale = torch.tensor(65504 / (2 ** (bits - 1) - 1)).half().expand((64,) if group_size is None else (64, 2))
    values = torch.full((64, 64), 2 ** (bits - 1) - 1, dtype=torch.int8)
    values[:, ::2] *= -1
    weight = kernels.pack_int4(values) if bits == 4 else values
    assert torch.equal(kernels.dequantize_weight(weight, scale, bits), values.sign() * torch.tensor(65504).half())


def test_trace(kernels):
    x, weight, scale, _ = random_case(kernels, 4, 64, 256)
    traced = torch.jit.trace(lambda x: kernels.quantized_linear(x, weight, scale, 4), x)
    assert torch.equal(traced(2 * x), kernels.quantized_linear(2 * x, weight, scale, 4))


def test_subnormal_scales(kernels):
    """Of float16, also where torch flushes float32's subnormal numbers to zero."""
    scale = torch.tensor([3e-5, -6e-8, 1e-3, 0.0], dtype=torch.float16)
    weight = torch.ones(4, 64, dtype=torch.int8)
    torch.set_flush_denormal(True)
    try:
        y = kernels.quantized_linear(torch.ones(1, 64), weight, scale, 8, exact=True)
    finally:
        torch.set_flush_denormal(False)
    torch.testing.assert_close(y[0], 64 * scale.float())


def test_exact_under_autocast(kernels):
    x, weight, scale, exact = random_case(kernels, 4, 64, 256, rows=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.quantized_linear(x, weight, scale, 4, exact=True)
    assert ((y.double() - x.double() @ exact.T).abs() <= 1e-5 * float_bound(x, exact)).all()


# Triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton(kernels, dtype):
    """On a GPU, or else in Triton's interpreter, which cannot multiply bfloat16."""
    if kernels.triton is None:
        pytest.skip("Triton is not installed.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for bits, (out, columns), group_size, rows in product((4, 8), [(70, 1024), (33, 688)], (None, 32, 128), (1, 3, 20)):
        if group_size is None or columns % group_size == 0:
            x, weight, scale, exact = random_case(kernels, bits, out, columns, group_size, rows, dtype)
            y = kernels.triton_linear(x.to(device), weight.to(device), scale.to(device), bits).cpu()
            bound = (1e-6 + torch.finfo(dtype).eps) * float_bound(x, exact)
            assert y.dtype == dtype and ((y.double() - x.double() @ exact.T).abs() <= bound).all()
