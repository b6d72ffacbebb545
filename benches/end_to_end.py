"""What a run costs beside its forwards and its steps: `python -m benches.end_to_end [--model demo] [--saes 4] [--out FILE]`.

Phases of a run (tokens packed and in memory, no validation, no checkpoint, behind the first fill) in turn with as many of the same
forwards without a ring and as many bare steps on one batch, in one process. Then the forward alone: the bridge as it comes, the bridge
stopped at the hook point, ours, ours with compiled blocks, and Hugging Face's own module without its head, whole and cut off behind the
hook point.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benches.measure import about
from fastsae.config import ModelConfig, SAEConfig, StepConfig
from fastsae.demo import MODEL_DIR
from fastsae.harvest import Harvester
from fastsae.packing import TokenBatch
from fastsae.ring import RingBuffer
from fastsae.sae import SAE
from fastsae.source import Source, load_source
from fastsae.step import TrainStep

CONTEXT, CONTEXTS, BATCH = 128, 32, 4096  # tokens per context, contexts per forward, activations per step
HOOKS = {"demo": "blocks.2.hook_resid_post", "gpt2-small": "blocks.6.hook_resid_pre"}
LAYERS = {"demo": 3, "gpt2-small": 6}  # blocks that run before the hook point
PHASES = 5
N_TIMED = 9


class Stream:
    """Contexts of random tokens, made before they are asked for. The first position of each does not count."""

    epoch = 0

    def __init__(self, d_vocab: int) -> None:
        tokens = torch.randint(d_vocab, (CONTEXTS, CONTEXT), generator=torch.Generator().manual_seed(0))
        keep = torch.ones_like(tokens, dtype=torch.bool)
        keep[:, 0] = False
        self.batch = TokenBatch(tokens, keep, keep)

    def take(self, _n_contexts: int) -> TokenBatch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


def models_of(name: str, device: torch.device) -> tuple[Source, Any]:
    """The demo's model, or a random one of GPT-2 small's shape; and the same as Hugging Face has it."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    with tempfile.TemporaryDirectory() as made:
        folder = str(MODEL_DIR) if name == "demo" else made
        if name != "demo":
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        own = AutoModelForCausalLM.from_pretrained(folder).eval().to(device)
        return load_source(ModelConfig(name=folder, hook=(HOOKS[name],)), device), own


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def phases(source: Source, d_sae: int, k: int, n_saes: int, device: torch.device) -> dict[str, Any]:
    """Seconds of whole phases, of their forwards and of their steps, in turn."""
    hook, stream = source.hooks[0], Stream(source.d_vocab)
    per_forward = int(stream.batch.keep.sum())
    capacity = 6 * BATCH
    ring = RingBuffer(
        {hook.name: hook.width},
        capacity,
        BATCH,
        n_rows=10**12,
        max_write=CONTEXT * CONTEXTS,
        device=device,
        dtype=source.dtype,
    )
    harvester = Harvester(source, stream, ring, CONTEXTS)  # type: ignore[arg-type]
    steps = []
    for seed in range(n_saes):
        sae = SAE(SAEConfig(hook.width, d_sae, activation="topk", k=k), device=device, seed=seed)
        steps.append(TrainStep(sae, StepConfig(lr=1e-9, auxk_coefficient=0.0)))
    n_forwards = [0]

    def more() -> bool:
        n_forwards[0] += 1
        return harvester.forward()

    first_fill = seconds(lambda: ring.fill(more), device)
    batches = ring.batches(more)
    fixed = next(batches)[hook.name].clone()
    n_batches = capacity // 2 // BATCH

    def phase() -> None:
        for _ in range(n_batches):
            batch = next(batches)[hook.name]
            for step in steps:
                step(batch)

    def bare_steps() -> None:
        for _ in range(n_batches):
            for step in steps:
                step(fixed)

    def bare_forwards() -> None:
        for _ in range(n_forwards[0]):
            source.forward(stream.batch.tokens, [(hook.resolved, lambda acts: None)], stop=True)

    phase(), bare_steps()
    times: dict[str, list[float]] = {"phase": [], "forwards": [], "steps": []}
    for _ in range(PHASES):
        n_forwards[0] = 0
        times["phase"].append(seconds(phase, device))
        times["forwards"].append(seconds(bare_forwards, device))
        times["steps"].append(seconds(bare_steps, device))
    whole, forwards, bare = (statistics.median(times[name]) for name in ("phase", "forwards", "steps"))
    return {
        "n_saes": n_saes,
        "d_sae": d_sae,
        "k": k,
        "batch": BATCH,
        "tokens_per_forward": CONTEXT * CONTEXTS,
        "rows_per_forward": per_forward,
        "first_fill_seconds": first_fill,
        "seconds": times,
        "over_forwards_and_steps": whole / (forwards + bare),
        "steps_beside_the_forwards": (whole - forwards) / (bare / n_saes),
    }


