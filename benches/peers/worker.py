"""One trainer in a process of its own: `python -m benches.peers.worker --trainer NAME --shape B,D,N,K --device cpu`.

Every trainer runs the step code of its own package on the same batches, from the same weights: unit decoder rows, W_enc their
transpose, b_enc or thresholds so that about k latents are active (ReLU, JumpReLU), at a learning rate that leaves all of that as it
is. "10% dead": the first tenth of the latents counts as dead. Their encoder rows are a quarter as long, so that none is ever among the
k largest, but enough of them are positive to fill the auxiliary loss. For each line on standard input it takes one step and answers
with its seconds and its loss. It needs torch and its own package only.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

LR = 1e-9  # the weights stay: every step does the same work at the same L0
L1 = 2.0
BANDWIDTH = (
    0.25  # of JumpReLU: ours by default; SAELens' is 0.05, which is less work for ours and the same for it
)
DEAD_LENGTH = (
    0.25  # of the dead latents' encoder rows: its largest values are far below those that topk takes
)
N_BATCHES = 3


class Problem(NamedTuple):
    """What every trainer starts from."""

    xs: list[Tensor]
    W_dec: Tensor
    level: float  # that k of the products W_dec x pass; b_enc is minus that for ReLU and 0 for others
    k: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.xs[0]), self.xs[0].shape[1], len(self.W_dec)

    @property
    def n_dead(self) -> int:
        return len(self.W_dec) // 10

    def W_enc(self, dead: bool = False) -> Tensor:
        W_enc = self.W_dec.T.clone()
        if dead:
            W_enc[:, : self.n_dead] *= DEAD_LENGTH
        return W_enc


# One step on a batch; the loss that the package reports, or its mse where the other terms differ between packages.
Step = Callable[[Tensor], Tensor]


def make(batch: int, d: int, n: int, k: int, device: torch.device) -> Problem:
    gen = torch.Generator().manual_seed(0)
    xs = [torch.randn(batch, d, generator=gen) for _ in range(N_BATCHES)]
    W_dec = torch.nn.functional.normalize(torch.randn(n, d, generator=gen), dim=1)
    pre = xs[0][:512] @ W_dec.T
    level = float(pre.flatten().sort(descending=True).values[len(pre) * k])
    return Problem([x.to(device) for x in xs], W_dec.to(device), level, k)


def fastsae(
    p: Problem, activation: str, precision: str, norm: str, clip: bool, path: str, dead: bool = False
) -> Step:
    from fastsae import SAE, SAEConfig, StepConfig, TrainStep

    _, d, n = p.shape
    own = {"k": p.k} if activation in ("topk", "batchtopk") else {}
    sae = SAE(SAEConfig(d, n, activation=activation, decoder_norm=norm, **own), device=p.W_dec.device)
    terms = {
        "relu": {"l1_coefficient": L1, "l1_warmup_fraction": 0.0},
        "jumprelu": {
            "l0_coefficient": 1.0,
            "l0_warmup_fraction": 0.0,
            "target_l0": float(p.k),
            "bandwidth": BANDWIDTH,
            "betas": (0.9, 0.999),
        },
    }.get(activation, {})
    with torch.no_grad():
        sae.W_dec.copy_(p.W_dec)
        sae.W_enc.copy_(p.W_enc(dead))
        if activation == "relu":
            sae.b_enc.fill_(-p.level)
        if activation == "jumprelu":
            sae.threshold.fill_(p.level)
    step = TrainStep(
        sae, StepConfig(lr=LR, precision=precision, grad_clip=1.0 if clip else None, path=path, **terms)
    )
    if dead:
        step.tokens_since_fired[: p.n_dead] = step.cfg.dead_after
        step.read()  # from then on it reckons with dead latents
    if dead or activation == "jumprelu":
        return lambda x: step(x).mse
    return lambda x: step(x).loss


def saelens(
    p: Problem, activation: str, autocast: bool = False, compiled: bool = False, dead: bool = False
) -> Step:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import TrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    batch, d, n = p.shape
    device = str(p.W_dec.device)
    sae: TrainingSAE[Any] = _saelens_sae(p, activation, {"d_in": d, "d_sae": n, "device": device})
    with torch.no_grad():
        sae.W_dec.copy_(p.W_dec)
        sae.W_enc.copy_(p.W_enc(dead))
        if activation == "relu":
            sae.b_enc.fill_(-p.level)
    if compiled:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    cfg = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=batch,
        lr=LR,
        lr_end=LR,
        device=device,
        autocast=autocast,
    )
    trainer = SAETrainer(cfg, sae, data_provider=iter(()))
    if dead:
        trainer.n_forward_passes_since_fired[: p.n_dead] = cfg.dead_feature_window + 1

    def step(x: Tensor) -> Tensor:
        out = trainer._train_step(sae, x)
        loss: Tensor = out.losses["mse_loss"] if dead or activation == "jumprelu" else out.loss
        return loss

    return step


def _saelens_sae(p: Problem, activation: str, shape: dict[str, Any]) -> Any:
    if activation == "relu":
        from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig

        return StandardTrainingSAE(StandardTrainingSAEConfig(**shape, l1_coefficient=L1))
    if activation == "topk":
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        return TopKTrainingSAE(TopKTrainingSAEConfig(**shape, k=p.k))
    if activation == "batchtopk":
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=p.k))
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    return JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            **shape,
            jumprelu_init_threshold=p.level,
            jumprelu_bandwidth=BANDWIDTH,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=p.k,
        )
    )


def dictionary_learning(p: Problem, activation: str) -> Step:
    backward = torch.Tensor.backward
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    torch.Tensor.backward = backward  # nnsight, which the package imports, puts a slow tracer there
    _, d, n = p.shape
    common = {
        "steps": 10**6, "activation_dim": d, "dict_size": n, "layer": 0, "lm_name": "none", "lr": LR,
        "warmup_steps": 1, "device": str(p.W_dec.device),
    }  # fmt: skip
    if activation == "topk":
        trainer = TopKTrainer(**common, k=p.k)
    else:
        trainer = StandardTrainer(**common, l1_penalty=L1, sparsity_warmup_steps=None)
    with torch.no_grad():
        trainer.ae.decoder.weight.copy_(p.W_dec.T)
        trainer.ae.encoder.weight.copy_(p.W_dec)
        if activation != "topk":
            trainer.ae.encoder.bias.fill_(-p.level)
    seen: list[Tensor] = []
    inner = trainer.loss
    trainer.loss = lambda *a, **how: seen.append(inner(*a, **how)) or seen[-1]

    def step(x: Tensor) -> Tensor:
        seen.clear()
        trainer.update(1, x)  # step 0 would set b_dec
        return seen[0].detach()

    return step


def sparsify(p: Problem) -> Step:
    """Its trainer's own step is a forward hook; these are the calls that it makes there, in their order."""
    if p.W_dec.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    _, d, n = p.shape
    coder = SparseCoder(
        d, SparseCoderConfig(num_latents=n, k=p.k), device=p.W_dec.device, dtype=torch.float32
    )
    with torch.no_grad():
        coder.W_dec.copy_(p.W_dec)
        coder.encoder.weight.copy_(p.W_dec)
    adam = torch.optim.Adam(coder.parameters(), lr=LR)
    since_fired = torch.zeros(n, dtype=torch.long, device=p.W_dec.device)

    def step(x: Tensor) -> Tensor:
        coder.set_decoder_norm_to_unit_norm()
        fired = torch.zeros(n, dtype=torch.bool, device=x.device)
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=since_fired > 10_000_000, total_variance=total_variance)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        loss = out.fvu + out.auxk_loss / 32
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        since_fired.add_(len(x)).masked_fill_(fired, 0)
        return (out.fvu * total_variance / len(x)).detach()  # in ours' units

    return step


