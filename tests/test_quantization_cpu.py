"""The compiled kernels: their results against float64, how they are compiled, and which files are trusted."""

import grp
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quantization_cases import all_cases, float_bound, random_case, rounding_bound
from transformers import DynamicCache


IS_X86 = platform.machine() in ("x86_64", "AMD64")
# What the kernels are compiled for; the flags take the place of -march=native.
BUILDS = {
    "native": None,
    "scalar": ["-march=native" if IS_X86 else "-mcpu=native", "-DCHATGLM_SCALAR"],
    "any CPU": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX-VNNI": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
}


@pytest.fixture(scope="module")
def kernels(chatglm):
    return chatglm.kernels


@pytest.fixture(scope="module")
def cpu(kernels):
    return sys.modules[kernels.cpu_linear.__module__]


@pytest.fixture
def fresh(cpu):
    """Has the library loaded anew for the test, and again after it."""
    cpu.cpu_library.cache_clear()
    yield cpu
    cpu.cpu_library.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/chatglm2"


# Results


@pytest.fixture(params=BUILDS)
def build(request, fresh, monkeypatch, cache):
    """Has the library compiled for less than this CPU."""
    if request.param.startswith("AVX") and request.param.replace("-", "_").lower() not in fresh.cpu_features():
        pytest.skip(f"This CPU has no {request.param}.")
    if BUILDS[request.param] is not None:
        flags = fresh.compiler_flags()[:-1] + BUILDS[request.param]
        monkeypatch.setattr(fresh, "compiler_flags", lambda: flags)
    assert fresh.cpu_library() is not None
    return fresh


def test_each_build(kernels, build):
    """
    Quantized activations: no more error than rounding in blocks of 32 explains, so that an outlier spoils no more than its
    block. All else: no more than that of float32.
    """
    for bits, (x, weight, scale, exact) in all_cases(kernels):
        error = (kernels.quantized_linear(x, weight, scale, bits).double() - x.double() @ exact.T).abs()
        assert (error <= 1.001 * rounding_bound(x, exact) + 1e-5 * float_bound(x, exact)).all()
    for dtype in (torch.float16, torch.bfloat16):
        x, weight = torch.randn(7, 250).to(dtype), torch.randn(37, 250).to(dtype)
        for rows in (x[:1], x[:2], x):
            exact = rows.double() @ weight.double().T
            error = (build.cpu_half_linear(rows, weight).double() - exact).abs()
            assert (error <= 1e-4 + torch.finfo(dtype).eps * exact.abs()).all()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        query, key, value = (torch.randn(1, 2, n, 48).to(dtype) for n in (17, 1100, 1100))
        exact = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), scale=0.2
        )
        error = build.cpu_attention(query, key, value, 0.2).double() - exact
        assert error.abs().max() < 1e-5 + torch.finfo(dtype).eps * exact.abs().max()
    x, weight = torch.randn(3, 250), torch.randn(250)
    torch.testing.assert_close(
        build.cpu_rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (250,), weight, 1e-5)
    )
    torch.testing.assert_close(build.cpu_swiglu(x), torch.nn.functional.silu(x[:, :125]) * x[:, 125:])


