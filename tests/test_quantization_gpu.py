"""The Triton kernels against float64, on a GPU if there is one, or else in Triton's interpreter; and the launcher's choice.

What they compile to is in test_gpu_code.py.
"""

import importlib.util
import sys

import pytest
import torch
from transformers import StaticCache
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conftest import ROOT


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TURING, AMPERE, ADA, HOPPER = (7, 5), (8, 0), (8, 9), (9, 0)


@pytest.fixture(scope="module")
def gpu():
    module = sys.modules[get_class_from_dynamic_module("quantization_gpu.Plan", ROOT).__module__]
    if not module.HAS_TRITON:
        pytest.skip("Triton is not installed.")
    return module


@pytest.fixture
def bfloat16(monkeypatch):
    """Lets Triton's interpreter subtract and multiply bfloat16: it does so with the bits, as if they were integers."""
    if DEVICE == "cuda":
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    subtract, dot = Builder.create_fsub, Builder.create_dot

    def wide(self, handle):
        return self.cast_impl(handle, tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def subtract_wide(self, a, b):
        return self.cast_impl(subtract(self, wide(self, a), wide(self, b)), a.dtype.scalar)

    monkeypatch.setattr(Builder, "create_fsub", subtract_wide)
    monkeypatch.setattr(Builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(self, a), wide(self, b), *rest))


