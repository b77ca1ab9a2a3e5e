"""What is compiled for CPUs (cpp_chatglm.py): how, when a compiled library is trusted, and how it is called.

It is compiled at first use, for the machine that it is on, and kept in `~/.cache/chatglm2`.
"""

import ctypes
import errno
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers.utils import logging

from .cpp_chatglm import CPP_SOURCE


try:
    import grp
    import pwd
except ImportError:  # Windows, where nothing is compiled
    grp = pwd = None

logger = logging.get_logger(__name__)

SCALE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in the C++
COMPILE_SECONDS = 60  # it takes a few; beyond this the compiler hangs
NO_SPACE = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]


# Compiling


class CompilerError(OSError):
    """There is no compiler, or it fails: another folder would not help."""


def find_compiler() -> list[str]:
    """Returns the command of a C++ compiler: `$CXX`, or else g++ or clang++."""
    for command in (os.environ.get("CXX"), "g++", "clang++"):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            return words
    raise CompilerError("There is no C++ compiler. Install g++ or clang++, or set CXX to another one.")


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC"]
    # With g++ and on macOS, OpenMP is the one that torch has loaded: two would compete for the cores.
    if platform.system() == "Darwin":
        library_path = Path(torch.__file__).parent / "lib"
        flags += ["-Xclang", "-fopenmp", f"-L{library_path}", "-lomp", f"-Wl,-rpath,{library_path}"]
    else:
        flags += ["-fopenmp"]
    return flags + ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]


def cpu_features() -> str:
    """Returns the CPU's name and instruction sets: a library compiled on another machine may crash on this one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {line.partition(":")[0].strip().lower(): line for line in reversed(lines)}  # of the first core
    told = [fields[name] for name in ("model name", "cpu part", "flags", "features") if name in fields]
    return "\n".join(told) or platform.processor()


def run_compiler(command: list[str]):
    """Raises `CompilerError` if the compiler fails, or takes longer than `COMPILE_SECONDS`; `OSError` without space to write."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:  # Ctrl-C too
        os.killpg(process.pid, signal.SIGKILL)  # the compiler proper is a child of the command
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise CompilerError(f"{command[0]} did not end within {COMPILE_SECONDS} s") from None
        raise
    if process.returncode:
        output = output.decode(errors="replace")[-2000:]
        error = OSError if any(reason in output for reason in NO_SPACE) else CompilerError
        raise error(f"{command[0]} failed with {process.returncode}:\n{output}")


def compile_library(path: Path):
    """Compiles `CPP_SOURCE` to `path`. The library and its checksum are on the disk before they get their names."""
    compiler = find_compiler()
    with tempfile.TemporaryDirectory(dir=path.parent) as build:
        source, library, checksum = (
            Path(build, path.name).with_suffix(suffix) for suffix in (".cpp", ".so", ".sha256")
        )
        source.write_text(CPP_SOURCE)
        run_compiler([*compiler, *compiler_flags(), str(source), "-o", str(library)])
        library.chmod(0o755)  # whatever the umask is
        checksum.write_bytes(size_and_checksum(library))
        for file in (library, checksum):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            os.replace(file, path.with_name(file.name))


# Trusting. What is loaded runs as this user, and a library with a part missing kills the process.


def size_and_checksum(file: Path) -> bytes:
    content = file.read_bytes()
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}\n".encode()


def is_private_group(gid: int) -> bool:
    """Whether this user is the group's only member: distributions with a group per user let it write by default."""
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return group.gr_name == user and set(group.gr_mem) <= {user}


def check_ours(path: Path):
    """Raises `PermissionError` if anybody but this user and root can have written to `path`, or can replace it."""
    for place in (path, *path.parents):
        info = place.stat()
        if info.st_uid not in (os.geteuid(), 0):
            raise PermissionError(f"{place} belongs to the user {info.st_uid}")
        writable = info.st_mode & stat.S_IWOTH or (info.st_mode & stat.S_IWGRP and not is_private_group(info.st_gid))
        # In a sticky folder, /tmp for instance, only its owner can replace a file.
        if writable and (place == path or not info.st_mode & stat.S_ISVTX):
            raise PermissionError(f"other users can write to {place}")


def is_sound(path: Path) -> bool:
    """Whether the library is there, is ours, and is what was compiled."""
    try:
        check_ours(path)
        if path.with_suffix(".sha256").read_bytes() == size_and_checksum(path):
            return True
        error = "it is damaged"
    except FileNotFoundError:
        return False
    except OSError as problem:
        error = problem
    logger.warning_once(f"{path} is compiled again: {error}.")
    return False