@torch.no_grad()
def test_layers_of_each_build(chatglm, build, small_model, monkeypatch):
    """All layers in one call, as `test_layers.py` has it for this CPU."""
    model, steps = small_model(attn_implementation="sdpa", kv_channels=16).quantize(4), []
    decode, calls = chatglm.layers.decode, []
    for decoder in (decode, lambda *args, **kwargs: None):
        spy = lambda *args, decoder=decoder, **kwargs: (y := decoder(*args, **kwargs), calls.append(y is not None))[0]  # noqa: E731
        monkeypatch.setattr(chatglm.layers, "decode", spy)
        cache = DynamicCache(config=model.config)
        model(torch.tensor([[5, 6, 7]]), cache=cache)
        steps.append(model(torch.tensor([[8]]), cache=cache).logits)
    assert calls == [False, True, False, False]
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_is_converted_and_rounded(build, dtype):
    """Subnormal numbers, halves between two numbers, and those beyond the largest among them."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()]
    x = torch.stack((numbers, torch.zeros_like(numbers)), dim=1)[None, None]  # pairs, of which the second adds nothing
    for factor in (1.0, 0.5, 1.37, 1 + 2**-9, 1 + 2**-12, 3e-5, 2.0):
        cos = torch.full(x.shape[1:], factor)
        y = build.cpu_rotate(x, cos, torch.zeros_like(cos))
        assert torch.equal(y, (x.float() * factor).to(dtype)), factor


def test_outputs_of_many_megabytes(kernels, cpu):
    """The system is asked for large pages there."""
    x, weight, scale, exact = random_case(kernels, 8, 40_000, 32, rows=70)
    y = kernels.CPU_PATHS["compiled"](x, weight, scale, 8)
    assert ((y.double() - x.double() @ exact.T).abs() <= 1.001 * rounding_bound(x, exact) + 1e-5).all()
    gate, up = x.repeat(10, 300).chunk(2, dim=1)
    torch.testing.assert_close(cpu.cpu_swiglu(x.repeat(10, 300)), torch.nn.functional.silu(gate) * up)
    if cpu.has_half_matmul():
        x, weight = x.bfloat16(), exact.bfloat16().repeat(2, 1)
        torch.testing.assert_close(cpu.cpu_half_matmul(x, weight), x @ weight.T, rtol=2e-2, atol=2e-2)


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


def test_one_openmp(kernels):
    """The kernels use torch's threads: a second runtime's would fight them for the cores."""
    assert kernels.cpu_library() is not None
    if not Path("/proc/self/maps").exists():
        pytest.skip("There is no /proc/self/maps.")
    files = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    # Other wheels (SentencePiece's, scikit-learn's) bring copies for themselves.
    assert len({file for file in files if ".libs/" not in file}) == 1


# Compiling


@pytest.fixture(scope="module")
def good_library(cpu, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "chatglm_linear.so"
    cpu.compile_library(path)
    return path


@pytest.fixture
def compilations(cpu, good_library, monkeypatch):
    """Has a library copied rather than compiled; returns the list of those copies."""
    made = []

    def run_compiler(command):
        shutil.copyfile(good_library, command[-1])  # with the mode that the umask gives
        made.append(command[-1])

    monkeypatch.setattr(cpu, "run_compiler", run_compiler)
    return made


def test_compiled_once(fresh, cache):
    assert fresh.cpu_library() is not None
    (library,) = cache.glob("*.so")
    before = library.stat().st_mtime_ns
    fresh.cpu_library.cache_clear()
    assert fresh.cpu_library() is not None
    assert library.stat().st_mtime_ns == before
    assert {path.suffix for path in cache.iterdir()} == {".so", ".sha256", ".lock"}


def test_processes_that_start_together(cache):
    code = (
        "import sys; from transformers.dynamic_module_utils import get_class_from_dynamic_module as get;"
        f"model = get('modeling_chatglm.ChatGLMModel', {str(Path(__file__).parent.parent)!r});"
        "kernels = sys.modules[model.__module__.replace('modeling_chatglm', 'quantization_kernels')];"
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
    monkeypatch.setattr(fresh, "FileLock", None)
    fresh.cpu_library.cache_clear()
    assert fresh.cpu_library() is not None


def test_another_cpu_compiles_its_own(cpu, cache, compilations, monkeypatch):
    cpu.load_library(cache)
    monkeypatch.setattr(cpu, "cpu_features", lambda: "flags: fewer")
    cpu.load_library(cache)
    assert len(compilations) == len(list(cache.glob("*.so"))) == 2


def assert_falls_back(kernels, logs, message: str):
    x, weight, scale, exact = random_case(kernels, 4, 64, 256)
    for _ in range(2):
        y = kernels.quantized_linear(x, weight, scale, 4)
    assert ((y.double() - x.double() @ exact.T).abs() <= 1e-5 * float_bound(x, exact)).all()
    assert logs.text.count(message) == 1


def test_no_compiler(kernels, fresh, cache, monkeypatch, logs):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert_falls_back(kernels, logs, "There is no C++ compiler")


def test_compiler_that_is_no_command(kernels, fresh, cache, monkeypatch, logs):
    monkeypatch.setenv("CXX", "g++ '")
    assert_falls_back(kernels, logs, "No closing quotation")


def test_compiler_that_fails(kernels, fresh, cache, monkeypatch, logs, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho out of cheese >&2\nkill -SEGV $$\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert_falls_back(kernels, logs, "There are no compiled kernels for the CPU")
    assert "out of cheese" in logs.text and not list(cache.glob("*.so"))


def test_compiler_that_hangs(kernels, fresh, cache, monkeypatch, logs, tmp_path):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/child\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(fresh, "COMPILE_SECONDS", 1)
    assert_falls_back(kernels, logs, "did not end within 1 s")
    child = Path("/proc", (tmp_path / "child").read_text().strip())
    assert not child.exists() or "zombie" in (child / "status").read_text()


# Trusting


def test_cache_that_cannot_be_written(cpu, compilations, logs, tmp_path):
    (tmp_path / "file").touch()
    assert cpu.load_library(tmp_path / "file/chatglm2").chatglm_linear
    assert "cannot be kept in" in logs.text and "Set XDG_CACHE_HOME" in logs.text


def test_cache_on_a_full_disk(cpu, cache, monkeypatch, logs, tmp_path):
    """The compiler says so, and another folder may have room."""
    compiler = tmp_path / "compiler"
    full = f"*{cache}*) echo 'cannot write: No space left on device'; exit 1"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in {full};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert cpu.load_library(cache).chatglm_linear
    assert "cannot be kept in" in logs.text and "No space left" in logs.text


DAMAGES = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "one page": lambda content: content[:4096],
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "a byte too many": lambda content: content + b"\0",
    "a zeroed page": lambda content: content[:4096] + bytes(4096) + content[8192:],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"not a library",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("is_writable", [True, False])
def test_damaged_library(cpu, cache, compilations, monkeypatch, logs, damage, is_writable):
    """It is compiled again, in a private folder where it cannot be replaced: loading it would kill the process."""
    cpu.load_library(cache)
    (library,) = cache.glob("*.so")
    good = library.read_bytes()
    library.unlink()  # the process has it mapped
    library.write_bytes(DAMAGES[damage](good))
    if not is_writable:

        def read_only(*args, **kwargs):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(cpu, "FileLock", read_only)
    assert cpu.load_library(cache).chatglm_linear
    assert len(compilations) == 2 and "is compiled again: it is damaged" in logs.text
    assert (library.read_bytes() == good) is is_writable
    assert ("cannot be kept in" in logs.text) is not is_writable


@pytest.mark.parametrize("content", [None, b"", b"0 \xff", b"1 e3b0"])
def test_damaged_checksum(cpu, cache, compilations, content):
    cpu.load_library(cache)
    (checksum,) = cache.glob("*.sha256")
    good = checksum.read_bytes()
    checksum.unlink() if content is None else checksum.write_bytes(content)
    assert cpu.load_library(cache).chatglm_linear
    assert len(compilations) == 2 and checksum.read_bytes() == good


def test_synced_before_it_gets_its_name(cpu, cache, compilations, monkeypatch):
    """After a power failure there is the whole library or none."""
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(cpu.os, "fsync", lambda file: (done.append("sync"), sync(file))[1])
    monkeypatch.setattr(cpu.os, "replace", lambda a, b: (done.append(Path(b).suffix), replace(a, b))[1])
    cpu.load_library(cache)
    assert done == ["sync", ".so", "sync", ".sha256"]


def test_lock_that_is_never_released(cpu, cache, compilations, monkeypatch, logs):
    monkeypatch.setattr(cpu, "COMPILE_SECONDS", 0.1)
    cache.mkdir(parents=True)
    cpu.load_library(cache)
    (library,) = cache.glob("*.so")
    library.unlink()
    with cpu.FileLock(f"{library}.lock"):
        assert cpu.load_library(cache).chatglm_linear
    assert "cannot be kept in" in logs.text and not library.exists()


@pytest.fixture
def planted_library(cpu, cache, compilations, tmp_path):
    """A library under the expected name, with its checksum, that writes a file when it is loaded; and that file."""
    elsewhere = tmp_path / "elsewhere"  # one path is loaded once in a process
    cpu.load_library(elsewhere)
    compilations.clear()
    cache.mkdir(parents=True)
    library = cache / next(elsewhere.glob("*.so")).name
    marker, source = tmp_path / "loaded", tmp_path / "planted.cpp"
    source.write_text(
        f"""#include <cstdio>
        __attribute__((constructor)) static void start() {{ fclose(fopen("{marker}", "w")); }}"""
    )
    subprocess.run([*cpu.find_compiler(), "-shared", "-fPIC", source, "-o", library], check=True)
    library.chmod(0o755)
    library.with_suffix(".sha256").write_bytes(cpu.size_and_checksum(library))
    return library, marker


def give_away(path: Path, monkeypatch):
    """Has another user own `path`; or everything, where the tests do not run as root."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        user = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: user)


