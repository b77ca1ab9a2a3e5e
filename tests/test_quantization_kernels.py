"""The products of quantized weights, by every path, against float64; and how the CPU's kernels are compiled."""

import platform
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


IS_X86 = platform.machine() in ("x86_64", "AMD64")
# What the kernels are compiled for; the flags take the place of -march=native.
BUILDS = {
    "native": None,
    "scalar": ["-march=native" if IS_X86 else "-mcpu=native", "-DCHATGLM_SCALAR"],
    "any CPU": [],
    "AVX2": ["-mavx2", "-mfma"],
    "AVX-VNNI": ["-mavx2", "-mfma", "-mavxvnni"],
}
SHAPES = [(64, 256), (70, 1000), (33, 688), (5, 34), (130, 4224)]
ROWS = [1, 2, 3, 7, 16, 17, 30]


@pytest.fixture(scope="module")
def kernels(chatglm):
    return sys.modules[chatglm.modeling.chunked_linear.__module__]


@pytest.fixture
def fresh(kernels):
    """Has the library loaded anew for the test, and again after it."""
    kernels.cpu_library.cache_clear()
    yield kernels
    kernels.cpu_library.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/chatglm2"


def random_case(kernels, bits, out, columns, group_size=None, rows=3, dtype=torch.float32):
    """Returns x, packed weight, scales, and the weight in float64. One channel of x is 100 times the others."""
    limit = {4: 7, 8: 127}[bits]
    quantized = torch.randint(-limit, limit + 1, (out, columns), dtype=torch.int8)
    scale = torch.rand((out,) if group_size is None else (out, columns // group_size)).to(dtype) - 0.25
    x = torch.randn(rows, columns)
    x[:, 3] *= 100
    weight = kernels.pack_int4(quantized) if bits == 4 else quantized
    return x.to(dtype), weight, scale, kernels.dequantize_weight(weight, scale.double(), bits)


def all_cases(kernels):
    torch.manual_seed(0)
    for bits, (out, columns), group_size, rows in product((4, 8), SHAPES, (None, 32, 128), ROWS):
        if group_size is None or columns % group_size == 0:
            yield bits, random_case(kernels, bits, out, columns, group_size, rows)


def rounding_bound(x: torch.Tensor, weight: torch.Tensor, block: int = 32) -> torch.Tensor:
    """The most that INT8 in blocks can change x @ weight.T: half a step of its block for each activation."""
    padding = -x.shape[1] % block
    blocks = torch.nn.functional.pad(x.double().abs(), (0, padding)).unflatten(1, (-1, block))
    step = (blocks.amax(-1, keepdim=True) / 127).expand_as(blocks).flatten(1)[:, : x.shape[1]]
    return step / 2 @ weight.abs().T


def float_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double().abs() @ weight.abs().T


@pytest.mark.parametrize("build", BUILDS)
def test_int8_activations(fresh, monkeypatch, cache, build):
    """No more than rounding in blocks of 32 explains, so that an outlier spoils no more than its block."""
    if build.startswith("AVX") and build.replace("-", "_").lower() not in fresh.cpu_features():
        pytest.skip(f"This CPU has no {build}.")
    if BUILDS[build] is not None:
        flags = fresh.compiler_flags()[:-1] + BUILDS[build]
        monkeypatch.setattr(fresh, "compiler_flags", lambda: flags)
    assert fresh.cpu_library() is not None
    for bits, (x, weight, scale, exact) in all_cases(fresh):
        error = (fresh.quantized_linear(x, weight, scale, bits).double() - x.double() @ exact.T).abs()
        assert (error <= 1.001 * rounding_bound(x, exact) + 1e-5 * float_bound(x, exact)).all()


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


def test_few_and_many_rows_agree(kernels):
    """Decoding and prefill round activations alike: integer sums are exact, so a cache holds what a prompt would."""
    for bits in (4, 8):
        x, weight, scale, exact = random_case(kernels, bits, 130, 4224, rows=20)
        together = kernels.quantized_linear(x, weight, scale, bits)
        singly = torch.cat([kernels.quantized_linear(row[None], weight, scale, bits) for row in x])
        assert ((together - singly).abs() <= 1e-5 * float_bound(x, exact)).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(kernels, rows, value):
    """They must not vanish: the row that has one has no finite result, the others do."""
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=rows + 1)
    x[0, 100] = value
    y = kernels.quantized_linear(x, weight, scale, 4)
    assert not torch.isfinite(y[0]).any() and torch.isfinite(y[1:]).all()


def test_corner_cases(kernels):
    x, weight, scale, exact = random_case(kernels, 8, 64, 256)
    assert kernels.quantized_linear(x[:0], weight, scale, 8).shape == (0, 64)
    assert (kernels.quantized_linear(0 * x, weight, scale, 8) == 0).all()
    tiny = kernels.quantized_linear(torch.full_like(x, 1e-44), weight, scale, 8)
    assert torch.isfinite(tiny).all() and tiny.abs().max() < 1e-37
    y = kernels.quantized_linear(x.T.contiguous().T[None, :, None], weight, scale, 8)
    assert torch.equal(y, kernels.quantized_linear(x, weight, scale, 8)[None, :, None])
    wrapped = torch.full_like(weight, -128)  # in checkpoints that the published code made of bfloat16
    y = kernels.quantized_linear(torch.ones(1, 256), wrapped, torch.ones(64), 8)
    torch.testing.assert_close(y, torch.full((1, 64), -128.0 * 256))


def test_one_openmp(kernels):
    """The kernels use torch's threads: a second runtime's would fight them for the cores."""
    assert kernels.cpu_library() is not None
    if not Path("/proc/self/maps").exists():
        pytest.skip("There is no /proc/self/maps.")
    files = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    # Other wheels (SentencePiece's, scikit-learn's) bring copies for themselves.
    assert len({file for file in files if ".libs/" not in file}) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_wrong_arguments(kernels, bits):
    """C++ reads what it is told to: shapes and dtypes are checked before."""
    x, weight, scale, _ = random_case(kernels, bits, 64, 256)
    for wrong in ((x[:, :-2], weight), (torch.cat((x, x), 1), weight), (x, weight.float()), (x.long(), weight)):
        with pytest.raises(ValueError, match="Cannot multiply"):
            kernels.quantized_linear(*wrong, scale, bits)
    on_meta = kernels.quantized_linear(x.to("meta"), weight.to("meta"), scale.to("meta"), bits)
    assert on_meta.shape == (3, 64) and on_meta.is_meta
    with FakeTensorMode() as mode:
        fake = kernels.quantized_linear(*(mode.from_tensor(t) for t in (x, weight, scale)), bits)
    assert fake.shape == (3, 64)


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


# Compiling


def test_compiled_once(fresh, cache):
    assert fresh.cpu_library() is not None
    (library,) = cache.glob("*.so")
    before = library.stat().st_mtime_ns
    fresh.cpu_library.cache_clear()
    assert fresh.cpu_library() is not None
    assert library.stat().st_mtime_ns == before
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


def test_damaged_library(fresh, cache, monkeypatch, logs):
    assert fresh.cpu_library() is not None
    (library,) = cache.glob("*.so")
    other = cache.parent / "other"
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    (other / "chatglm2").mkdir(parents=True)
    (other / "chatglm2" / library.name).write_bytes(b"not a library")
    fresh.cpu_library.cache_clear()
    assert fresh.cpu_library() is not None
    assert "is damaged, and compiled again" in logs.text


def test_processes_that_start_together(kernels, cache):
    code = (
        "import sys; from transformers.dynamic_module_utils import get_class_from_dynamic_module as get;"
        f"model = get('modeling_chatglm.ChatGLMModel', {str(Path(__file__).parent.parent)!r});"
        "kernels = sys.modules[sys.modules[model.__module__].chunked_linear.__module__];"
        "assert kernels.cpu_library() is not None; print('compiled')"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        output, error = process.communicate()
        assert process.returncode == 0 and "compiled" in output, error
    assert len(list(cache.glob("*.so"))) == 1


def test_compiled_elsewhere(fresh, cache, monkeypatch):
    """A library that is there, in a container image for instance, needs no compiler and no folder to write to."""
    assert fresh.cpu_library() is not None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fresh.tempfile, "TemporaryFile", None)
    fresh.cpu_library.cache_clear()
    assert fresh.cpu_library() is not None


def assert_falls_back(kernels, logs, message: str):
    x, weight, scale, exact = random_case(kernels, 4, 64, 256)
    for _ in range(2):
        y = kernels.quantized_linear(x, weight, scale, 4)
    assert ((y.double() - x.double() @ exact.T).abs() <= 1e-5 * float_bound(x, exact)).all()
    assert logs.text.count(message) == 1


def test_no_compiler(fresh, cache, monkeypatch, logs):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert_falls_back(fresh, logs, "There is no C++ compiler")


def test_compiler_that_is_no_command(fresh, cache, monkeypatch, logs):
    monkeypatch.setenv("CXX", "g++ '")
    assert_falls_back(fresh, logs, "No closing quotation")


def test_compiler_that_fails(fresh, cache, monkeypatch, logs, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho out of cheese >&2\nkill -SEGV $$\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert_falls_back(fresh, logs, "There are no kernels for the CPU")
    assert "out of cheese" in logs.text and not list(cache.glob("*.so"))


def test_compiler_that_hangs(fresh, cache, monkeypatch, logs, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/child\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(fresh, "COMPILE_SECONDS", 1)
    assert_falls_back(fresh, logs, "did not end within 1 s")
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    assert not child.exists() or "zombie" in (child / "status").read_text()


def test_cache_that_cannot_be_written(fresh, monkeypatch, logs, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fresh.cpu_library() is not None
    assert "cannot be written to" in logs.text and "Set XDG_CACHE_HOME" in logs.text