def load_shared(path: Path) -> ctypes.CDLL:
    """Loads the library at `path`, compiled first if need be. Processes that start together wait for one of them."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_ours(path.parent)
    if not is_sound(path):
        with FileLock(f"{path}.lock", timeout=2 * COMPILE_SECONDS):
            if not is_sound(path):
                compile_library(path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "chatglm2").resolve()


def library_name() -> str:
    """Says what the library is made of, and for which CPU."""
    key = "\n".join([CPP_SOURCE, *compiler_flags(), platform.machine(), cpu_features()])
    return f"chatglm_linear-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def load_library(folder: Path) -> ctypes.CDLL:
    """Loads the library from `folder`; or, where that cannot be trusted or written to, compiles one for the process."""
    name = library_name()
    try:
        return load_shared(folder.resolve() / name)
    except CompilerError:
        raise
    except (OSError, NotImplementedError) as error:  # NotImplementedError: file systems without locks
        logger.warning(
            f"Compiled kernels cannot be kept in {folder} ({error}): each process compiles its own. Set XDG_CACHE_HOME to "
            "a folder that only you can write to."
        )
    with tempfile.TemporaryDirectory() as private:
        compile_library(Path(private, name))
        return ctypes.CDLL(str(Path(private, name)))


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """Returns the compiled library; or None, with a warning once, if there can be none."""
    try:
        if os.name != "posix":
            raise OSError(f"The kernels are made for Linux and macOS, not for {platform.system()}.")
        library = load_library(cache_folder())
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.chatglm_linear.argtypes = [pointer] * 3 + [number, pointer] + [size] * 4 + [number] * 2
        library.chatglm_half_linear.argtypes = [pointer] * 2 + [number, pointer] + [size] * 3 + [number]
        library.chatglm_half_matmul.argtypes = [pointer] * 2 + [number, pointer] + [size] * 3 + [number]
        library.chatglm_attention.argtypes = [pointer] * 3 + [number, pointer] + [size] * 6 + [ctypes.c_float, number]
        library.chatglm_rms_norm.argtypes = [pointer, number] + [pointer] * 2 + [size] * 2 + [ctypes.c_float, number]
        library.chatglm_rotate.argtypes = [pointer, number] + [pointer] * 3 + [size] * 8 + [number]
        library.chatglm_swiglu.argtypes = [pointer, number, pointer] + [size] * 2 + [number]
        for function in (library.chatglm_rms_norm, library.chatglm_rotate, library.chatglm_swiglu):
            function.restype = None
        library.chatglm_layers.argtypes = [pointer, size] + [pointer] * 3 + [size] * 2 + [number] * 2
        library.chatglm_dequantize.argtypes = [pointer] * 2 + [number, pointer, number] + [size] * 3 + [number] * 2
        return library
    # RuntimeError: no home; ValueError: CXX with an open quotation
    except (OSError, RuntimeError, ValueError) as error:
        logger.warning(
            "There are no compiled kernels for the CPU. Plain torch takes their place, for INT4 and INT8 several times slower. "
            f"{error}"
        )
        return None


# Which path was fastest, by name of the kind of multiplication; for this CPU, code, torch and number of threads


def choices_path() -> Path:
    stem = library_name().removesuffix(".so")
    return cache_folder() / f"{stem}-torch-{torch.__version__}-{torch.get_num_threads()}-threads.json"


def kept_choices() -> dict[str, str]:
    """Returns what `keep_choices` wrote; nothing if the file is missing, damaged or not ours."""
    try:
        path = choices_path()
        check_ours(path)
        choices = json.loads(path.read_text())
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home
        return {}
    return {kind: path for kind, path in choices.items() if isinstance(path, str)} if isinstance(choices, dict) else {}


def keep_choices(choices: dict[str, str]):
    """Writes the choices for the next process, if there is a folder for them."""
    try:
        path = choices_path()
        check_ours(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder, path.name)
            new.write_text(json.dumps(choices, indent=1))
            os.replace(new, path)
    except (OSError, RuntimeError) as error:
        logger.info(f"What was measured is not kept: {error}")


# Calling. Shapes and dtypes must have been checked: C++ reads what it is told to.


def as_float32(x: torch.Tensor) -> torch.Tensor:
    """`x.float().contiguous()`. For one token, the two calls would take as long as what they are called for."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()