def dense_torch(p: Problem, activation: str, compiled: bool) -> Step:
    """The maths in plain torch: autograd, fused Adam, clipping."""
    _, d, n = p.shape
    b_enc = torch.full((n,), 0.0 if activation == "topk" else -p.level, device=p.W_dec.device)
    parameters = [p.W_enc().contiguous(), b_enc, p.W_dec.clone(), torch.zeros(d, device=p.W_dec.device)]
    W_enc, b_enc, W_dec, b_dec = (t.requires_grad_() for t in parameters)
    adam = torch.optim.Adam(parameters, lr=LR, fused=True)

    def forward(x: Tensor) -> Tensor:
        acts = ((x - b_dec) @ W_enc + b_enc).relu()
        if activation == "topk":
            top = acts.topk(p.k, dim=-1)
            acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
        loss = (acts @ W_dec + b_dec - x).square().sum(-1).mean()
        return loss if activation == "topk" else loss + L1 * (acts * W_dec.norm(dim=-1)).sum(-1).mean()

    run = torch.compile(forward) if compiled else forward

    def step(x: Tensor) -> Tensor:
        loss = run(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        return loss.detach()

    return step


Make = Callable[[Problem], Step]


def _ours() -> dict[str, Make]:
    """By every choice: "fastsae relu fp32 free sparse", "fastsae topk bf16 unit unclipped dense", ..."""
    activations = ("relu", "topk", "batchtopk", "jumprelu")
    choices = itertools.product(
        activations, ("fp32", "bf16"), ("unit", "free"), (True, False), ("sparse", "dense"), (False, True)
    )
    return {
        " ".join(["fastsae", activation, precision, norm, *([] if clip else ["unclipped"]), path])
        + (", 10% dead" if dead else ""): partial(
            fastsae, activation=activation, precision=precision, norm=norm, clip=clip, path=path, dead=dead
        )
        for activation, precision, norm, clip, path, dead in choices
        if activation == "topk" or not dead
    }


TRAINERS: dict[str, Make] = _ours() | {
    "SAELens standard": partial(saelens, activation="relu"),
    "SAELens standard, autocast": partial(saelens, activation="relu", autocast=True),
    "SAELens standard, autocast, compiled": partial(saelens, activation="relu", autocast=True, compiled=True),
    "SAELens topk": partial(saelens, activation="topk"),
    "SAELens topk, 10% dead": partial(saelens, activation="topk", dead=True),
    "SAELens topk, autocast": partial(saelens, activation="topk", autocast=True),
    "SAELens topk, autocast, compiled": partial(saelens, activation="topk", autocast=True, compiled=True),
    "SAELens batchtopk": partial(saelens, activation="batchtopk"),
    "SAELens jumprelu": partial(saelens, activation="jumprelu"),
    "dictionary_learning standard": partial(dictionary_learning, activation="relu"),
    "dictionary_learning topk": partial(dictionary_learning, activation="topk"),
    "sparsify topk": sparsify,
    "torch relu": partial(dense_torch, activation="relu", compiled=False),
    "torch relu, compiled": partial(dense_torch, activation="relu", compiled=True),
    "torch topk": partial(dense_torch, activation="topk", compiled=False),
    "torch topk, compiled": partial(dense_torch, activation="topk", compiled=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer", choices=list(TRAINERS), required=True)
    parser.add_argument("--shape", required=True, help="batch,d_in,d_sae,k")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    answers, sys.stdout = sys.stdout, sys.stderr  # the packages print
    batch, d, n, k = (int(size) for size in arguments.shape.split(","))
    problem = make(batch, d, n, k, device)
    step = TRAINERS[arguments.trainer](problem)
    for i, _ in enumerate(sys.stdin):
        x = problem.xs[i % N_BATCHES]
        start = time.perf_counter()
        loss = step(x).detach()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": float(loss)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