def test_own_library_is_loaded(cpu, cache, planted_library, compilations):
    library, marker = planted_library
    cpu.load_library(cache)
    assert marker.exists() and not compilations


@pytest.mark.parametrize("place", ["library", "folder", "folder above"])
@pytest.mark.parametrize("how", ["owner", "group", "others"])
def test_library_of_another_user(cpu, cache, planted_library, compilations, monkeypatch, place, how):
    """Nothing is loaded that another user owns, can write to, or can replace."""
    library, marker = planted_library
    path = {"library": library, "folder": cache, "folder above": cache.parent}[place]
    if how == "owner":
        give_away(path, monkeypatch)
    else:
        monkeypatch.setattr(cpu, "is_private_group", lambda gid: False)
        path.chmod(0o775 if how == "group" else 0o757)
    assert cpu.load_library(cache).chatglm_linear
    assert not marker.exists() and len(compilations) == 1


def test_folder_in_a_sticky_one(cpu, cache, compilations):
    """Below /tmp, for instance: others can write there, but not replace what is ours."""
    cache.parent.mkdir()
    cache.parent.chmod(0o1777)
    for _ in range(2):
        assert cpu.load_library(cache).chatglm_linear
    assert len(compilations) == 1
    cache.chmod(0o1777)
    cpu.load_library(cache)
    assert len(compilations) == 2  # in it, others could add files


