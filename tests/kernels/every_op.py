"""Every op once, forward and backward, as a program for compute-sanitizer: `python -m tests.kernels.every_op`.

Needs a CUDA device, and `kernels` on PYTHONPATH. test_gpu.py runs the same calls for their bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benches.world import Shape, World
from fastsae_kernels.codes import Codes
from fastsae_kernels.decode import decode
from fastsae_kernels.decode_loss import decode_loss
from fastsae_kernels.dense_jumprelu import dense_jumprelu_grad
from fastsae_kernels.dense_loss import dense_codes_grad, dense_loss
from fastsae_kernels.encode import encode
from fastsae_kernels.encode_codes import encode_codes
from fastsae_kernels.move_rows import move_rows
from fastsae_kernels.select_batchtopk import select_batchtopk
from fastsae_kernels.select_threshold import select_threshold
from fastsae_kernels.select_topk import select_topk
from fastsae_kernels.transpose import transpose
from fastsae_kernels.update import grad_norms, grad_rows, update_rows

BETAS, EPS = (0.9, 0.999), 1e-8
HOT = 3  # a latent that is active in every input, so that its row is summed in chunks


def scalars(device: torch.device, step: int = 1) -> Tensor:
    """update_rows' device scalars at that step of Adam."""
    values = [2.0**-10, 1 - BETAS[0] ** step, 1 - BETAS[1] ** step, 1.0, 0.0, 0.0]
    return torch.tensor(values, device=device)


def calls(w: World) -> dict[str, Callable[[], Any]]:
    """Name -> one call; its tensors are what it computed, the same in every call."""
    k, n, W_enc, norms = w.shape.k, w.shape.n, w.W_dec.T, w.norms
    pre, x = w.pre[0].clone(), w.x[0]
    pre[:, HOT] = 9.0
    level = w.shifted.abs()
    codes = select_topk(pre, k)
    tailed = select_threshold(pre - level[0].to(pre.dtype), width=max(k // 2, 1), n_tail=None)
    t, t_tailed = transpose(codes, n), transpose(tailed, n)
    l1 = torch.tensor(0.125, device=w.device)

    def updated() -> list[Tensor]:
        W, bias = w.W_dec.float(), w.zeros.clone()
        state: dict[str, Any] = {"W": W.clone(), "m": torch.zeros_like(W), "v": torch.zeros_like(W)}
        state |= {"bias": bias, "bias_m": torch.zeros_like(bias), "bias_v": torch.zeros_like(bias)}
        state |= {"shadow": torch.empty_like(w.W_dec)}
        adam: dict[str, Any] = {"scalars": scalars(w.device), "betas": BETAS, "eps": EPS}
        update_rows(t, codes.values, x, project=True, renormalise=True, **state, **adam)
        return list(state.values())

    def moved() -> Tensor:
        out, rows = w.W_dec.float(), torch.arange(len(x), device=w.device, dtype=torch.int32)
        move_rows(x, rows, out, rows.flip(0))
        return out

    def decode_grads(codes: Codes) -> Any:
        leaves = [codes.values.clone(), w.W_dec.clone(), w.b_dec.clone()]
        values, W, b = (leaf.requires_grad_() for leaf in leaves)
        x_hat = decode(codes._replace(values=values), W, b)
        return torch.autograd.grad((x_hat.float() * x.float()).sum(), [values, W, b])

    def encode_grads(**how: Any) -> Any:
        leaves = [x.clone(), w.W_dec.clone(), w.shifted.clone(), w.b_dec.clone()]
        x_leaf, W, b_enc, b_dec = (leaf.requires_grad_() for leaf in leaves)
        values = encode_codes(x_leaf, W.T, b_enc, b_dec, **how).values
        return torch.autograd.grad(values.float().square().sum(), [x_leaf, W, b_enc, b_dec])

    return {
        "encode, fused": lambda: encode(x, W_enc, w.shifted, w.b_dec, variant="fused"),
        "encode, library": lambda: encode(x, W_enc, w.shifted, w.b_dec, relu=True, variant="library"),
        "select_threshold": lambda: select_threshold(pre - level[0].to(pre.dtype), width=k, n_tail=len(x)),
        "select_threshold, jumprelu": lambda: select_threshold(pre, threshold=level, bandwidth=0.25),
        "select_topk": lambda: select_topk(pre, k),
        "select_topk, signed": lambda: select_topk(pre, k, positive=False),
        "select_batchtopk": lambda: select_batchtopk(pre, k, width=max(k // 2, 1), n_tail=None),
        "encode_codes": lambda: encode_codes(x, W_enc, w.shifted, w.b_dec),
        "encode_codes, gradients, topk": lambda: encode_grads(k=k),
        "encode_codes, gradients, relu": lambda: encode_grads(width=max(k // 2, 1)),
        "decode": lambda: decode(codes, w.W_dec, w.b_dec),
        "decode, tail": lambda: decode(tailed, w.W_dec, w.b_dec),
        "decode, gradients": lambda: decode_grads(codes),
        "decode, gradients, tail": lambda: decode_grads(tailed),
        "decode_loss": lambda: decode_loss(codes, w.W_dec, w.b_dec, x, l1=l1, norms=norms, return_x_hat=True),
        "decode_loss, tail": lambda: decode_loss(tailed, w.W_dec, w.b_dec, x, l1=l1),
        "transpose": lambda: transpose(codes, n),
        "transpose, tail": lambda: transpose(tailed, n, chunk=8),
        "grad_rows": lambda: grad_rows(t, codes.values, x),
        "grad_rows, tail": lambda: grad_rows(t_tailed, tailed.values, x),
        "grad_norms": lambda: grad_norms(
            t, codes.values, x, w.W_dec.float(), scalars=scalars(w.device), project=True
        ),
        "update_rows": updated,
        "move_rows": moved,
        "dense_loss": lambda: dense_loss(x, w.b_dec, w.x[1]),
        "dense_codes_grad": lambda: dense_codes_grad(w.pre[1].clone(), pre.relu(), l1=l1, norms=norms),
        "dense_jumprelu_grad": lambda: dense_jumprelu_grad(
            w.pre[1].clone(), pre, norms, bandwidth=0.5, slope=l1, norms=norms, tanh_scale=4.0
        ),
    }


def tensors(returned: Any) -> list[Tensor]:
    """The tensors of an op's possibly nested result."""
    if isinstance(returned, Tensor):
        return [returned]
    return [t for part in returned for t in tensors(part)] if isinstance(returned, tuple | list) else []


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in (Shape(70, 65, 385, 7, dtype), Shape(128, 128, 512, 8, dtype)):
            for call in calls(World(shape, torch.device("cuda"))).values():
                call()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
