"""The machine code of the Triton kernels, which needs no GPU: Triton compiles for any architecture, and has NVIDIA's tools.

Compiled is what the launcher launches for the matrices of ChatGLM2-6B, as Triton would specialize it. Run as a script, this
file prints what it found, as JSON: in a process of its own, since in the tests' own Triton interprets rather than compiles.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class SM:
    """What a streaming multiprocessor has (CUDA C++ Programming Guide, compute capabilities; 65,536 registers each)."""

    warps: int
    blocks: int
    shared_kb: int
    shared_kb_reserved: int = 1  # for each block, since sm_80


ARCHITECTURES = {
    75: SM(32, 16, 64, 0),  # T4, RTX 20, GTX 16
    80: SM(64, 32, 164),  # A100
    86: SM(48, 16, 100),  # RTX 30
    89: SM(48, 24, 100),  # RTX 40
    90: SM(64, 32, 228),  # H100
    100: SM(64, 32, 228),  # B200
    120: SM(48, 24, 100),  # RTX 50
}

# [out, in]: query_key_value, dense, dense_h_to_4h, dense_4h_to_h
LAYER = [(4608, 4096), (4096, 4096), (27392, 4096), (4096, 13696)]
HEAD = (65024, 4096)  # in INT8 with quantize_embeddings

# bits, group size, dtype, rows of activations, matrices. Left out is what compiles to the same: groups of 64, between the
# others, and bfloat16 where float16 differs in no load.
CASES = [
    *[(4, None, "float16", rows, LAYER) for rows in (1, 2, 4, 8, 16, 17)],
    *[(8, None, "float16", rows, [*LAYER, HEAD]) for rows in (1, 4, 16, 17)],
    *[(4, 128, "float16", rows, LAYER) for rows in (1, 4, 8, 16, 17)],
    *[(bits, 32, "float16", rows, LAYER[3:]) for bits in (4, 8) for rows in (1, 16, 17)],
    *[(4, None, "bfloat16", rows, LAYER[2:]) for rows in (1, 8, 17)],
    *[(8, None, "bfloat16", rows, LAYER[3:]) for rows in (16, 17)],
    *[(4, None, "float32", rows, LAYER[3:]) for rows in (1, 8, 16, 17)],
]


def launches(gpu, capability: tuple[int, int]) -> set[tuple]:
    """Returns what the launcher launches in all cases, each once: kernel, signature, constants, alignment and options."""
    import torch
    from triton.runtime.jit import JITFunction

    found = set()

    def record(kernel, args, kwargs):
        options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
        constants = {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        signature, aligned = {}, []
        for name, value in zip(kernel.arg_names, args):
            if isinstance(value, torch.Tensor):
                types = {torch.int8: "i8", torch.int32: "i32", torch.float16: "fp16", torch.bfloat16: "bf16"}
                signature[name] = "*" + types.get(value.dtype, "fp32")
                aligned.append(name)
            elif value == 1:
                constants[name] = 1  # so does Triton
            else:
                signature[name] = "i32"
                aligned += [name] * (value % 16 == 0)
        items = (tuple(sorted(part.items())) for part in (signature, constants, options))
        found.add((kernel.__name__, *items, tuple(aligned)))

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: record(self.kernel, args, kwargs)

    kernels = {name: value for name, value in vars(gpu).items() if isinstance(value, JITFunction)}
    try:
        for name, kernel in kernels.items():
            if name.endswith("_kernel"):
                setattr(gpu, name, Recorder(kernel))
        gpu.capability = lambda device: capability
        for bits, group_size, dtype, rows, shapes in CASES:
            dtype = getattr(torch, dtype)
            for out, columns in shapes:
                x = torch.empty(rows, columns, dtype=dtype, device="meta")
                weight = torch.empty(out, columns * bits // 8, dtype=torch.int8, device="meta")
                scales = (out,) if group_size is None else (out, columns // group_size)
                scale = torch.empty(scales, dtype=dtype, device="meta")
                gpu.gpu_linear(x, weight, scale, bits)
                if rows == 17:
                    gpu.gpu_linear_backward(x.new_empty(rows, out), weight, scale, bits)
    finally:
        vars(gpu).update(kernels)
    return found


def compile_launch(gpu, launch: tuple, architecture: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, signature, constants, options, aligned = launch
    kernel, signature, constants, options = getattr(gpu, name), dict(signature), dict(constants), dict(options)
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    places = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    attributes = {places[argument]: [["tt.divisibility", 16]] for argument in aligned}
    source = ASTSource(kernel, types, {places[key]: value for key, value in constants.items()}, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)
    return {
        "kernel": name,
        "architecture": architecture,
        "constants": constants,
        "signature": signature,
        "warps": options.get("num_warps", 4),
        "stages": options.get("num_stages", 1),
        "registers": resources["REG"],
        "spilled": resources["STACK"] + resources["LOCAL"],
        "shared": compiled.metadata.shared,
        # Bytes that each instruction moves in a thread
        "loads": transfers("ld", ptx),
        "loads in loops": [transfers("ld", body) for body in loops(ptx)],
        "copies": [int(size, 0) for size in copies],
        "stores": transfers("st", ptx),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "fma": len(re.findall(r"\bfma\.rn\.f32\b", ptx)) + 2 * len(re.findall(r"\bfma\.rn\.f32x2\b", ptx)),
        "converted integers": len(re.findall(r"\bcvt\.rn\.f\d+\.[su]\d+", ptx)),
    }


def transfers(instruction: str, ptx: str) -> list[int]:
    found = re.findall(rf"\b{instruction}\.global(?:\.\w+)*?(\.v\d)?\.b(\d+)", ptx)
    return [int(vector[2:] or 1) * int(bits) // 8 for vector, bits in found]


def loops(ptx: str) -> list[str]:
    """The code from each label to the last branch back to it."""
    labels = {match[1]: match.end() for match in re.finditer(r"^(\$\w+):", ptx, flags=re.M)}
    ends = {}
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx):
        if labels.get(branch[1], len(ptx)) < branch.start():
            ends[branch[1]] = branch.start()
    return [ptx[labels[label] : end] for label, end in ends.items()]


def compile_all() -> list[dict]:
    sys.path.insert(0, str(ROOT))
    import quantization_gpu as gpu

    return [
        compile_launch(gpu, launch, architecture)
        for architecture in ARCHITECTURES
        for launch in sorted(launches(gpu, divmod(architecture, 10)))
    ]


if __name__ == "__main__":
    print(json.dumps(compile_all()))
    sys.exit()


@pytest.fixture(scope="module")
def code() -> list[dict]:
    triton = pytest.importorskip("triton")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("This Triton comes without NVIDIA's tools.")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def of(code: list[dict], kernel: str) -> list[dict]:
    found = [one for one in code if one["kernel"] == kernel]
    expected = ARCHITECTURES.keys() - ({75} if kernel == "tensor_core_kernel" else set())
    assert {one["architecture"] for one in found} == expected
    return found


def resident_warps(one: dict) -> int:
    """Warps of this kernel that an SM can hold at once."""
    sm = ARCHITECTURES[one["architecture"]]
    registers_of_warp = -(-one["registers"] * 32 // 256) * 256  # they are allocated by 256
    blocks = min(sm.blocks, sm.warps // one["warps"], 65536 // registers_of_warp // one["warps"])
    shared = one["shared"] + sm.shared_kb_reserved * 1024
    return one["warps"] * (min(blocks, sm.shared_kb * 1024 // shared) if shared else blocks)


@pytest.mark.timeout(900)
def test_no_spills(code):
    assert [one for one in code if one["spilled"]] == []


def test_half_of_the_warps_fit(code):
    """Warps hide the time that memory takes, except where loads are copies in the background."""
    warps = {architecture: sm.warps for architecture, sm in ARCHITECTURES.items()}
    for one in code:
        assert one["kernel"] == "tensor_core_kernel" or 2 * resident_warps(one) >= warps[one["architecture"]], one


def test_copies_in_flight(code):
    """
    At least 16 KB of weights for each SM: what memory gives it within a microsecond is 14 KB on an A100, 11 KB on an RTX 5090
    and less on most cards. (More registers, and so fewer warps, took 0.56 of the time on an H200.)
    """
    for one in of(code, "tensor_core_kernel"):
        constants, blocks = one["constants"], resident_warps(one) // one["warps"]
        assert blocks * (one["stages"] - 1) * constants["BLOCK_OUT"] * constants["BLOCK"] >= 16 * 1024, one


def test_few_rows_load_whole_vectors(code):
    """16 bytes a thread, weights and activations. Scales: at most one for each 16 bytes of the weight."""
    for one in of(code, "vector_kernel"):
        (loads,) = one["loads in loops"]
        scales = [size for size in loads if size != 16]
        assert len(scales) <= (one["constants"]["BLOCK_OUT"] if one["constants"]["GROUP_VECTORS"] else 0), one
    for one in of(code, "tensor_core_kernel"):
        constants = one["constants"]
        columns = constants["BLOCK"] * 8 // constants["BITS"]
        assert 16 in one["copies"] and one["mma"], one
        assert set(one["copies"]) <= ({8, 16} if columns == 32 else {16}), one  # 32 columns of 16 rows are little
        (loads,) = one["loads in loops"]
        scales = [size for size in loads if size != 16]
        assert len(scales) <= (4 if one["constants"]["GROUPED"] else 0), one


def test_dequantization_loads_and_stores_whole_vectors(code):
    for one in of(code, "dequantize_kernel"):
        assert sorted(one["loads"]) in ([2, 16], [4, 16]), one  # a scale, and 16 bytes of the weight
        assert set(one["stores"]) == {16}, one


def test_arithmetic_of_few_rows(code):
    """A multiply-add for each weight and row, and none of the slow instructions that convert integers."""
    for one in of(code, "vector_kernel"):
        constants = one["constants"]
        weights = 16 * 8 // constants["BITS"] * constants["BLOCK_OUT"]  # of a thread
        assert one["fma"] >= weights * constants["BLOCK_ROWS"], one
    assert not [one for one in code if one["kernel"] != "dequantize_kernel" and one["converted integers"]]
