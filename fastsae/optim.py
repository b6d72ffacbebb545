"""Adam as a row update, and what keeps the decoder at norm 1."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.library.custom_op("fastsae::fused_adam", mutates_args=("param", "grad", "m", "v"))
def _fused_adam(
    param: Tensor,
    grad: Tensor,
    m: Tensor | None,
    v: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    found_inf: Tensor | None,
) -> None:
    """torch's kernel as an op of ours, since torch.compile has no fake of it. Without m the gradient is the first moment."""
    torch._fused_adam_(
        [param],
        [grad],
        [grad if m is None else m],
        [v],
        [],
        [step],
        lr=lr.float() if param.device.type == "cuda" else lr,  # CUDA's kernel reads an fp32
        beta1=beta1,
        beta2=beta2,
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


@_fused_adam.register_fake
def _(*_: object) -> None:
    pass


def adam_(
    param: Tensor,
    grad: Tensor,
    m: Tensor | None,
    v: Tensor,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | float = 1.0,
    skip: Float[Tensor, ""] | None = None,
) -> None:
    """One step of Adam in place (Kingma and Ba 2015, algorithm 1), by the kernel of torch.optim.Adam(fused=True).

    Args: step counts from 1; it and lr are scalars on the device, so that a captured step follows its schedules; grad_scale multiplies the gradient (clipping); where skip is not 0 nothing moves; m is None where betas[0] is 0. grad is overwritten.
    """
    grad.mul_(grad_scale)
    wide = None if m is None else m.to(param.dtype)  # itself, unless it is kept in bf16
    found_inf = None if skip is None else skip.float()
    _fused_adam(param, grad, wide, v, step.float(), lr, betas[0], betas[1], eps, found_inf)
    if m is not None and wide is not None and wide is not m:
        m.copy_(wide)


def global_norm(grads: list[Tensor]) -> Float[Tensor, ""]:
    """Norm of all gradients as one vector."""
    norms = torch.stack([torch.linalg.vector_norm(g) for g in grads])
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm


def clip_scale(norm: Float[Tensor, ""], limit: float) -> Float[Tensor, ""]:
    """What to multiply gradients of this global norm by, so that it is at most `limit`."""
    scale: Tensor = limit / (norm + 1e-6)
    return scale.clamp(max=1.0)


def project_rows_(g_W_dec: Float[Tensor, "d_sae d"], W_dec: Float[Tensor, "d_sae d"]) -> None:
    """Remove from each gradient row its part along the (unit) weight row."""
    g_W_dec.sub_((g_W_dec * W_dec).sum(-1, keepdim=True) * W_dec)


def normalise_rows_(W_dec: Float[Tensor, "d_sae d"], skip: Float[Tensor, ""]) -> None:
    """Bring each row to norm 1; where skip is not 0 nothing changes."""
    norms = torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True).clamp_(min=torch.finfo(W_dec.dtype).tiny)
    W_dec.div_(norms.masked_fill_(skip != 0, 1))
