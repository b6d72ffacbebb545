"""What the benches measure at: the shapes, the inputs that all cases at a shape share, and what a case consists of."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import Codes, to_dense
from fastsae_kernels.encode import group_max_torch, has_fast_products
from fastsae_kernels.select_topk import select_topk
from fastsae_kernels.transpose import Transposed, transpose

N_INPUTS = 2  # sets of inputs, taken in turn
CHECK_ROWS = 256  # inputs of a check, at the shape's own d, n and k
Call = Callable[[int], Any]  # of the number of the set of inputs


class Shape(NamedTuple):
    batch: int
    d: int
    n: int
    k: int
    dtype: torch.dtype


# The cost model's four rows (GPT-2 twice, Gemma 2 2B, Llama 3 8B), the first in fp32 too; half the demo's size for a CPU.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cuda": (
        Shape(8192, 768, 24576, 32, torch.bfloat16),
        Shape(4096, 768, 49152, 64, torch.bfloat16),
        Shape(4096, 2304, 65536, 64, torch.bfloat16),
        Shape(4096, 4096, 131072, 64, torch.bfloat16),
        Shape(8192, 768, 24576, 32, torch.float32),
    ),
    "cpu": (
        Shape(4096, 512, 8192, 32, torch.float32),
        Shape(4096, 512, 8192, 32, torch.bfloat16),
    ),
}


class Case(NamedTuple):
    """One op and its rivals at a shape. Bytes, gathered bytes (rows that may lie in L2) and FLOPs: what the op cannot do without.

    aims: rival -> how many times its time ours may take at most. copy_aim: the least share of the copy bandwidth that
    n_bytes + gathered must reach, 0 for none.
    """

    ours: Call
    rivals: dict[str, Call]
    check: Callable[[], None]
    n_bytes: float
    gathered: float = 0.0
    flops: float = 0.0
    aims: dict[str, float] = {}  # noqa: RUF012  a NamedTuple's default, never written to
    copy_aim: float = 0.0


class World:
    """The inputs at one shape, made when they are first asked for."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.gen = torch.Generator(device).manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def width(self) -> int | None:
        """Slots of the ragged selections: on a GPU twice the mean, so that none waits for the device."""
        return 2 * self.shape.k if self.on_gpu else None

    @cached_property
    def fast(self) -> torch.dtype:
        """Of the rivals' dense products: fp32 where the device has no units for the shape's own dtype."""
        own = self.shape.dtype
        return own if has_fast_products(torch.empty(0, dtype=own, device=self.device)) else torch.float32

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.gen, device=self.device)
        return x.to(dtype or self.shape.dtype)

    @cached_property
    def x(self) -> list[Tensor]:
        return [self.randn(self.shape.batch, self.shape.d) for _ in range(N_INPUTS)]

    @cached_property
    def W_dec(self) -> Tensor:
        """Rows of norm 1, so that pre_acts are normal with variance 1."""
        rows = self.randn(self.shape.n, self.shape.d, dtype=torch.float32)
        return torch.nn.functional.normalize(rows).to(self.shape.dtype)

    @cached_property
    def b_dec(self) -> Tensor:
        return self.randn(self.shape.d, dtype=torch.float32)

    @cached_property
    def norms(self) -> Tensor:
        return self.randn(self.shape.n, dtype=torch.float32).abs()

    @cached_property
    def zeros(self) -> Tensor:
        return torch.zeros(self.shape.n, device=self.device)

    @cached_property
    def shifted(self) -> Tensor:
        """The bias with which k of n latents are active on average."""
        share = torch.tensor(1 - 2 * self.shape.k / self.shape.n, dtype=torch.float64)
        return torch.full_like(self.zeros, -math.sqrt(2) * torch.erfinv(share).item())

    @cached_property
    def pre(self) -> list[Tensor]:
        return [self.randn(self.shape.batch, self.shape.n) for _ in range(N_INPUTS)]

    @cached_property
    def group_max(self) -> list[Tensor]:
        return [group_max_torch(pre) for pre in self.pre]

    @cached_property
    def codes(self) -> list[Codes]:
        with use_backend("torch"):  # inputs of an op owe nothing to another's kernels
            return [select_topk(p, self.shape.k, g) for p, g in zip(self.pre, self.group_max, strict=True)]

    @cached_property
    def acts(self) -> list[Tensor]:
        return [to_dense(codes, self.shape.n) for codes in self.codes]

    @cached_property
    def dense(self) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """acts, W_dec and x for the rivals' products."""
        return (
            [a.to(self.fast) for a in self.acts],
            self.W_dec.to(self.fast),
            [x.to(self.fast) for x in self.x],
        )

    @cached_property
    def transposed(self) -> list[Transposed]:
        with use_backend("torch"):
            return [transpose(codes, self.shape.n) for codes in self.codes]

    @cached_property
    def g_values(self) -> list[Tensor]:
        return [self.randn(*codes.values.shape, dtype=torch.float32) for codes in self.codes]

    def rivals(
        self, f: Callable[..., Any], arguments: Callable[[int], tuple[Any, ...]], name: str = "eager"
    ) -> dict[str, Call]:
        """f on the arguments of a set of inputs; compiled too, at the first shape alone, since each takes 10 s to compile."""
        calls: dict[str, Call] = {name: lambda i: f(*arguments(i))}
        if self.shape == SHAPES[self.device.type][0]:
            compiled = torch.compile(f)
            calls["torch.compile"] = lambda i: compiled(*arguments(i))
        return calls


def small(shape: Shape) -> Shape:
    """The shape at which its cases are checked."""
    return shape._replace(batch=min(shape.batch, CHECK_ROWS))