def random_case(bits, out, columns, group_size=None, rows=3, dtype=torch.float32):
    """Returns x, packed weight and scales on the device, and the weight in float64. One column of x has outliers."""
    limit = {4: 7, 8: 127}[bits]
    weight = torch.randint(-limit, limit + 1, (out, columns), dtype=torch.int8)
    scale = (torch.rand((out,) if group_size is None else (out, columns // group_size)) - 0.25).to(dtype)
    x = torch.randn(rows, columns)
    x[:, 3] *= 100
    packed = (weight[:, 0::2] << 4) | (weight[:, 1::2] & 15) if bits == 4 else weight
    exact = weight * (
        scale.double()[:, None] if group_size is None else scale.double().repeat_interleave(group_size, 1)
    )
    return x.to(DEVICE, dtype), packed.to(DEVICE), scale.to(DEVICE), exact


def assert_close(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor):
    """Within float32's error of the sum, and a rounding to the dtype of both the weight and the result, of x @ weight."""
    x = x.double().cpu()
    bound = (1e-6 + torch.finfo(result.dtype).eps) * (x.abs() @ weight.abs())
    assert ((result.double().cpu() - x @ weight).abs() <= bound).all()


# rows, out, columns, group size
CASES = [
    (1, 6, 4224, None),  # columns of a block of vector_kernel and a part of one
    (2, 5, 4224, 128),
    (1, 4, 1024, 32),
    (4, 5, 1024, 64),
    (7, 70, 896, None),  # tensor cores, if any: two programs, and splits of different length
    (16, 33, 256, None),
    (16, 5, 1024, 128),
    (5, 5, 512, 32),
    (3, 5, 512, 64),
    (5, 5, 1056, None),  # no whole tiles of tensor cores
    (3, 5, 688, None),  # rows of INT4 that do not begin at multiples of 16 bytes
    (3, 7, 35, None),  # INT8 alone: an odd number of columns
    (17, 7, 34, None),
    (17, 5, 2112, 64),
    (20, 7, 2112, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [TURING, AMPERE], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_equals_float64(gpu, bfloat16, monkeypatch, bits, capability, dtype):
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    torch.manual_seed(0)
    for rows, out, columns, group_size in CASES:
        if bits == 8 or columns % 2 == 0:
            x, weight, scale, exact = random_case(bits, out, columns, group_size, rows, dtype)
            y = gpu.gpu_linear(x, weight, scale, bits)
            assert y.dtype == dtype and y.shape == (rows, out)
            assert_close(y, x, exact.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_chunks_of_the_weight(gpu, monkeypatch, bits, group_size, dtype):
    """Prefill and the backward pass, with a weight that is dequantized in several parts of different size."""
    out, columns = 38, 640
    monkeypatch.setattr(gpu, "DEQUANTIZED_BYTES", 16 * columns * dtype.itemsize)
    monkeypatch.setattr(gpu, "ALIGNED", 16)
    sizes = []
    dequantize = gpu.dequantize_into
    monkeypatch.setattr(gpu, "dequantize_into", lambda part, *args: sizes.append(part.shape) or dequantize(part, *args))
    torch.manual_seed(0)
    x, weight, scale, exact = random_case(bits, out, columns, group_size, 20, dtype)
    assert_close(gpu.gpu_linear(x, weight, scale, bits), x, exact.T)
    assert [tuple(size) for size in sizes] == [(16, columns), (16, columns), (6, columns)]
    sizes.clear()
    grad = torch.randn(20, out).to(DEVICE, dtype)
    assert_close(gpu.gpu_linear_backward(grad, weight, scale, bits), grad, exact)
    assert [tuple(size) for size in sizes] == [(out, 256), (out, 256), (out, 128)]


def test_transposed_activations_and_sliced_weights(gpu):
    """Inputs that are not contiguous, or begin at an address that vector loads cannot read."""
    x, weight, scale, exact = random_case(8, 40, 256)
    y = gpu.gpu_linear(x.T.contiguous().T, weight, scale, 8)
    assert torch.equal(y, gpu.gpu_linear(x, weight, scale, 8))
    shifted = torch.empty(weight.numel() + 3, dtype=torch.int8, device=DEVICE)[3:].view_as(weight).copy_(weight)
    assert_close(gpu.gpu_linear(x, shifted, scale, 8), x, exact.T)


def test_not_finite_activations(gpu):
    """They spoil their own row, and no other; the tail of the last block does not turn them into NaN elsewhere."""
    for rows in (2, 17):
        x, weight, scale, _ = random_case(4, 40, 4224, rows=rows)
        x[0, -1] = float("inf")
        y = gpu.gpu_linear(x, weight, scale, 4)
        assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1:]).all()


# The launcher's choice. The 6B's matrices; row_bytes of INT4
QKV, DENSE, H_TO_4H, FOUR_H_TO_H = (4608, 2048), (4096, 2048), (27392, 2048), (4096, 6848)


def test_plan_of_the_6b(gpu):
    half, single = torch.float16, torch.float32

    def plan(rows, shape, capability, dtype=half, groups=1, bits=4):
        return gpu.plan_few_rows(rows, *shape, groups, bits, dtype, capability)

    for shape in (QKV, DENSE, FOUR_H_TO_H):
        assert plan(17, shape, HOPPER) is None
        for capability, registers in {TURING: 128, AMPERE: 64, (8, 6): 80, ADA: 80, HOPPER: 64, (12, 0): 80}.items():
            assert plan(1, shape, capability) == gpu.Plan(False, 1, 4, 1, 1, registers)
            assert plan(1, shape, capability, bits=8) == gpu.Plan(False, 1, 1, 1, 1, registers)
    # Tensor cores: half precision on Ampere and newer, for more than one row or for large weights
    assert plan(1, H_TO_4H, HOPPER) == plan(2, H_TO_4H, HOPPER) == gpu.Plan(True, 16, 64, 1, 4, None)
    assert plan(1, H_TO_4H, ADA, groups=32).tensor_cores and not plan(1, H_TO_4H, ADA, groups=64).tensor_cores
    assert plan(16, H_TO_4H, ADA, torch.bfloat16) == gpu.Plan(True, 16, 64, 1, 3, None)
    assert plan(16, H_TO_4H, ADA, groups=32).tensor_cores
    assert plan(8, DENSE, HOPPER).splits == 4
    for choice in (plan(16, DENSE, TURING), plan(16, DENSE, ADA, single), plan(2, (4096, 2064), ADA)):
        assert not choice.tensor_cores
    assert [plan(rows, DENSE, TURING).block_rows for rows in (1, 2, 3, 16)] == [1, 2, 4, 4]
    assert [plan(rows, DENSE, TURING).block_out for rows in (1, 2, 3, 16)] == [4, 1, 1, 1]
    assert plan(16, DENSE, ADA, single) == plan(1, DENSE, ADA, single) == gpu.Plan(False, 1, 4, 1, 1, 80)
    assert plan(1, DENSE, ADA, groups=32).block_out == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles(gpu, bits):
    row_bytes = 4096 * bits // 8
    assert [gpu.tile_bytes(bits, row_bytes, 4096 // group) for group in (4096, 128, 64, 32)] == [
        columns * bits // 8 for columns in (128, 128, 64, 32)
    ]


@pytest.mark.parametrize("row_bytes", [17, 344, 1000])
def test_plan_of_unaligned_rows(gpu, row_bytes):
    assert gpu.plan_few_rows(1, 4096, row_bytes, 1, 4, torch.float16, HOPPER) is None


@pytest.mark.parametrize("rows", [1, 7, 20])
def test_launch_reads_no_data(gpu, monkeypatch, rows):
    """
    The launcher runs on the meta device, where there is no data: nothing waits for the GPU, so a CUDA graph can record it.
    """
    launches = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    for name in ("vector_kernel", "tensor_core_kernel", "dequantize_kernel"):
        monkeypatch.setattr(gpu, name, Recorder())
    x = torch.empty(rows, 4096, dtype=torch.float16, device="meta")
    weight = torch.empty(27392, 2048, dtype=torch.int8, device="meta")
    scale = torch.empty(27392, dtype=torch.float16, device="meta")
    assert gpu.gpu_linear(x, weight, scale, 4).shape == (rows, 27392)
    # 8,192 rows of 8 KB are 64 MB: three whole parts, and one of 2,816 rows
    whole, rest = (8192, 2), (2816, 2)
    assert launches == {1: [(428, 1)], 7: [(428, 1)], 20: [whole, whole, whole, rest]}[rows]


def test_steps_are_one_graph(small_model):
    """Decoding of an INT4 model with a static cache: no graph break, and no operation whose result a CPU must wait for."""
    model = small_model(hidden_size=64, ffn_hidden_size=96).quantize(4)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ids = torch.randint(1, 100, (1, 6))
    cache, reference = (StaticCache(config=model.config, max_cache_len=16) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for each in (cache, reference):
            model(ids, past_key_values=each)
        for position in (6, 7):
            step = dict(position_ids=torch.tensor([[position]]), use_cache=True)
            logits = compiled(ids[:, :1], past_key_values=cache, **step).logits
            expected = model(ids[:, :1], past_key_values=reference, **step).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        # The same, where a break would be counted rather than be an error
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(ids[:, :1], past_key_values=cache, **step)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    assert len(graphs) == 1, "compiled again for the second step"
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("quantized_linear" in name for name in names) == 4 * model.config.num_layers
    assert not [name for name in names if name.endswith(("item", "nonzero", "tolist", "_local_scalar_dense"))]


@pytest.mark.parametrize("version", [None, "3.2.0"])
def test_without_triton(monkeypatch, version):
    """There is no Triton on Windows and macOS, and too old a one beside torch 2.6: plain torch takes over."""
    triton = None if version is None else type(sys)("triton")
    monkeypatch.setitem(sys.modules, "triton", triton)
    if triton:
        triton.__version__, triton.language = version, type(sys)("triton.language")
        monkeypatch.setitem(sys.modules, "triton.language", triton.language)
    spec = importlib.util.spec_from_file_location("without_triton", ROOT / "quantization_gpu.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "without_triton", module)  # dataclasses look for it
    spec.loader.exec_module(module)
    assert not module.HAS_TRITON
