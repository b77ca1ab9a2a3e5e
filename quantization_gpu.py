"""Triton kernels for INT4 and INT8 weights on GPUs.

- Up to 16 rows of activations (decoding, small batches, speculation): one kernel reads each weight once for all rows.
  `vector_kernel` multiplies on the ordinary cores, `tensor_core_kernel` on the tensor cores.
- More rows (prefill, training): `dequantize_kernel` writes a part of the weight in the dtype of the activations, which
  torch then multiplies.

tests/test_gpu_code.py compiles every kernel for every architecture and checks the machine code; no GPU is needed for that.
docs/gpu.md has what was measured.
"""

import functools
from dataclasses import dataclass

import torch


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
# Rows or columns of a weight that are dequantized at a time are a multiple of this. cuBLAS has no fast kernel for others.
ALIGNED = 128

# What a program takes of a row of the weight at a time: 16-byte vectors, one for each thread of 4 warps (vector_kernel),
# columns (tensor_core_kernel), and bytes (dequantize_kernel, 16 for each thread of 2 warps).
BLOCK_VECTORS = 128
TILE_COLUMNS = 128
DEQUANTIZED_BLOCK = 1024

DATA_CENTER = ((8, 0), (9, 0), (10, 0), (10, 3))  # compute capabilities: A100, H100, B200, B300


@dataclass(frozen=True)
class Plan:
    """How to multiply a few rows: what to launch, and with which sizes."""

    tensor_cores: bool
    block_rows: int  # rows of activations that a program multiplies, a power of two
    block_out: int  # rows of the weight that a program takes
    splits: int  # programs that share a row of the weight; their results are added afterwards
    stages: int  # of the pipeline that copies tiles into shared memory
    max_registers: int | None  # per thread, so that half of the warps that an SM can hold fit; None for no limit


@functools.lru_cache
def plan_few_rows(
    rows: int, out: int, row_bytes: int, groups: int, bits: int, dtype: torch.dtype, capability: tuple[int, int]
) -> Plan | None:
    """
    Chooses the kernel and its sizes, such that nothing spills: see tests/test_gpu_code.py.

    Args:
        rows: Rows of activations.
        out: Rows of the weight.
        row_bytes: Bytes of a packed row.
        groups: Scales of a row.
        bits: 4 or 8.
        dtype: Of the activations.
        capability: Compute capability of the GPU.

    Returns:
        None if the weight is to be dequantized: there are more than 16 rows, or the rows of the weight do not begin at
        multiples of 16 bytes, which vector loads need.
    """
    if rows > FEW_ROWS or row_bytes % 16:
        return None
    # Triton uses tensor cores from sm_80 on. One row of small weights and small groups are as fast without.
    is_half = dtype in (torch.float16, torch.bfloat16)
    tile = tile_bytes(bits, row_bytes, groups)
    is_large = out >= 8192 and tile * 8 // bits == TILE_COLUMNS
    if (rows > 1 or is_large) and is_half and row_bytes % tile == 0 and capability >= (8, 0):
        splits = 1 if out >= 8192 else 4  # 4 times 64 programs for 4,096 rows; an H100 has 132 SMs
        stages = 4 if capability in DATA_CENTER else 3  # others have less shared memory, 100 KB
        return Plan(True, 16, 64, splits, stages, None)
    # An SM has 65,536 registers. It holds 32 warps on Turing, 64 on data center cards, 48 on consumer cards since Ampere.
    max_registers = 128 if capability < (8, 0) else 64 if capability in DATA_CENTER else 80
    block_rows = min(1 << (rows - 1).bit_length(), 4) if is_half else 1
    # Rows of the weight share the conversion of activations, which is a part of the work in INT4 alone.
    block_out = 4 if block_rows == 1 and groups == 1 and bits == 4 else 1
    return Plan(False, block_rows, block_out, 1, 1, max_registers)