def cpu_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """`x @ weight.T` for x `[rows, in]` by the compiled library, with activations in INT8 and sums in float32."""
    dtype, (rows, columns), out = x.dtype, x.shape, weight.shape[0]
    x, weight, scale = as_float32(x), weight.contiguous(), scale.contiguous()
    output = torch.empty(rows, out)
    failed = cpu_library().chatglm_linear(
        x.data_ptr(), weight.data_ptr(), scale.data_ptr(), SCALE_TYPES[scale.dtype], output.data_ptr(),
        rows, out, columns, scale.numel() // out, bits, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to multiply {rows} rows. Pass fewer at a time (prefill_chunk_size).")
    return output.to(dtype)


def cpu_half_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` for a few rows of x, `[rows, in]`, both in the same half precision, with sums in float32."""
    (rows, columns), out = x.shape, weight.shape[0]
    x, weight, output = x.contiguous(), weight.contiguous(), torch.empty(rows, out)
    failed = cpu_library().chatglm_half_linear(
        x.data_ptr(), weight.data_ptr(), SCALE_TYPES[weight.dtype], output.data_ptr(), rows, out, columns,
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to multiply {rows} rows.")
    return output.to(x.dtype)


def has_half_matmul() -> bool:
    """Whether there is `cpu_half_matmul`, which takes a CPU that multiplies bfloat16."""
    library = cpu_library()
    return library is not None and bool(library.chatglm_has_half_matmul())


def cpu_half_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    `x @ weight.T` for many rows of x, `[rows, in]`, both in the same half precision, with products of bfloat16 and sums in
    float32.
    """
    x, weight, output = x.contiguous(), weight.contiguous(), x.new_empty(x.shape[0], weight.shape[0])
    failed = cpu_library().chatglm_half_matmul(
        x.data_ptr(), weight.data_ptr(), SCALE_TYPES[x.dtype], output.data_ptr(), *output.shape, x.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to multiply {len(x)} rows. Pass fewer at a time (prefill_chunk_size).")
    return output


def cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """
    Attention to all of `key` and `value`, `[batch, kv_heads, length, head_dim]`, in the dtype of `query`, `[batch, kv_heads,
    heads, head_dim]`; sums are in float32. Both must have the strides of key, in which one sequence follows the other, and
    head_dim must be a multiple of 16, at most 256.
    """
    dtype, (batch, kv_heads, heads, columns), length = query.dtype, query.shape, key.shape[2]
    query, output = as_float32(query), torch.empty(query.shape)
    failed = cpu_library().chatglm_attention(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), SCALE_TYPES[key.dtype], output.data_ptr(),
        batch * kv_heads, heads, length, columns, key.stride(1), key.stride(2), scaling, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to attend to {length} tokens.")
    return output.to(dtype)


def cpu_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS normalization of x, `[..., columns]`, computed in float32."""
    x, weight, columns = x.contiguous(), as_float32(weight), x.shape[-1]
    output = torch.empty_like(x)
    cpu_library().chatglm_rms_norm(
        x.data_ptr(), SCALE_TYPES[x.dtype], weight.data_ptr(), output.data_ptr(), x.numel() // columns, columns, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def cpu_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary position embedding, computed in float32: x `[batch, heads, length, columns]`, cos and sin `[batch or 1, length,
    columns]`, the sine of the first column of each pair negated.
    """
    x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), as_float32(cos), as_float32(sin)
    output = x.new_empty(x.shape)
    cpu_library().chatglm_rotate(
        x.data_ptr(), SCALE_TYPES[x.dtype], cos.data_ptr(), sin.data_ptr(), output.data_ptr(), *x.shape, *x.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, torch.get_num_threads(),
    )  # fmt: skip
    return output


def cpu_swiglu(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for x `[..., 2 * columns]`, gate and up, computed in float32."""
    x, columns = x.contiguous(), x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], columns)
    cpu_library().chatglm_swiglu(
        x.data_ptr(), SCALE_TYPES[x.dtype], output.data_ptr(), x.numel() // x.shape[-1], columns,
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def cpu_dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight, `[out, in]`, in float32 or bfloat16, by the compiled library, which writes each number once."""
    weight, scale = weight.contiguous(), scale.contiguous()
    out, columns = weight.shape[0], weight.shape[1] * 8 // bits
    output = torch.empty(out, columns, dtype=dtype)
    failed = cpu_library().chatglm_dequantize(
        weight.data_ptr(), scale.data_ptr(), SCALE_TYPES[scale.dtype], output.data_ptr(), SCALE_TYPES[dtype],
        out, columns, scale.numel() // out, bits, torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"Not enough memory to dequantize a weight of {out} rows.")
    return output