def forwards(source: Source, own: Any, name: str, device: torch.device) -> dict[str, Any]:
    """The forward in six ways, taking turns: seconds, and each over ours; and what the compilation took."""
    tokens = Stream(source.d_vocab).batch.tokens.to(device)
    hook = source.hooks[0]
    assert source.is_short
    body: Any = own.transformer
    blocks, cut = body.h, body.h[: LAYERS[name]]

    def bridge() -> Tensor:
        logits: Tensor = source.model.run_with_hooks(
            tokens, fwd_hooks=[(hook.resolved, lambda acts, hook: None)]
        )
        return logits

    def compiled() -> None:
        source.forward(tokens, [(hook.resolved, lambda acts: None)], stop=True)

    def ours() -> None:
        with source.uncompiled():
            compiled()

    def stopped() -> None:
        short, source._bare = source._bare, None
        try:
            ours()
        finally:
            source._bare = short

    def bare(layers: Any) -> Callable[[], object]:
        def run() -> object:
            body.h = layers
            try:
                return body(tokens, use_cache=False, output_attentions=False)
            finally:
                body.h = blocks

        return run

    ways: dict[str, Callable[[], object]] = {
        "bridge": bridge,
        "bridge, stopped": stopped,
        "ours": ours,
        "ours, compiled": compiled,
        "bare module": bare(blocks),
        "bare module, cut off": bare(cut),
    }
    compile_seconds = seconds(lambda: source.compile((CONTEXTS, CONTEXT)), device)
    if source._compiled is None:
        del ways["ours, compiled"]
    times: dict[str, list[float]] = {way: [] for way in ways}
    shuffler = random.Random(0)
    with torch.no_grad():
        for round_ in range(N_TIMED + 1):
            # in a new order each time: what ran before decides how much memory is at hand
            for way, run in shuffler.sample(list(ways.items()), len(ways)):
                took = seconds(run, device)
                if round_:
                    times[way].append(took)
    source.compile_no_more()
    medians = {way: statistics.median(t) for way, t in times.items()}
    return {
        "seconds": times,
        "compile_seconds": compile_seconds,
        "over_ours": {way: m / medians["ours"] for way, m in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", action="append", choices=list(HOOKS), help="repeatable; by default all")
    parser.add_argument("--saes", type=int, action="append", help="SAEs per hook point; repeatable; 1 and 4")
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report: dict[str, Any] = {**about(device), "runs": [], "forwards": {}}
    for name in arguments.model or HOOKS:
        source, own = models_of(name, device)
        report["forwards"][name] = row = forwards(source, own, name, device)
        print(
            name, "forward, over ours:", {way: round(r, 2) for way, r in row["over_ours"].items()}, flush=True
        )
        for n_saes in arguments.saes or (1, 4):
            run = {"model": name, **phases(source, arguments.d_sae, arguments.k, n_saes, device)}
            report["runs"].append(run)
            print(
                f"{name}, {n_saes} SAEs: {run['over_forwards_and_steps']:.3f} of forwards and steps,",
                f"{run['steps_beside_the_forwards']:.2f} steps beside the forwards",
                flush=True,
            )
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
