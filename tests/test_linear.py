"""Linear layers in half precision on the CPU: each way to multiply is right, and one of them is chosen."""

import itertools

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def linear(chatglm):
    return chatglm.linear


def case(rows: int, out: int, columns: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(rows + out + columns)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    return x, (torch.randn(out, columns, generator=generator) * 0.02).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, out, columns", [*itertools.product((1, 2, 3, 4, 5, 17, 40), (1, 37, 1030), (7, 64, 2250))]
)
def test_each_path_against_float64(linear, dtype, rows, out, columns):
    """Products may be rounded to the dtype that a path multiplies in, and the sum to the dtype of x."""
    x, weight = case(rows, out, columns, dtype)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for name, path in linear.half_paths(x, weight).items():
        y = path(x, weight)
        is_bfloat16 = name == "bfloat16" or path is linear.cpu_half_matmul
        in_dtype = torch.bfloat16 if is_bfloat16 else torch.float32
        bound = torch.finfo(dtype).eps * exact.abs() + 2.1 * torch.finfo(in_dtype).eps * size
        if name == "torch":  # how it sums is its own business
            bound = bound + 0.1 * torch.finfo(dtype).eps * size
        assert y.dtype == dtype and ((y.double() - exact).abs() <= bound + 1e-6).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 17])
