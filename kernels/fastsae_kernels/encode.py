"""Encoder: pre_acts = (x - b_dec) W_enc + b_enc, and the maximum of every group of 32 latents.

The one dense product of a step. Its epilogue adds the bias, rounds once to the stored dtype and takes group
maxima of what it stored: batch * d_sae / 32 numbers by which the selections skip all but the few groups that hold
active latents, so that pre_acts is never read as a whole again. Bound: compute, 2 * batch * d_in * d_sae FLOPs;
the store of 2 * batch * d_sae bytes runs beside it. The rival, "library", is the vendor's product and one
reading pass for the maxima: it costs 184 / d_in of the product's time more at an H200's rates, so it is taken
for wide inputs, where the vendor's product is hard to beat.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels import _cpp
from fastsae_kernels._launch import (
    FLOATS,
    INTERPRET,
    backend,
    cdiv,
    check,
    jit,
    launch,
    shared_bytes,
    tl,
)
from fastsae_kernels._op import differentiable, op
from fastsae_kernels.matmul import by_onednn, linear_into, packed

GROUP = 32  # latents per group: 64 bytes of bf16, two sectors
LIBRARY_FROM_D_IN = 2048  # E: the extra read is below 9% of the product from here on; not measured on a GPU
WIDE_ROWS = 128  # of half precision that are widened at once
CHUNK_ROWS = 512  # rows of one product on a CPU: its block of pre_acts is still in the cache for the maxima

Variant = Literal["auto", "fused", "library"]


class Tile(NamedTuple):
    """Block sizes of the product, [batch, d_sae, d_in], warps and stages."""

    b: int
    n: int
    d: int
    num_warps: int
    num_stages: int


# By the operands' width, the largest first. Where rows are not aligned, loads go element by element through registers, which
# the large tiles lack.
TILES = {
    2: (Tile(128, 256, 64, 8, 3), Tile(128, 256, 32, 8, 3), Tile(128, 128, 32, 8, 3)),
    4: (Tile(128, 128, 32, 8, 4), Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 2)),
}
UNALIGNED_TILES = {2: Tile(128, 128, 32, 8, 2), 4: Tile(128, 64, 32, 8, 2)}
INTERPRETED_TILE = Tile(16, 64, 16, 4, 1)


def _tile(device: torch.device, itemsize: int, d_in: int) -> Tile:
    """The first whose stages fit into shared memory: of one program on a multiprocessor with 227 KB (wgmma), else of two."""
    if INTERPRET:
        return INTERPRETED_TILE
    if d_in % 16:
        return UNALIGNED_TILES[itemsize]
    limit = shared_bytes(device)
    limit = limit if limit > 200_000 else limit // 2
    return next(t for t in TILES[itemsize] if t.num_stages * (t.b + t.n) * t.d * itemsize <= limit)


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _encode_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    out_ptr,
    gmax_ptr,
    batch,
    d_in,
    d_sae,
    n_groups,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_D: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUPER: tl.constexpr,
):
    # Programs in one super-row share their tiles of x through L2 while W_enc streams by.
    pid, n_b, n_n = tl.program_id(0), tl.cdiv(batch, BLOCK_B), tl.cdiv(d_sae, BLOCK_N)
    first = pid // (SUPER * n_n) * SUPER
    height = tl.minimum(n_b - first, SUPER)
    row0 = ((first + pid % (SUPER * n_n) % height) * BLOCK_B).to(tl.int64)
    col0 = (pid % (SUPER * n_n) // height * BLOCK_N).to(tl.int64)
    row = tl.minimum(tl.arange(0, BLOCK_B), batch - 1 - row0).to(
        tl.int32
    )  # the last tile repeats its last row
    col = tl.minimum(tl.arange(0, BLOCK_N), d_sae - 1 - col0).to(tl.int32)
    depth = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + row0 * d_in + (row[:, None] * d_in + depth[None, :])
    w_ptrs = w_ptr + col0 * d_in + (col[None, :] * d_in + depth[:, None])

    acc = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for d in range(0, d_in, BLOCK_D):
        if EVEN_D:
            x, w = tl.load(x_ptrs), tl.load(w_ptrs)  # [BLOCK_B, BLOCK_D], [BLOCK_D, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=depth[None, :] < d_in - d, other=0.0)
            w = tl.load(w_ptrs, mask=depth[:, None] < d_in - d, other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_D
        w_ptrs += BLOCK_D

    acc += tl.load(b_ptr + col0 + col).to(tl.float32)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = acc.to(out_ptr.dtype.element_ty)
    row, col = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_N)
    inside_b, inside_n = row < batch - row0, col < d_sae - col0
    if WIDE:
        row = row.to(tl.int64)  # a tile of rows has 2^31 elements
    tl.store(
        out_ptr + row0 * d_sae + col0 + (row[:, None] * d_sae + col[None, :]),
        out,
        mask=inside_b[:, None] & inside_n[None, :],
    )
    stored = tl.where(inside_n[None, :], out.to(tl.float32), float("-inf"))
    top = tl.reduce(tl.reshape(stored, (BLOCK_B, BLOCK_N // GROUP, GROUP)), 2, _larger)
    group = tl.arange(0, BLOCK_N // GROUP)
    tl.store(
        gmax_ptr + row0 * n_groups + col0 // GROUP + (row[:, None] * n_groups + group[None, :]),
        top.to(out_ptr.dtype.element_ty),
        mask=inside_b[:, None] & (group < n_groups - col0 // GROUP)[None, :],
    )


@jit
def _group_max_kernel(pre_ptr, gmax_ptr, d_sae, n_groups, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    col = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pre = tl.load(pre_ptr + row * d_sae + col, mask=col < d_sae, other=float("-inf")).to(tl.float32)
    top = tl.reduce(pre, 1, _larger)
    tl.store(gmax_ptr + row * n_groups + group, top.to(gmax_ptr.dtype.element_ty), mask=group < n_groups)


def encode_ref(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None, relu: bool = False
) -> tuple[Tensor, Tensor]:
    centred = x if b_dec is None else x - b_dec
    pre_acts = centred @ W_enc + b_enc
    if relu:
        pre_acts = pre_acts.relu()
    return pre_acts, group_max_ref(pre_acts).detach()


def group_max_ref(pre_acts: Tensor) -> Tensor:
    padding = -pre_acts.shape[1] % GROUP
    if padding:
        pre_acts = torch.nn.functional.pad(pre_acts, (0, padding), value=float("-inf"))
    return pre_acts.view(len(pre_acts), pre_acts.shape[1] // GROUP, GROUP).amax(-1)


def group_max_torch(pre_acts: Tensor, group_max: Tensor | None = None) -> Tensor:
    """Chunks of rows, half precision by way of fp32: on a CPU the maximum over 32 neighbours takes 5 times as long in bf16."""
    if group_max is None:
        group_max = pre_acts.new_empty(len(pre_acts), cdiv(pre_acts.shape[1], GROUP))
    half = pre_acts.element_size() == 2
    size = max(min(WIDE_ROWS if half else CHUNK_ROWS, len(pre_acts)), 1)
    wide = pre_acts.new_empty(size, pre_acts.shape[1], dtype=torch.float32) if half else None
    for rows, out in zip(pre_acts.split(size), group_max.split(size), strict=True):
        out.copy_(group_max_ref(rows if wide is None else wide[: len(rows)].copy_(rows)))
    return group_max


def group_max_triton(pre_acts: Tensor) -> Tensor:
    """One read of pre_acts."""
    batch, d_sae = pre_acts.shape
    n_groups = cdiv(d_sae, GROUP)
    group_max = pre_acts.new_empty(batch, n_groups)
    block = 4 if INTERPRET else 64  # interpreted reductions take time per element
    launch(
        _group_max_kernel,
        (batch, cdiv(n_groups, block)),
        pre_ptr=pre_acts,
        gmax_ptr=group_max,
        d_sae=d_sae,
        n_groups=n_groups,
        GROUP=GROUP,
        BLOCK_G=block,
    )
    return group_max


def group_max_cpp(pre_acts: Tensor, group_max: Tensor) -> None:
    _cpp.call("group_max", _cpp.is_half(pre_acts), pre_acts, *pre_acts.shape, group_max)


def _encode_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, relu: bool, out_dtype: torch.dtype, variant: str
) -> tuple[Tensor, Tensor]:
    (batch, d_in), d_sae = x.shape, W_enc.shape[1]
    if variant == "auto":
        # fp32 without TF32 has no tensor cores, and there the vendor's product is ahead by far
        exact = x.dtype == torch.float32 and _dot_precision(x) == "ieee"
        same = b_enc.dtype == x.dtype  # else "library" would round the bias
        variant = "library" if same and (exact or d_in >= LIBRARY_FROM_D_IN) else "fused"
    if variant == "library" and out_dtype == x.dtype:
        pre_acts = torch.addmm(b_enc.to(x.dtype), x, W_enc)
        if relu:
            pre_acts.relu_()
        return pre_acts, group_max_triton(pre_acts)
    tile = _tile(x.device, x.element_size(), d_in)
    n_groups = cdiv(d_sae, GROUP)
    pre_acts = x.new_empty(batch, d_sae, dtype=out_dtype)
    group_max = x.new_empty(batch, n_groups, dtype=out_dtype)
    launch(
        _encode_kernel,
        (cdiv(batch, tile.b) * cdiv(d_sae, tile.n),),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        x_ptr=x,
        w_ptr=W_enc.T,
        b_ptr=b_enc,
        out_ptr=pre_acts,
        gmax_ptr=group_max,
        batch=batch,
        d_in=d_in,
        d_sae=d_sae,
        n_groups=n_groups,
        RELU=relu,
        PRECISION=_dot_precision(x),
        UPCAST=INTERPRET and x.dtype == torch.bfloat16,
        EVEN_D=d_in % tile.d == 0,
        WIDE=tile.b * d_sae >= 2**31,
        GROUP=GROUP,
        BLOCK_B=tile.b,
        BLOCK_N=tile.n,
        BLOCK_D=tile.d,
        SUPER=8,
    )
    return pre_acts, group_max


def _dot_precision(x: Tensor) -> str:
    """fp32 products in TF32 where the user has allowed it to torch's own; Triton's default would be TF32 always."""
    tf32 = x.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def operands(W_enc: Tensor, b_enc: Tensor, out_dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor]:
    """W_enc and b_enc as the plain torch form multiplies `batch` rows by them: fp32 where the CPU has no units for W_enc's dtype, or where its products,
    rounded to that, are not what is asked for; W_enc latent-major and maybe packed where oneDNN's products are the faster ones.
    """
    half = W_enc.element_size() == 2
    slow = half and not (has_fast_products(W_enc) and out_dtype == W_enc.dtype)
    dtype = torch.float32 if slow else W_enc.dtype
    W = W_enc.to(dtype)
    return packed(W.T, batch) if by_onednn(W) else W, b_enc.to(dtype)


def encode_torch(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    relu: bool,
    pre_acts: Tensor,
    group_max: Tensor | None,
) -> None:
    """Fills pre_acts, and group maxima where they are wanted; W and b are `operands`.

    Row chunks, so that the maxima are taken from the cache.
    """
    (batch, d_sae), out_dtype = pre_acts.shape, pre_acts.dtype
    in_cpp = backend(pre_acts) == "cpp"
    block = None if W.dtype == out_dtype else x.new_empty(min(batch, CHUNK_ROWS), d_sae, dtype=W.dtype)
    step = CHUNK_ROWS if block is not None or group_max is not None else max(batch, 1)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        target = pre_acts[rows]
        product = target if block is None else block[: len(target)]
        operand = x[rows].to(W.dtype)
        if by_onednn(W):
            linear_into(product, operand, W, b)
        else:
            torch.addmm(b, operand, W, out=product)
        if relu:
            product.relu_()
        if block is not None:
            target.copy_(product)
        if group_max is not None and in_cpp:
            group_max_cpp(target, group_max[rows])
        elif group_max is not None:  # rounding is monotone: the maximum may be rounded afterwards
            group_max_torch(product, group_max[rows])


def has_fast_products(x: Tensor) -> bool:
    """Whether torch has fast products in x's dtype on its device; on CPUs without bf16 or fp16 they take 8x fp32's time."""
    if x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64):
        return True
    name = "_is_mkldnn_bf16_supported" if x.dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    supported = getattr(torch.ops.mkldnn, name, None)
    return supported is not None and bool(supported())


@op("encode")
def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, relu: bool, out_dtype: torch.dtype, variant: str
) -> tuple[Tensor, Tensor]:
    if backend(x) == "triton":
        return _encode_triton(x, W_enc, b_enc, relu, out_dtype, variant)
    batch, d_sae = x.shape[0], W_enc.shape[1]
    pre_acts = x.new_empty(batch, d_sae, dtype=out_dtype)
    group_max = x.new_empty(batch, cdiv(d_sae, GROUP), dtype=out_dtype)
    encode_torch(x, *operands(W_enc, b_enc, out_dtype, batch), relu, pre_acts, group_max)
    return pre_acts, group_max


@_encode.register_fake
def _(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, relu: bool, out_dtype: torch.dtype, variant: str
) -> tuple[Tensor, Tensor]:
    batch, d_sae = x.shape[0], W_enc.shape[1]
    return x.new_empty(batch, d_sae, dtype=out_dtype), x.new_empty(batch, cdiv(d_sae, GROUP), dtype=out_dtype)


def _save(ctx, inputs, output) -> None:
    x, W_enc, b_enc, relu, _, _ = inputs
    ctx.save_for_backward(x, W_enc, *([output[0]] if relu else []))
    ctx.b_dtype = b_enc.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, g_pre, _g_group_max):
    x, W_enc, *relu = ctx.saved_tensors
    if relu:
        g_pre = torch.ops.aten.threshold_backward(g_pre, relu[0], 0)
    g = g_pre.to(W_enc.dtype)
    g_x = g @ W_enc.T if ctx.needs_input_grad[0] else None
    g_W_enc = (g.T @ x).T if ctx.needs_input_grad[1] else None  # latent-major, as W_enc is
    sums = torch.promote_types(g_pre.dtype, torch.float32)
    return g_x, g_W_enc, g_pre.sum(0, dtype=sums).to(ctx.b_dtype), None, None, None


differentiable(_encode, _backward, _save)


def check_W_enc(W_enc: Tensor) -> None:
    """Raise ValueError unless W_enc is the transposed view of a contiguous matrix that has elements."""
    if isinstance(W_enc, Tensor) and W_enc.ndim == 2 and not W_enc.T.is_contiguous():
        raise ValueError(
            f"W_enc {list(W_enc.shape)} has strides {list(W_enc.stride())}, but must be latent-major in memory:"
            " store it as a contiguous [d_sae, d_in] and pass its .T"
        )
    check("W_enc", W_enc, (None, None), contiguous=False)
    if not W_enc.shape[0] or not W_enc.shape[1]:
        raise ValueError(f"W_enc is {list(W_enc.shape)}; both sizes must be at least 1")


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_dec: Tensor | None = None,
    *,
    relu: bool = False,
    out_dtype: torch.dtype | None = None,
    variant: Variant = "auto",
) -> tuple[Tensor, Tensor]:
    """Pre-activations, and the maximum of every 32 neighbouring latents. Differentiable.

    Args:
        x: [batch, d_in], any float dtype; the product's operands have W_enc's.
        W_enc: [d_in, d_sae], a transposed view of a contiguous [d_sae, d_in].
        b_enc: [d_sae], W_enc's dtype or fp32. Added in fp32; "library", and a CPU with units for W_enc's dtype, round it to that first.
        b_dec: [d_in], subtracted from x before that is rounded to W_enc's dtype. A caller that needs the centred x anyway
            passes that and leaves this out.
        relu: store relu(pre_acts).
        out_dtype: of both outputs; by default W_enc's.
        variant: on a GPU, "fused" is one Triton kernel, "library" the vendor's product and a reading pass (fp32 sums and
            W_enc's dtype only); "auto" takes "library" for d_in of 2048 and more and for fp32 without TF32, unless it would
            round b_enc. The two may differ in the last bit.
    Returns:
        pre_acts [batch, d_sae], and group_max [batch, ceil(d_sae / 32)]: of the values as stored; NaN where a group has one.
        group_max is not differentiable.
    Raises:
        ValueError: a shape, dtype, device or layout that does not fit.
    """
    check_W_enc(W_enc)
    d_in, d_sae = W_enc.shape
    check("x", x, (None, d_in), like=W_enc)
    check("b_enc", b_enc, (d_sae,), like=W_enc)
    if b_dec is not None:
        check("b_dec", b_dec, (d_in,), like=W_enc)
        x = x - b_dec
    if variant not in ("auto", "fused", "library"):
        raise ValueError(f"variant is {variant!r}, but must be one of: auto, fused, library")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is {out_dtype}, but must be a floating dtype")
    outputs: tuple[Tensor, Tensor] = _encode(
        x.to(W_enc.dtype), W_enc, b_enc, relu, out_dtype or W_enc.dtype, variant
    )
    return outputs