def tile_bytes(bits: int, row_bytes: int, groups: int) -> int:
    """Returns how many bytes of a row `tensor_core_kernel` takes at a time: at most a group."""
    tile = TILE_COLUMNS * bits // 8
    return tile if groups == 1 else min(tile, row_bytes // groups)


if triton is not None:
    # PTX that converts four bytes of weights to float16 or bfloat16, two at a time. The lowest bits of 2^10 (float16) and 2^7
    # (bfloat16) count in ones: the weight's bits with their sign flipped are put there, and 2^10 or 2^7 and the 8 or 128 that
    # flipping the sign has added are subtracted. Triton's own conversions take about three times as many instructions. Even
    # columns of INT4 are in the high halves of bytes.
    INT4_TO_FLOAT16 = tl.constexpr("""
        {
        .reg .b32 flipped, low, high, sixteenth, even_offset, odd_offset;
        xor.b32 flipped, $4, 0x88888888;
        prmt.b32 low, flipped, 0, 0x4140;
        prmt.b32 high, flipped, 0, 0x4342;
        lop3.b32 $0, low, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $1, high, 0x00f000f0, 0x64006400, 0xea;
        lop3.b32 $2, low, 0x000f000f, 0x64006400, 0xea;
        lop3.b32 $3, high, 0x000f000f, 0x64006400, 0xea;
        mov.b32 sixteenth, 0x2c002c00;
        mov.b32 even_offset, 0xd480d480;
        mov.b32 odd_offset, 0x64086408;
        fma.rn.f16x2 $0, $0, sixteenth, even_offset;
        fma.rn.f16x2 $1, $1, sixteenth, even_offset;
        sub.f16x2 $2, $2, odd_offset;
        sub.f16x2 $3, $3, odd_offset;
        }
    """)
    INT4_TO_BFLOAT16 = tl.constexpr("""
        {
        .reg .b32 flipped, low, high, shifted, one, offset;
        xor.b32 flipped, $4, 0x88888888;
        prmt.b32 low, flipped, 0, 0x4140;
        prmt.b32 high, flipped, 0, 0x4342;
        shr.u32 shifted, low, 4;
        lop3.b32 $0, shifted, 0x000f000f, 0x43004300, 0xea;
        shr.u32 shifted, high, 4;
        lop3.b32 $1, shifted, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $2, low, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 $3, high, 0x000f000f, 0x43004300, 0xea;
        mov.b32 one, 0x3f803f80;
        mov.b32 offset, 0xc308c308;
        fma.rn.bf16x2 $0, $0, one, offset;
        fma.rn.bf16x2 $1, $1, one, offset;
        fma.rn.bf16x2 $2, $2, one, offset;
        fma.rn.bf16x2 $3, $3, one, offset;
        }
    """)
    INT8_TO_FLOAT16 = tl.constexpr("""
        {
        .reg .b32 flipped, offset;
        xor.b32 flipped, $2, 0x80808080;
        prmt.b32 $0, flipped, 0x64646464, 0x4140;
        prmt.b32 $1, flipped, 0x64646464, 0x4342;
        mov.b32 offset, 0x64806480;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        }
    """)
    # bfloat16 has room for seven bits above 2^7; the eighth, the sign, makes the offset -128 or -256.
    INT8_TO_BFLOAT16 = tl.constexpr("""
        {
        .reg .b32 low, high, one, offset;
        prmt.b32 low, $2, 0, 0x4140;
        prmt.b32 high, $2, 0, 0x4342;
        lop3.b32 $0, low, 0x007f007f, 0x43004300, 0xea;
        lop3.b32 $1, high, 0x007f007f, 0x43004300, 0xea;
        mov.b32 one, 0x3f803f80;
        lop3.b32 offset, low, 0x00800080, 0xc300c300, 0xea;
        fma.rn.bf16x2 $0, $0, one, offset;
        lop3.b32 offset, high, 0x00800080, 0xc300c300, 0xea;
        fma.rn.bf16x2 $1, $1, one, offset;
        }
    """)

    @triton.jit
    def words(vectors, SHAPE: tl.constexpr):
        """`[..., 4]` as four tensors, of SHAPE less the last two dimensions, which are 2 and 2. A thread has all four."""
        even, odd = tl.split(vectors.reshape(SHAPE))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth

    @triton.jit
    def load_eight(row, inside, BLOCK: tl.constexpr):
        """Returns the next eight of each of BLOCK places, as eight tensors. A thread loads all of a place, 16 bytes at a time."""
        pointers, inside = row[:, None], inside[:, None]
        if row.dtype.element_ty.primitive_bitwidth == 32:
            four = tl.arange(0, 4)[None, :]
            low = words(tl.load(pointers + four, mask=inside, other=0.0), (BLOCK, 2, 2))
            high = words(tl.load(pointers + 4 + four, mask=inside, other=0.0), (BLOCK, 2, 2))
        else:
            eight = tl.load(pointers + tl.arange(0, 8)[None, :], mask=inside, other=0.0)
            even, odd = tl.split(eight.reshape((BLOCK, 4, 2)))
            even, odd = words(even, (BLOCK, 2, 2)), words(odd, (BLOCK, 2, 2))
            low, high = (even[0], odd[0], even[1], odd[1]), (even[2], odd[2], even[3], odd[3])
        return low + high

    @triton.jit
    def vector_kernel(
        x_ptr, weight_ptr, scale_ptr, y_ptr, rows, out, vectors, groups, columns, exponent,
        BITS: tl.constexpr, GROUP_VECTORS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        Each thread loads 16 bytes, four words of 32 bits, of each of BLOCK_OUT rows of the weight at a time.

        Args:
            x_ptr: `[rows, columns]`, floating point.
            weight_ptr: int32 `[out, 4 * vectors]`.
            scale_ptr: `[out]` or `[out, groups]`.
            y_ptr: `[rows, out]`.
            exponent: The bits of 2^23 in float32. As a constant, it would be loaded again for each weight.
            GROUP_VECTORS: Vectors that share a scale; 0 for a scale per row.
        """
        # Programs that share weights are neighbours: they run at the same time, and only one reads from memory.
        row_blocks = tl.cdiv(rows, BLOCK_ROWS)
        first_row = tl.program_id(0) % row_blocks * BLOCK_ROWS
        n = tl.program_id(0) // row_blocks * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row = tl.minimum(n, out - 1)
        PER_WORD: tl.constexpr = 32 // BITS
        sums = (tl.zeros((BLOCK_OUT, BLOCK), dtype=tl.float32),) * BLOCK_ROWS
        for block in range(0, tl.cdiv(vectors, BLOCK)):
            v = block * BLOCK + tl.arange(0, BLOCK)
            # Beyond the end of the row the activations are zero: any weight will do.
            inside = tl.minimum(v, vectors - 1)
            word = (row.to(tl.int64) * (vectors * 4))[:, None, None] + (inside * 4)[None, :, None]
            packed = tl.load(weight_ptr + word + tl.arange(0, 4)[None, None, :])
            # With the sign flipped, numbers are unsigned, with 8 or 128 added.
            packed = words(packed ^ (-0x77777778 if BITS == 4 else -0x7F7F7F80), (BLOCK_OUT, BLOCK, 2, 2))
            if GROUP_VECTORS > 0:
                scale = tl.load(scale_ptr + row[:, None] * groups + (inside // GROUP_VECTORS)[None, :]).to(tl.float32)
            added = ()
            for m in tl.static_range(BLOCK_ROWS):
                x_row = x_ptr + tl.minimum(first_row + m, rows - 1) * columns + v * (4 * PER_WORD)
                total = sums[m] if GROUP_VECTORS == 0 else tl.zeros((BLOCK_OUT, BLOCK), dtype=tl.float32)
                for eight in tl.static_range(PER_WORD // 2):
                    x = load_eight(x_row + eight * 8, v < vectors, BLOCK)
                    for i in tl.static_range(8):
                        word_bits = packed[eight if BITS == 4 else 2 * eight + i // 4]
                        # Even columns of INT4 are in the high halves of bytes.
                        shift = 4 * (i ^ 1) if BITS == 4 else 8 * (i % 4)
                        if shift >= 16:
                            word_bits = word_bits >> 16
                            shift = shift - 16
                        # The lowest bits of 2^23 count in ones. Where the number's do not begin at the lowest, it is
                        # larger by a power of two, by which x is made smaller: shifting each would take twice as long.
                        unsigned = (word_bits & (((1 << BITS) - 1) << shift)) | exponent
                        weight = unsigned.to(tl.float32, bitcast=True) - (2.0**23 + (1 << (BITS - 1 + shift)))
                        total += weight * (x[i].to(tl.float32) * (1.0 / (1 << shift)))[None, :]
                added = added + (total if GROUP_VECTORS == 0 else sums[m] + total * scale,)
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
    def even_and_odd(packed, dtype: tl.constexpr, PTX: tl.constexpr):
        """The even and the odd columns of INT4, in float16 or bfloat16."""
        if PTX and dtype == tl.float16:
            even, odd = tl.inline_asm_elementwise(
                INT4_TO_FLOAT16, "=r,=r,=r,=r,r", [packed], (tl.float16, tl.float16), True, 4
            )
        elif PTX:
            even, odd = tl.inline_asm_elementwise(
                INT4_TO_BFLOAT16, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), True, 4
            )
        else:
            even, odd = (packed >> 4).to(tl.float32), ((packed << 4).to(tl.int8) >> 4).to(tl.float32)
        return even.to(dtype), odd.to(dtype)

    @triton.jit
    def from_int8(packed, dtype: tl.constexpr, PTX: tl.constexpr):
        if PTX and dtype == tl.float16:
            weight = tl.inline_asm_elementwise(INT8_TO_FLOAT16, "=r,=r,r", [packed], tl.float16, True, 4)
        elif PTX:
            weight = tl.inline_asm_elementwise(INT8_TO_BFLOAT16, "=r,=r,r", [packed], tl.bfloat16, True, 4)
        else:
            weight = packed.to(tl.float32).to(dtype)
        return weight

    @triton.jit
    def tensor_core_kernel(
        x_ptr, weight_ptr, scale_ptr, y_ptr, rows, out, tiles,
        BITS: tl.constexpr, GROUPED: tl.constexpr, PTX: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """
        Each program multiplies up to 16 rows by BLOCK_OUT rows of the weight, over its share of the tiles of columns.

        Args:
            x_ptr: float16 or bfloat16 `[rows, tiles * BLOCK * 8 / BITS]`.
            weight_ptr: int8 `[out, tiles * BLOCK]`.
            scale_ptr: `[out]`, or `[out, tiles]` if GROUPED.
            y_ptr: `[splits, rows, out]`, partial sums.
            PTX: Whether the code is for NVIDIA's GPUs, rather than AMD's or Triton's interpreter.
        """
        COLUMNS: tl.constexpr = BLOCK * 8 // BITS
        n = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        row = tl.minimum(n, out - 1)
        m, k, columns = tl.arange(0, 16), tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
        x_rows = x_ptr + m[:, None] * (tiles * COLUMNS) + columns[None, :]
        weight_rows = weight_ptr + row[None, :].to(tl.int64) * (tiles * BLOCK) + k[:, None]
        split, splits = tl.program_id(1), tl.num_programs(1)
        first, end = tiles * split // splits, tiles * (split + 1) // splits
        sums = tl.zeros((16, BLOCK_OUT), dtype=tl.float32)
        scale_rows = scale_ptr + row * (tiles if GROUPED else 1)
        scale = tl.load(scale_rows + (first if GROUPED else 0))
        for tile in range(first, end):
            packed = tl.load(weight_rows + tile * BLOCK)
            x = tl.load(x_rows + tile * COLUMNS, mask=(m < rows)[:, None], other=0.0)
            start = tl.zeros((16, BLOCK_OUT), dtype=tl.float32) if GROUPED else sums
            if BITS == 4:
                even, odd = even_and_odd(packed, x.dtype, PTX)
                x_even, x_odd = tl.split(x.reshape((16, BLOCK, 2)))
                total = tl.dot(x_odd, odd, tl.dot(x_even, even, start))
            else:
                total = tl.dot(x, from_int8(packed, x.dtype, PTX), start)
            if GROUPED:
                sums += total * scale.to(tl.float32)[None, :]
                # The next one is loaded while the next tile is multiplied: it is too small to be copied with it.
                scale = tl.load(scale_rows + tl.minimum(tile + 1, tiles - 1))
            else:
                sums = total
        if not GROUPED:
            sums *= scale.to(tl.float32)[None, :]
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
    is_nvidia = torch.version.hip is None
    if is_nvidia and plan.max_registers is not None:
        options["maxnreg"] = plan.max_registers
    if plan.tensor_cores:
        tile = tile_bytes(bits, row_bytes, groups)
        options["num_warps"] = min(4, plan.block_out * tile // (16 * 32))  # each thread copies 16 bytes of the weight
        y = x.new_empty(plan.splits, rows, out, dtype=x.dtype if plan.splits == 1 else torch.float32)
        tensor_core_kernel[(triton.cdiv(out, plan.block_out), plan.splits)](
            x, weight, scale, y, rows, out, row_bytes // tile, BITS=bits, GROUPED=groups > 1,
            PTX=is_nvidia and x.device.type != "cpu", BLOCK_OUT=plan.block_out, BLOCK=tile, **options,
        )  # fmt: skip
        return y[0] if plan.splits == 1 else y.sum(0).to(x.dtype)  # in the same order each time
    y = x.new_empty(rows, out)
    vectors = row_bytes // 16
    vector_kernel[(triton.cdiv(rows, plan.block_rows) * triton.cdiv(out, plan.block_out),)](
        x, weight.view(torch.int32), scale, y, rows, out, vectors, groups, columns, 0x4B000000,
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


def dequantized_at_a_time(size: int) -> int:
    """How many rows or columns, of `size` bytes each."""
    return max(1, DEQUANTIZED_BYTES // size // ALIGNED) * ALIGNED


@functools.lru_cache
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
    plan = plan_few_rows(rows, out, row_bytes, groups, bits, x.dtype, capability(x.device))
    with torch.cuda.device_of(x):
        if plan is not None and weight.data_ptr() % 16 == 0:
            return few_rows_linear(x, weight, scale, bits, groups, plan)
        y = x.new_empty(rows, out)
        chunk = dequantized_at_a_time(columns * x.element_size())
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
    # Parts of columns rather than of rows, so that there are no partial sums to round. ALIGNED is a multiple of every group.
    chunk = dequantized_at_a_time(out * grad.element_size())
    buffer = grad.new_empty(out * min(chunk, columns))
    with torch.cuda.device_of(grad):
        for start in range(0, columns, chunk):
            stop = min(start + chunk, columns)
            part = buffer[: out * (stop - start)].view(out, stop - start)
            scale_part = scale if groups == 1 else scale[:, start * groups // columns : stop * groups // columns]
            dequantize_into(part, weight[:, start * bits // 8 : stop * bits // 8], scale_part, bits)
            torch.mm(grad_output, part, out=grad[:, start:stop])
    return grad