def test_rows_do_not_disturb_each_other(linear, dtype, rows):
    """NaN and infinity stay in their row, and an outlier of 1,000 times the rest costs the other rows nothing."""
    x, weight = case(rows, 37, 64, dtype)
    others = [row for row in range(rows) if row != rows // 2]
    for value in (float("nan"), float("inf"), 3000.0):
        broken = x.clone()
        broken[rows // 2, 5] = value
        for name, path in linear.half_paths(x, weight).items():
            y = path(broken, weight)
            assert torch.equal(y[others], path(x, weight)[others]), name
            assert y[rows // 2].isfinite().all() == (value == 3000.0), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_path_of_every_number(linear, dtype):
    """All 65,536 values of the dtype, subnormal, infinite and NaN among them."""
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    x = torch.ones(1, 1, dtype=dtype)
    y, expected = linear.cpu_half_linear(x, weight)[0], weight[:, 0].clone()
    if dtype == torch.bfloat16 and linear.has_half_matmul():
        expected[expected.abs() < torch.finfo(dtype).tiny] = 0  # the instruction takes subnormal numbers for 0
    assert torch.equal(y.nan_to_num(0), expected.nan_to_num(0)) and torch.equal(y.isnan(), expected.isnan())
    row = expected[expected.isfinite()][None]
    chosen = torch.zeros(1, row.shape[1], dtype=dtype)
    for i in (0, 1, 17, row.shape[1] - 1):  # the vectors of a long row, and its rest
        assert linear.cpu_half_linear(chosen.index_fill(1, torch.tensor([i]), 1.0), row)[0, 0] == row[0, i]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_path_of_every_number_in_many_rows(linear, dtype):
    if not linear.has_half_matmul():
        pytest.skip("this CPU does not multiply bfloat16")
    weight = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
    y = linear.cpu_half_matmul(torch.ones(17, 1, dtype=dtype), weight)
    assert torch.equal(y.isnan(), weight[:, 0].isnan().expand(17, -1))
    expected = weight[:, 0].bfloat16()
    expected[expected.abs() < torch.finfo(torch.bfloat16).tiny] = 0  # the instruction takes subnormal numbers for 0
    assert torch.equal(y.nan_to_num(0), expected.to(dtype).expand(17, -1).nan_to_num(0))
    x = torch.randn(17, 64).to(dtype)
    x[3, 5], x[4, 63] = torch.nan, torch.inf
    bad = ~linear.cpu_half_matmul(x, torch.ones(50, 64, dtype=dtype)).isfinite()
    assert bad.all(1).tolist() == bad.any(1).tolist() == [i in (3, 4) for i in range(17)]


@pytest.mark.parametrize(
    "path, rows", [("compiled", 1), ("compiled", 40), ("float32", 40), ("bfloat16", 40), ("torch", 40)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_fastest_path_multiplies(linear, choosing, monkeypatch, path, rows, bias):
    if path == "compiled" and rows > linear.FEW_ROWS and not linear.has_half_matmul():
        pytest.skip("this CPU does not multiply bfloat16")
    called = []
    half_paths = linear.half_paths

    def spied_paths(x, weight):
        def spy(name, function):
            return lambda *arguments: (called.append(name), function(*arguments))[1]

        return {name: spy(name, function) for name, function in half_paths(x, weight).items()}

    monkeypatch.setattr(linear, "half_paths", spied_paths)
    measured = choosing(path)
    layer = linear.Linear(64, 48, bias=bias, dtype=torch.float16).requires_grad_(False)
    x = torch.randn(2, rows, 64, dtype=torch.float16) if rows > 1 else torch.randn(1, 1, 64, dtype=torch.float16)
    for _ in range(2):
        y = layer(x)
        expected = nn.Linear.forward(layer, x).float()
        assert (y.float() - expected).norm() < 2**-8 * expected.norm()
    assert called == ([path] * 2 if path != "torch" else []) and path in measured
    assert len(measured) == len(set(measured))  # once


def test_what_is_left_to_torch(linear, choosing, monkeypatch):
    """float32, gradients, tracing, and what does not fit: torch's own errors."""
    monkeypatch.setattr(linear, "half_paths", None)
    layer = linear.Linear(8, 4)
    assert torch.equal(layer(torch.ones(1, 8)), nn.functional.linear(torch.ones(1, 8), layer.weight, layer.bias))
    half = linear.Linear(8, 4, dtype=torch.bfloat16)
    half(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
    assert half.weight.grad is not None
    half.requires_grad_(False)
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    assert torch.jit.trace(half, x, check_trace=False)(x).shape == (1, 4)
    assert half(x[:0]).shape == (0, 4)
    with pytest.raises(RuntimeError):
        half(torch.ones(1, 8))


@pytest.mark.parametrize("rows, columns", itertools.product((1, 40), (4, 7, 16)))
def test_rows_of_another_length_are_torchs_error(linear, choosing, rows, columns):
    choosing("compiled")
    layer = linear.Linear(8, 4, dtype=torch.bfloat16).requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(rows, columns, dtype=torch.bfloat16))


def test_forced_path(linear, choosing, monkeypatch):
    measured = choosing("torch")
    layer = linear.Linear(64, 48, dtype=torch.float16).requires_grad_(False)
    monkeypatch.setenv("CHATGLM_CPU_PATH", "fast")
    with pytest.raises(
        ValueError, match="CHATGLM_CPU_PATH must be one of compiled, bfloat16, float32, torch, got 'fast'"
    ):
        layer(torch.ones(1, 64, dtype=torch.float16))
    monkeypatch.setenv("CHATGLM_CPU_PATH", "float32")
    called = []
    by_chunks = linear.by_chunks
    monkeypatch.setattr(
        linear, "by_chunks", lambda *given, **options: (called.append(options), by_chunks(*given, **options))[1]
    )
    layer(torch.ones(1, 64, dtype=torch.float16))
    assert called == [{"dtype": torch.float32}] and not measured


def test_one_few_and_many_rows_are_measured_apart(linear, choosing):
    measured = choosing("torch")
    layer = linear.Linear(64, 48, dtype=torch.float16).requires_grad_(False)
    numbers = []
    for rows in (1, 2, 4, 5, 16, 17, 200):
        layer(torch.ones(rows, 64, dtype=torch.float16))
        numbers.append(measured.count("torch"))
    assert numbers == [1, 2, 2, 3, 3, 4, 4]


def test_loaded_models_use_the_compiled_path(small_model, linear, choosing, tmp_path):
    """Layers of a model that is being built are torch's, by which other libraries find them."""
    assert not any(isinstance(layer, linear.Linear) for layer in small_model().modules())
    small_model().save_pretrained(tmp_path / "model")
    model = type(small_model()).from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    measured = choosing("compiled")
    with torch.no_grad():
        logits = model(torch.tensor([[5]])).logits
        assert "compiled" in measured
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                assert type(layer) is linear.Linear
                layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight, layer.bias)
        expected = model(torch.tensor([[5]])).logits
    assert (logits - expected).norm() < 0.02 * expected.norm()
