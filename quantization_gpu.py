"""Triton kernels for INT4 and INT8 weights on GPUs.

- Up to 16 rows of activations (decoding, small batches, speculation): one kernel reads each weight once for all rows.
  `vector_kernel` multiplies on the ordinary cores, `tensor_core_kernel` on the tensor cores.
- More rows (prefill, training): `dequantize_kernel` writes a part of the weight in the dtype of the activations, which
  torch then multiplies.

tests/test_gpu_code.py compiles every kernel for every architecture and checks the machine code; no GPU is needed for that.
"""

from dataclasses import dataclass

import torch
from torch import nn


try:
    import triton
    import triton.language as tl

    # Loops that carry tuples need Triton 3.3, which comes with torch 2.7.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        triton = None
except ImportError:
    triton = None

HAS_TRITON = triton is not None
# Up to this many rows, multiplying packed weights directly is faster than dequantizing them first.
FEW_ROWS = 16
# Bytes of a weight that is dequantized at a time. Large enough to fill a GPU: 8,192 of 4,096 columns in half precision.
DEQUANTIZED_BYTES = 1 << 26

# What a program takes of a row of the weight at a time: 16-byte vectors, one for each thread of 4 warps (vector_kernel),
# and bytes (tensor_core_kernel; dequantize_kernel, 16 for each thread of 2 warps).
BLOCK_VECTORS = 128
TILE_BYTES = 64
DEQUANTIZED_BLOCK = 1024


@dataclass(frozen=True)
class Plan:
    """How to multiply a few rows: what to launch, and with which sizes."""

    tensor_cores: bool
    block_rows: int  # rows of activations that a program multiplies, a power of two
    block_out: int  # rows of the weight that a program takes
    splits: int  # programs that share a row of the weight; their results are added afterwards
    stages: int  # of the pipeline that copies tiles into shared memory
    max_registers: int  # per thread, so that half of the warps that an SM can hold fit


