"""Small SAEs whose every parameter is somewhere, and the terms of the loss that each kind has."""

import torch

from fastsae.config import SAEConfig
from fastsae.sae import SAE

BATCH, D_IN, D_SAE = 37, 24, 61
KINDS = ("relu", "topk", "batchtopk", "jumprelu", "jumprelu, tanh")
AUX = {"auxk_coefficient": 0.3, "k_aux": 5}
L0 = {"l0_coefficient": 2.0, "target_l0": 6.0, "bandwidth": 0.4}
# fields of StepConfig
FIELDS = {
    "relu": {"l1_coefficient": 0.5},
    "topk": AUX,
    "batchtopk": AUX,
    "jumprelu": L0,
    "jumprelu, tanh": {**L0, "l0_loss": "tanh"},
}


def make_sae(
    kind="relu",
    norm="unit",
    *,
    d_out=None,
    apply_b_dec=True,
    dtype=torch.float64,
    k=7,
    d_sae=D_SAE,
    scale=1.0,
):
    gen = torch.Generator().manual_seed(3)
    activation = kind.split(",")[0]
    cfg = SAEConfig(
        D_IN,
        d_sae,
        d_out=d_out,
        activation=activation,
        k=k if "topk" in activation else None,
        decoder_norm=norm,
        apply_b_dec_to_input=apply_b_dec,
    )
    sae = SAE(cfg, dtype=torch.float64)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=gen, dtype=torch.float64))
        if activation == "jumprelu":
            sae.threshold.abs_()
        if norm == "unit":
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
        sae.scale.fill_(scale)
    return sae.to(dtype)


def weights(sae):
    return {name: p.detach() for name, p in sae.named_parameters()}


def leaves(sae):
    return {name: w.clone().requires_grad_() for name, w in weights(sae).items()}
