"""Multiplication by quantized weights, by every path, against float64."""

import inspect
import subprocess
import sys
from itertools import count, islice, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantization_cases import all_cases, float_bound, random_case, rounding_bound
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture(scope="module")
def kernels(chatglm):
    return chatglm.kernels


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


@pytest.mark.parametrize("columns", [34, 1000, 1008])
@pytest.mark.parametrize("rows", [1, 5])
def test_plain_torch_reads_no_further_than_its_rows(kernels, columns, rows):
    """torch's INT8 matmul in bfloat16 did where columns are no multiple of 16."""
    for bits in (4, 8):
        x, weight, scale, exact = random_case(kernels, bits, 7, columns, None, rows, torch.bfloat16)
        memory = torch.full((rows * columns + 64,), torch.nan, dtype=x.dtype)
        memory[: rows * columns] = x.flatten()
        y = kernels.torch_linear(memory[: rows * columns].view(rows, columns), weight, scale, bits)
        error = (y.double() - x.double() @ exact.T).abs()
        assert (error <= 2**-7 * float_bound(x, exact)).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_under_autocast(kernels, dtype):
    x, weight, scale, exact = random_case(kernels, 4, 64, 256, rows=20, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.quantized_linear(x, weight, scale, 4, exact=True)
    bound = (1e-5 + (torch.finfo(dtype).eps if dtype == torch.float16 else 0)) * float_bound(x, exact)
    assert y.dtype == dtype and ((y.double() - x.double() @ exact.T).abs() <= bound).all()


# The choice among the CPU's ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bfloat16_path(kernels, dtype):
    """
    Activations, weights and results are rounded to 8 bits each. In the norm this is less than what INT8 in blocks of 32
    rounds, also without outliers.
    """
    torch.manual_seed(0)
    for bits, group_size, rows in product((4, 8), (None, 32), (17, 30)):
        x, weight, scale, exact = random_case(kernels, bits, 1100, 256, group_size, rows, dtype)  # more than a chunk
        y = kernels.torch_linear(x, weight, scale, bits, torch.bfloat16)
        error = (y.double() - x.double() @ exact.T).abs()
        bound = 2**-8 * (2.01 * float_bound(x, exact) + 1.01 * (x.double() @ exact.T).abs())
        assert y.dtype == dtype and (error <= bound + torch.finfo(dtype).eps * y.double().abs()).all()
        x[:, 3] /= 100  # the outlier
        exact_y = x.double() @ exact.T
        y = kernels.torch_linear(x, weight, scale, bits, torch.bfloat16)
        rounded = kernels.cpu_linear(x, weight, scale, bits)
        assert (y.double() - exact_y).norm() < 0.7 * (rounded.double() - exact_y).norm() < 0.01 * exact_y.norm()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bfloat16_path_with_values_that_are_not_finite(kernels, value):
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    x[0, 100] = value
    y = kernels.torch_linear(x, weight, scale, 4, torch.bfloat16)
    assert torch.isfinite(y[1:]).all() and not torch.isfinite(y[0][kernels.unpack_int4(weight)[:, 100] != 0]).any()


def chosen_file(tmp_path):
    (path,) = (tmp_path / "chatglm2").glob("*.json")
    return path


@pytest.mark.parametrize("path", ["compiled", "bfloat16", "float32"])
def test_the_fastest_path_multiplies(kernels, choosing, monkeypatch, path):
    called = []
    for name, function in kernels.CPU_PATHS.items():
        spy = lambda *args, name=name, function=function: (called.append(name), function(*args))[1]  # noqa: E731
        monkeypatch.setitem(kernels.CPU_PATHS, name, spy)
    measured = choosing(path)
    x, weight, scale, exact = random_case(kernels, 4, 70, 256, rows=20)
    for _ in range(2):
        y = kernels.quantized_linear(x, weight, scale, 4)
        error = (y.double() - x.double() @ exact.T).abs()
        assert (error <= 1.001 * rounding_bound(x, exact) + 2**-8 * 3.1 * float_bound(x, exact)).all()
    assert called == [path] * 2 and measured == list(kernels.CPU_PATHS)


def test_a_choice_for_each_kind(kernels, choosing):
    """Bits, group size, dtype, and one, few or many rows; but not for each number of rows or columns."""
    measured = choosing("bfloat16")
    rows = ((1,), (2, 4), (5, 16), (17, 30))
    kinds = list(product((4, 8), (None, 32, 64), (torch.float32, torch.bfloat16), rows))
    for bits, group_size, dtype, rows in kinds:
        for n, columns in product(rows, (256, 512)):
            x, weight, scale, _ = random_case(kernels, bits, 33, columns, group_size, n, dtype)
            kernels.quantized_linear(x, weight, scale, bits)
    assert len(measured) == len(kernels.CPU_PATHS) * len(kinds)


def test_choices_are_kept_for_the_next_process(kernels, choosing, tmp_path, caplog):
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    choosing("float32")
    with caplog.at_level("INFO"):
        assert kernels.cpu_path(x, weight, scale, 4) == "float32"
    assert "many rows: compiled 2000.00 ms, bfloat16 2000.00 ms, float32 1000.00 ms." in caplog.text
    assert kernels.cpu_path(x[:1], weight, scale, 4) == "float32"
    kernels.chosen_paths.clear()
    measured = choosing("bfloat16")
    measured.clear()
    assert kernels.cpu_path(x, weight, scale, 4) == kernels.cpu_path(x[:1], weight, scale, 4) == "float32"
    assert not measured


@pytest.mark.parametrize(
    "damage",
    [
        "cut",
        "list",
        "unknown path",
        "no text for a path",
        "not text",
        "writable for others",
        "none",
        "other torch",
        "threads",
    ],
)
def test_choices_that_are_not_trusted(kernels, choosing, tmp_path, monkeypatch, damage):
    """They are measured again, and written where they can be."""
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    choosing("float32")
    kernels.cpu_path(x, weight, scale, 4)
    file = chosen_file(tmp_path)
    content = file.read_bytes()
    damaged = {
        "cut": content[:-5],
        "list": b"[1]",
        "unknown path": content.replace(b'float32"', b'gpu"'),
        "no text for a path": content.replace(b'"float32"', b'["float32"]'),
        "not text": b"\xff",
    }
    if damage in damaged:
        assert damaged[damage] != content
        file.write_bytes(damaged[damage])
    elif damage == "writable for others":
        file.chmod(0o666)
    elif damage == "none":
        file.unlink()
    elif damage == "other torch":
        monkeypatch.setattr(torch, "__version__", "0.0")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 97)
    kernels.chosen_paths.clear()
    choosing("bfloat16")
    assert kernels.cpu_path(x, weight, scale, 4) == "bfloat16"
    kernels.chosen_paths.clear()
    choosing("compiled").clear()
    assert kernels.cpu_path(x, weight, scale, 4) == "bfloat16"