def plan_few_rows(
    rows: int, out: int, row_bytes: int, groups: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Plan | None:
    """
    Chooses the kernel and its sizes, such that nothing spills: see tests/test_gpu_code.py.

    Args:
        rows: Rows of activations.
        out: Rows of the weight.
        row_bytes: Bytes of a packed row.
        groups: Scales of a row.
        dtype: Of the activations.
        capability: Compute capability of the GPU.

    Returns:
        None if the weight is to be dequantized: there are more than 16 rows, or the rows of the weight do not begin at
        multiples of 16 bytes, which vector loads need.
    """
    if rows > FEW_ROWS or row_bytes % 16:
        return None
    # An SM has 65,536 registers. It holds 32 warps on Turing, 64 on data center cards, 48 on consumer cards since Ampere.
    if capability < (8, 0):
        max_registers = 128
    elif capability in ((8, 0), (9, 0), (10, 0), (10, 3)):
        max_registers = 64
    else:
        max_registers = 80
    # Triton uses tensor cores from sm_80 on. Up to 4 rows the vector kernel waits for memory, too, and needs fewer launches.
    is_half = dtype in (torch.float16, torch.bfloat16)
    if rows > 4 and is_half and groups == 1 and row_bytes % TILE_BYTES == 0 and capability >= (8, 0):
        splits = 4 if out < 8192 else 1  # 4 times 128 programs for 4,096 rows; an H100 has 132 SMs
        stages = 4 if max_registers == 64 else 3  # consumer cards have less shared memory, 100 KB
        return Plan(True, 16, 32, splits, stages, max_registers)
    block_rows = min(1 << (rows - 1).bit_length(), 16 if max_registers == 128 else 8)
    block_out = 4 if block_rows <= {64: 2, 80: 4, 128: 8}[max_registers] else 2
    # No splits: 4,096 rows of the weight make 1,024 programs, whose 4 warps share the columns.
    return Plan(False, block_rows, block_out, 1, 1, max_registers)


if triton is not None:

    @triton.jit
    def unpacked(packed, shift, BITS: tl.constexpr):
        """
        The BITS above `shift` in float32, of int32 in two's complement whose sign bits were flipped: unsigned, with 8 or
        128 added. The lowest bits of the float32 2^23 count in ones; conversions of integers are several times slower.
        """
        unsigned = ((packed >> shift) & ((1 << BITS) - 1)) | 0x4B000000
        return unsigned.to(tl.float32, bitcast=True) - (2.0**23 + (1 << (BITS - 1)))

    @triton.jit
    def words(vectors, SHAPE: tl.constexpr):
        """`[..., 4]` as four tensors, of SHAPE less the last two dimensions, which are 2 and 2. A thread has all four."""
        even, odd = tl.split(vectors.reshape(SHAPE))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth

    @triton.jit
    def vector_kernel(
        x_ptr, weight_ptr, scale_ptr, y_ptr, rows, out, vectors, groups, columns_per_word,
        BITS: tl.constexpr, GROUP_VECTORS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        Each thread loads 16 bytes, four words of 32 bits, of each of BLOCK_OUT rows of the weight at a time.

        Args:
            x_ptr: float32 `[row_blocks, columns_per_word, blocks, BLOCK_ROWS, 4 * BLOCK]`: columns at the same place in
                their words are neighbours, so that a thread loads those of its four words at once. Padded with zeros.
            weight_ptr: int32 `[out, 4 * vectors]`.
            scale_ptr: `[out]` or `[out, groups]`.
            y_ptr: `[rows, out]`.
            columns_per_word: 8 or 4. No constant, or the compiler unrolls the loop and keeps all activations in registers.
            GROUP_VECTORS: Vectors that share a scale; 0 for a scale per row.
        """
        # Programs that share weights are neighbours: they run at the same time, and only one reads from memory.
        row_blocks = tl.cdiv(rows, BLOCK_ROWS)
        first_row = tl.program_id(0) % row_blocks * BLOCK_ROWS
        n = tl.program_id(0) // row_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row = tl.minimum(n, out - 1)
        lane = tl.arange(0, 4)
        blocks = tl.cdiv(vectors, BLOCK)
        x_ptr += first_row * columns_per_word * blocks * (BLOCK * 4)
        sums = (tl.zeros((BLOCK_OUT, BLOCK), dtype=tl.float32),) * BLOCK_ROWS
        for block in range(0, blocks):
            v = tl.arange(0, BLOCK)
            # Beyond the end of the row the activations are zero: any weight will do.
            inside = tl.minimum(block * BLOCK + v, vectors - 1)
            word = (row.to(tl.int64) * (vectors * 4))[:, None, None] + (inside * 4)[None, :, None] + lane[None, None, :]
            packed = tl.load(weight_ptr + word)
            packed = words(packed ^ (-0x77777778 if BITS == 4 else -0x7F7F7F80), (BLOCK_OUT, BLOCK, 2, 2))
            if GROUP_VECTORS > 0:
                scale = tl.load(scale_ptr + row[:, None] * groups + (inside // GROUP_VECTORS)[None, :]).to(tl.float32)
            for column in range(0, columns_per_word):
                # Even columns of INT4 are in the high halves of bytes.
                shift = 4 * (column ^ 1) if BITS == 4 else 8 * column
                weight = ()
                for i in tl.static_range(4):
                    weight = weight + (unpacked(packed[i], shift, BITS) * (scale if GROUP_VECTORS > 0 else 1.0),)
                x_block = x_ptr + (column * blocks + block) * (BLOCK_ROWS * BLOCK * 4)
                added = ()
                for m in tl.static_range(BLOCK_ROWS):
                    x = words(tl.load(x_block + m * BLOCK * 4 + (v * 4)[:, None] + lane[None, :]), (BLOCK, 2, 2))
                    total = sums[m]
                    for i in tl.static_range(4):
                        total += weight[i] * x[i][None, :]
                    added = added + (total,)
                sums = added
        if GROUP_VECTORS == 0:
            scale = tl.load(scale_ptr + row).to(tl.float32)
        for m in tl.static_range(BLOCK_ROWS):
            if first_row + m < rows:
                y = tl.sum(sums[m], axis=1)
                if GROUP_VECTORS == 0:
                    y *= scale
                tl.store(y_ptr + (first_row + m) * out + n, y.to(y_ptr.dtype.element_ty), mask=n < out)

    @triton.jit
    def unpacked_int4(packed, SHIFT: tl.constexpr, dtype: tl.constexpr):
        """As `unpacked`, of int16 into float16 or bfloat16, whose 2^10 and 2^7 count in ones: fewer registers."""
        unsigned = (packed >> SHIFT) & 15
        if dtype == tl.float16:
            return (unsigned | 0x6400).to(tl.float16, bitcast=True) - 1032.0
        else:
            return (unsigned | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0

    @triton.jit
    def tensor_core_kernel(
        x_ptr, weight_ptr, scale_ptr, y_ptr, rows, out, tiles,
        BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        Each program multiplies up to 16 rows by BLOCK_OUT rows of the weight, over its share of the tiles of columns.

        Args:
            x_ptr: float16 or bfloat16 `[rows, tiles, 8 / BITS, BLOCK]`: the even columns of INT4 before the odd ones.
            weight_ptr: int8 `[out, tiles * BLOCK]`.
            scale_ptr: `[out]`.
            y_ptr: `[splits, rows, out]`, partial sums.
        """
        n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row = tl.minimum(n, out - 1)
        m, k = tl.arange(0, 16), tl.arange(0, BLOCK)
        PER_BYTE: tl.constexpr = 8 // BITS
        x_rows = x_ptr + tl.minimum(m, rows - 1)[:, None] * (tiles * BLOCK * PER_BYTE) + k[None, :]
        weight_rows = weight_ptr + row[None, :].to(tl.int64) * (tiles * BLOCK) + k[:, None]
        split, splits = tl.program_id(1), tl.num_programs(1)
        sums = tl.zeros((16, BLOCK_OUT), dtype=tl.float32)
        for tile in range(tiles * split // splits, tiles * (split + 1) // splits):
            packed = tl.load(weight_rows + tile * BLOCK)
            x = tl.load(x_rows + tile * (BLOCK * PER_BYTE))
            if BITS == 4:
                packed = packed.to(tl.int16) ^ 0x88
                sums = tl.dot(x, unpacked_int4(packed, 4, x.dtype), sums)
                x = tl.load(x_rows + tile * (BLOCK * PER_BYTE) + BLOCK)
                sums = tl.dot(x, unpacked_int4(packed, 0, x.dtype), sums)
            else:
                sums = tl.dot(x, unpacked(packed.to(tl.int32) ^ 0x80, 0, BITS).to(x.dtype), sums)
        sums *= tl.load(scale_ptr + row).to(tl.float32)[None, :]
        y_rows = y_ptr + (split * rows + m[:, None]).to(tl.int64) * out
        tl.store(y_rows + n[None, :], sums.to(y_ptr.dtype.element_ty), mask=(m[:, None] < rows) & (n[None, :] < out))

    @triton.jit
    def dequantize_kernel(
        weight_ptr, scale_ptr, y_ptr, row_bytes, weight_stride, scale_stride,
        BITS: tl.constexpr, GROUP_BYTES: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        Each program dequantizes BLOCK bytes of a row of the weight.

        Args:
            weight_ptr: int8, rows `weight_stride` apart.
            scale_ptr: Rows `scale_stride` apart.
            y_ptr: `[out, row_bytes * 8 / BITS]`.
            GROUP_BYTES: Bytes that share a scale; 0 for a scale per row.
            TAIL: Whether BLOCK does not divide row_bytes.
        """
        row = tl.program_id(0).to(tl.int64)
        start = tl.program_id(1) * BLOCK
        k = start + tl.arange(0, BLOCK)
        if TAIL:
            packed = tl.load(weight_ptr + row * weight_stride + k, mask=k < row_bytes, other=0)
        else:
            packed = tl.load(weight_ptr + row * weight_stride + k)
        if BITS == 4:
            weight = tl.interleave(packed >> 4, (packed << 4).to(tl.int8) >> 4).to(tl.float32)
        else:
            weight = packed.to(tl.float32)
        PER_BYTE: tl.constexpr = 8 // BITS
        if GROUP_BYTES == 0:
            weight *= tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        else:
            group = start // GROUP_BYTES + tl.arange(0, BLOCK // GROUP_BYTES)
            if TAIL:
                scale = tl.load(scale_ptr + row * scale_stride + group, mask=group * GROUP_BYTES < row_bytes, other=0.0)
            else:
                scale = tl.load(scale_ptr + row * scale_stride + group)
            grouped = weight.reshape(BLOCK // GROUP_BYTES, GROUP_BYTES * PER_BYTE) * scale.to(tl.float32)[:, None]
            weight = grouped.reshape(BLOCK * PER_BYTE)
        column = start * PER_BYTE + tl.arange(0, BLOCK * PER_BYTE)
        y = y_ptr + row * (row_bytes * PER_BYTE) + column
        if TAIL:
            tl.store(y, weight.to(y_ptr.dtype.element_ty), mask=column < row_bytes * PER_BYTE)
        else:
            tl.store(y, weight.to(y_ptr.dtype.element_ty))


def few_rows_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, groups: int, plan: Plan
) -> torch.Tensor:
    """`x @ weight.T` for contiguous x `[rows, in]`, at most 16 rows, as planned."""
    (rows, columns), (out, row_bytes) = x.shape, weight.shape
    # Newer releases of Triton fuse multiplications and additions only if asked to.
    options = dict(num_warps=4, num_stages=plan.stages, enable_fp_fusion=True)
    if torch.version.hip is None:  # AMD's backend does not know it
        options["maxnreg"] = plan.max_registers
    if plan.tensor_cores:
        tiles = row_bytes // TILE_BYTES
        if bits == 4:
            x = x.view(rows, tiles, TILE_BYTES, 2).transpose(2, 3).contiguous()
        y = x.new_empty(plan.splits, rows, out, dtype=x.dtype if plan.splits == 1 else torch.float32)
        tensor_core_kernel[(triton.cdiv(out, plan.block_out), plan.splits)](
            x, weight, scale, y, rows, out, tiles, BITS=bits, BLOCK_OUT=plan.block_out, BLOCK=TILE_BYTES, **options
        )
        return y[0] if plan.splits == 1 else y.sum(0).to(x.dtype)  # in the same order each time
    y = x.new_empty(rows, out)
    vectors, per_word = row_bytes // 16, 32 // bits
    blocks = triton.cdiv(vectors, BLOCK_VECTORS)
    row_blocks, words = triton.cdiv(rows, plan.block_rows), BLOCK_VECTORS * 4
    padding = (0, blocks * words * per_word - columns, 0, row_blocks * plan.block_rows - rows)
    if any(padding):
        x = nn.functional.pad(x, padding)
    x = x.view(row_blocks, plan.block_rows, blocks, words, per_word).permute(0, 4, 2, 1, 3)
    x = torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x)  # one kernel that also converts
    vector_kernel[(row_blocks * triton.cdiv(out, plan.block_out),)](
        x, weight.view(torch.int32), scale, y, rows, out, vectors, groups, per_word,
        BITS=bits, GROUP_VECTORS=0 if groups == 1 else vectors // groups,
        BLOCK_ROWS=plan.block_rows, BLOCK_OUT=plan.block_out, BLOCK=BLOCK_VECTORS, **options,
    )  # fmt: skip
    return y


def dequantize_into(buffer: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int):
    """
    Dequantizes on a GPU.

    Args:
        buffer: `[out, in]`, contiguous; what is written, in its dtype.
        weight: int8 `[out, in]`, or packed `[out, in / 2]`; may be a slice of rows and columns.
        scale: `[out]` or `[out, groups]`; may be such a slice.
    """
    (out, row_bytes), groups = weight.shape, scale.numel() // len(scale)
    grid = (out, triton.cdiv(row_bytes, DEQUANTIZED_BLOCK))
    dequantize_kernel[grid](
        weight, scale, buffer, row_bytes, weight.stride(0), scale.stride(0),
        BITS=bits, GROUP_BYTES=0 if groups == 1 else row_bytes // groups,
        TAIL=row_bytes % DEQUANTIZED_BLOCK > 0, BLOCK=DEQUANTIZED_BLOCK, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip


def capability(device: torch.device) -> tuple[int, int]:
    # In Triton's interpreter, on a CPU, any will do.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def gpu_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """
    `x @ weight.T` on a GPU, without rounding the activations.

    Args:
        x: `[rows, in]`, floating point.
        weight: int8 `[out, in]`, or packed `[out, in / 2]` if `bits` is 4.
        scale: `[out]`, or `[out, groups]`.

    Returns:
        `[rows, out]`, in the dtype of `x`.
    """
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.contiguous()
    (rows, columns), (out, row_bytes) = x.shape, weight.shape
    groups = scale.numel() // out
    plan = plan_few_rows(rows, out, row_bytes, groups, x.dtype, capability(x.device))
    with torch.cuda.device_of(x):
        if plan is not None and weight.data_ptr() % 16 == 0:
            return few_rows_linear(x, weight, scale, bits, groups, plan)
        y = x.new_empty(rows, out)
        chunk = max(1, DEQUANTIZED_BYTES // (columns * x.element_size()))
        buffer = x.new_empty(min(chunk, out), columns)
        for start in range(0, out, chunk):
            rows_of_chunk = slice(start, min(start + chunk, out))
            part = buffer[: rows_of_chunk.stop - start]
            dequantize_into(part, weight[rows_of_chunk], scale[rows_of_chunk], bits)
            torch.mm(x, part.T, out=y[:, rows_of_chunk])
    return y


def gpu_linear_backward(
    grad_output: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int
) -> torch.Tensor:
    """
    The gradient of `gpu_linear` for x: `grad_output @ weight`, with a bounded part of the weight dequantized at a time.

    Args:
        grad_output: `[rows, out]`, floating point.
        weight, scale, bits: As for `gpu_linear`.

    Returns:
        `[rows, in]`, in the dtype of `grad_output`.
    """
    weight, scale = weight.contiguous(), scale.contiguous().view(len(weight), -1)
    out, columns = weight.shape[0], weight.shape[1] * 8 // bits
    groups = scale.shape[1]
    grad = grad_output.new_empty(len(grad_output), columns)
    # Parts of columns rather than of rows, so that there are no partial sums to round. 128 is a multiple of every group.
    chunk = max(128, DEQUANTIZED_BYTES // (out * grad.element_size()) // 128 * 128)
    buffer = grad.new_empty(out * min(chunk, columns))
    with torch.cuda.device_of(grad):
        for start in range(0, columns, chunk):
            stop = min(start + chunk, columns)
            part = buffer[: out * (stop - start)].view(out, stop - start)
            scale_part = scale if groups == 1 else scale[:, start * groups // columns : stop * groups // columns]
            dequantize_into(part, weight[:, start * bits // 8 : stop * bits // 8], scale_part, bits)
            torch.mm(grad_output, part, out=grad[:, start:stop])
    return grad
