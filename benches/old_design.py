"""`Pipeline` beside the design that it replaces: `python -m benches.old_design [--device cuda] [--out FILE]`.

The old design, written here from its description: hooks copy activations to an fp32 store in pageable host memory, which is shuffled, read by
a DataLoader of torch one item at a time, and trained on with autograd and torch's Adam, the decoder's gradient projected and its columns
normalised in passes of their own; one component. Both train on the same number of activations of the same model, in turns, in one process;
activations per second over generation and training, validation left out. Once as a ReLU SAE starts, with many active latents, and once with
biases that leave 32 active, as in the long run; a tiny learning rate keeps both there, and the step is put on its sparse path, to which it
changes over by itself within 100 steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benches.measure import about
from fastsae.config import ModelConfig
from fastsae.source import load_source
from fastsae.sparse_autoencoder.autoencoder import LitSparseAutoencoder, LitSparseAutoencoderConfig
from fastsae.sparse_autoencoder.pipeline import Pipeline
from fastsae.sparse_autoencoder.source_datasets import MockDataset
from fastsae.step import TrainStep

HOOK, D_IN, D_SAE = "blocks.1.hook_resid_post", 768, 24_576
CONTEXT, CONTEXTS, BATCH = 128, 8, 1024
LR, L1, L0 = 1e-9, 0.001, 32
N_LAYERS, D_VOCAB = 2, 1000
ROUNDS = 3


def model_of(device: torch.device) -> Any:
    """A random one of GPT-2 small's width and few layers, so that the step is what is measured."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fastsae.demo import MODEL_DIR

    torch.manual_seed(0)
    config = GPT2Config(n_layer=N_LAYERS, vocab_size=D_VOCAB, bos_token_id=0, eos_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(folder)
        for file in MODEL_DIR.glob("*token*"):
            (Path(folder) / file.name).write_bytes(file.read_bytes())
        return load_source(ModelConfig(name=folder, hook=(HOOK,)), device).model


class OldDesign:
    """What the old pipeline did for one component; the step's maths is the documented one."""

    def __init__(self, model: Any, workers: int) -> None:
        self.model, self.workers = model, workers
        self.device = next(model.parameters()).device
        torch.manual_seed(0)
        W_dec = nn.functional.normalize(torch.randn(D_IN, D_SAE), dim=0)
        values = (torch.empty(D_SAE, D_IN), torch.zeros(D_SAE), W_dec, torch.zeros(D_IN))
        nn.init.kaiming_uniform_(values[0], nonlinearity="relu")
        self.W_enc, self.b_enc, self.W_dec, self.b = (nn.Parameter(v.to(self.device)) for v in values)
        self.adam = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b], lr=LR)
        gen = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(D_VOCAB, (CONTEXTS, CONTEXT), generator=gen).to(self.device)

    def generate(self, n_rows: int) -> Tensor:
        store, at = torch.empty(n_rows, D_IN), [0]

        def keep(acts: Tensor, hook: Any) -> None:
            rows = acts.reshape(-1, D_IN)[: n_rows - at[0]]
            store[at[0] : at[0] + len(rows)] = rows.cpu()
            at[0] += len(rows)

        with torch.no_grad():
            while at[0] < n_rows:
                self.model.run_with_hooks(self.tokens, fwd_hooks=[(HOOK, keep)])
        return store[torch.randperm(n_rows)]

    def run(self, n_rows: int) -> None:
        loader = DataLoader(TensorDataset(self.generate(n_rows)), batch_size=BATCH, num_workers=self.workers)
        for (rows,) in loader:
            x = rows.to(self.device)
            acts = ((x - self.b) @ self.W_enc.T + self.b_enc).relu()
            error = acts @ self.W_dec.T + self.b - x
            loss = (error.square().mean(-1) + L1 * acts.abs().sum(-1)).mean()
            self.adam.zero_grad()
            loss.backward()
            with torch.no_grad():
                unit = nn.functional.normalize(self.W_dec, dim=0)
                assert self.W_dec.grad is not None
                self.W_dec.grad -= unit * (unit * self.W_dec.grad).sum(0)
            self.adam.step()
            with torch.no_grad():
                self.W_dec.copy_(nn.functional.normalize(self.W_dec, dim=0))


def ours(model: Any) -> Pipeline:
    torch.manual_seed(0)
    config = LitSparseAutoencoderConfig(
        n_input_features=D_IN,
        n_learned_features=D_SAE,
        component_names=(HOOK,),
        l1_coefficient=L1,
        max_n_resamples=0,
    )
    return Pipeline(
        LitSparseAutoencoder(config),
        [HOOK],
        1,
        MockDataset(CONTEXT, n_ids=D_VOCAB, repeat=True),
        model,
        D_IN,
        D_SAE,
        checkpoint_directory=Path(tempfile.mkdtemp()),
        log_frequency=10**9,
        source_data_batch_size=CONTEXTS,
        lr=LR,
    )


def shift(pipeline: Pipeline, olds: list[OldDesign]) -> None:
    """Biases that leave L0 latents active."""
    (sae,) = pipeline.autoencoder.components
    store = pipeline.generate_activations(CONTEXTS * CONTEXT)
    rows = torch.cat([store[i] for i in range(64)])
    with torch.no_grad():
        for weights, bias in [(sae.W_enc, sae.b_enc), *((old.W_enc.T, old.b_enc) for old in olds)]:
            levels = (rows @ weights).flatten().sort(descending=True).values
            bias.fill_(-float(levels[len(rows) * L0]))
    cfg = pipeline.steps[HOOK].cfg.model_copy(update={"path": "sparse"})
    pipeline.steps[HOOK] = TrainStep(sae, cfg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=2048, help="activations per round")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = model_of(device)
    pipeline, workers = ours(model), (0, 4)
    olds = [OldDesign(model, n) for n in workers]
    ways: dict[str, Callable[[int], None]] = {"Pipeline": lambda n: _pipeline(pipeline, n)}
    ways |= {f"old design, {n} workers": old.run for n, old in zip(workers, olds, strict=True)}
    report = {**about(device), "d_in": D_IN, "d_sae": D_SAE, "batch": BATCH, "regimes": []}
    for regime in ("as it starts", f"l0 {L0}"):
        if regime != "as it starts":
            shift(pipeline, olds)
        report["regimes"].append(measured(ways, arguments.rows, device) | {"regime": regime})
        row = report["regimes"][-1]
        row["l0"] = next(iter(pipeline.steps.values())).read()["l0"]
        print(
            f"{regime}: Pipeline / the faster old design {row['ratio']:.2f} at l0 {row['l0']:.0f}", flush=True
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measured(ways: dict[str, Callable[[int], None]], n_rows: int, device: torch.device) -> dict[str, Any]:
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run(n_rows)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                rates[way].append(n_rows / (time.perf_counter() - start))
    medians = {way: statistics.median(values) for way, values in rates.items()}
    best = max(rate for way, rate in medians.items() if way != "Pipeline")
    return {"activations_per_second": rates, "ratio": medians["Pipeline"] / best}


def _pipeline(pipeline: Pipeline, n: int) -> None:
    pipeline.train_autoencoder(pipeline.generate_activations(n), BATCH)


if __name__ == "__main__":
    main()