def test_folder_behind_a_link(cpu, cache, compilations, tmp_path):
    """What the link leads to is what counts."""
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    cache.parent.mkdir()
    cache.symlink_to(real)
    for _ in range(2):
        assert cpu.load_library(cache).chatglm_linear
    assert len(compilations) == 1
    real.chmod(0o777)
    cpu.load_library(cache)
    assert len(compilations) == 2


@pytest.mark.parametrize(
    "name, members, is_private", [("me", [], True), ("me", ["me"], True), ("me", ["you"], False), ("staff", [], False)]
)
def test_private_groups(cpu, cache, compilations, monkeypatch, name, members, is_private):
    """Fedora's files are writable for a group that has the user's name and nobody else in it."""
    monkeypatch.setattr(cpu.pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(cpu.grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
    cache.mkdir(parents=True)
    cache.chmod(0o770)
    for _ in range(2):
        assert cpu.load_library(cache).chatglm_linear
    assert len(compilations) == (1 if is_private else 2)


def test_unknown_group(cpu):
    unknown = max(group.gr_gid for group in grp.getgrall()) + 1
    assert not cpu.is_private_group(unknown)


def test_permissions_under_any_umask(cpu, cache, compilations):
    umask = os.umask(0)
    try:
        cache.parent.mkdir(mode=0o700)
        for _ in range(2):
            cpu.load_library(cache)
    finally:
        os.umask(umask)
    assert len(compilations) == 1 and cache.stat().st_mode & 0o777 == 0o700