def test_choices_that_cannot_be_kept(kernels, choosing, tmp_path):
    """Where others can write to the folder, nothing is written; the process goes by what it measured."""
    (tmp_path / "chatglm2").chmod(0o777)
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    measured = choosing("float32")
    for _ in range(2):
        assert kernels.cpu_path(x, weight, scale, 4) == "float32"
    assert len(measured) == 3 and not list((tmp_path / "chatglm2").iterdir())


@pytest.mark.parametrize("compiled, expected", [(1.09, "compiled"), (1.11, "bfloat16")])
def test_ties_go_to_the_compiled_library(kernels, choosing, monkeypatch, compiled, expected):
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    choosing("bfloat16")
    monkeypatch.setattr(kernels, "measure", lambda *_: {"compiled": compiled, "bfloat16": 1.0, "float32": 2.0})
    assert kernels.cpu_path(x, weight, scale, 4) == expected


def test_choices_of_a_busy_machine_are_made_again(kernels, choosing, tmp_path, monkeypatch):
    """Where threads wait for a CPU, each call takes as long as the others' turn, whatever is called."""
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    now, waited = [100.0], count(step=50_000_000)  # nanoseconds
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: now[0]))
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "waits", lambda: {"1": 0, "2": next(waited)})
        measured = choosing("float32")
        for _ in range(3):
            assert kernels.cpu_path(x, weight, scale, 4) == "compiled"
        assert len(measured) == len(kernels.CPU_PATHS) and not list((tmp_path / "chatglm2").iterdir())
        now[0] += 11
        assert kernels.cpu_path(x, weight, scale, 4) == "compiled"
        assert len(measured) == 2 * len(kernels.CPU_PATHS)
    assert kernels.cpu_path(x, weight, scale, 4) == "compiled"
    now[0] += 11
    assert kernels.cpu_path(x, weight, scale, 4) == "float32"
    assert '"float32"' in chosen_file(tmp_path).read_text()


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say who waited")
def test_waits_for_a_cpu_are_seen(kernels):
    """Of a process that shares one CPU with another one."""
    code = f"""
import os, subprocess, sys, time
from pathlib import Path
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
{inspect.getsource(kernels.waits)}
{inspect.getsource(kernels.longest_wait)}
before = waits()
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
end = time.monotonic() + 1
while time.monotonic() < end: pass
other.kill()
print(longest_wait(before))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) > 0.1


def test_small_weights_are_not_measured(kernels, choosing, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED_SIZE", 64 * 256)
    measured = choosing("float32")
    x, weight, scale, _ = random_case(kernels, 8, 63, 256, rows=20)
    assert kernels.cpu_path(x, weight, scale, 8) == "compiled" and not measured
    x, weight, scale, _ = random_case(kernels, 8, 64, 256, rows=20)
    assert kernels.cpu_path(x, weight, scale, 8) == "float32" and measured


def test_forced_path(kernels, choosing, monkeypatch):
    measured = choosing("float32")
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20)
    for path in ("compiled", "bfloat16"):
        monkeypatch.setenv("CHATGLM_CPU_PATH", path)
        assert kernels.cpu_path(x, weight, scale, 4) == path
    monkeypatch.setenv("CHATGLM_CPU_PATH", "fast")
    with pytest.raises(ValueError, match="CHATGLM_CPU_PATH must be one of compiled, bfloat16, float32, got 'fast'"):
        kernels.quantized_linear(x, weight, scale, 4)
    assert not measured


def test_scales_that_the_compiled_library_cannot_read(kernels, choosing):
    x, weight, scale, _ = random_case(kernels, 4, 64, 256, rows=20, dtype=torch.float64)
    measured = choosing("compiled")
    assert kernels.cpu_path(x, weight, scale, 4) == "bfloat16" and "compiled" not in measured


def test_measuring(kernels, monkeypatch):
    """The paths take turns. The least of five calls counts, and the one before them does not, whatever it took."""
    now, called = [0.0], []
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def path(name, *lengths):
        lengths = iter(lengths)

        def call(*arguments):
            called.append((name, arguments))
            now[0] += next(lengths)

        return call

    paths = {"compiled": path("compiled", 1.0, 3.0, 2.0, 5.0, 4.0, 6.0), "float32": path("float32", 9, 8, 7, 8, 9, 9)}
    samples = ((i, 2) for i in count())
    assert kernels.measure(paths, samples) == {"compiled": 2.0, "float32": 7.0}
    assert called == [(("compiled", "float32")[i % 2], (i, 2)) for i in range(12)]


@pytest.mark.parametrize("rows, measured", [(1, 1), (3, 4), (5, 16), (16, 16), (17, 128), (300, 128)])
def test_samples(kernels, rows, measured):
    """As many rows whichever call comes first, and other pieces of the weight in each turn, all of one size."""
    x, weight, scale, _ = random_case(kernels, 4, 2500, 64, rows=rows)
    found = list(islice(kernels.samples(x, weight, scale), 4))
    assert all(torch.equal(y, x[torch.arange(measured) % rows]) for y, _, _ in found)
    for (_, part, part_scale), start in zip(found, (0, 1024, 0, 1024), strict=True):
        assert torch.equal(part, weight[start : start + 1024]) and torch.equal(part_scale, scale[start : start + 1024])
    for out in (33, 1024, 2048):  # of a small weight, all
        _, weight, scale, _ = random_case(kernels, 4, out, 64)
        sizes = {len(part) for _, part, _ in islice(kernels.samples(x, weight, scale), 4)}
        assert sizes == {min(out, 1024)}
