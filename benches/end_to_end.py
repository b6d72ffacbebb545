"""What a run costs beside its forwards and its steps: `python -m benches.end_to_end [--device cuda] [--only demo] [--out FILE]`.

Phases of a run (tokens packed and in memory, no validation, no checkpoint, behind the first fill) in turn with as many of the same
forwards without a ring and as many bare steps on one batch, in one process; ratios are medians over rounds of the three. Then the
forward alone: the bridge as it comes, the bridge stopped at the hook point, ours, ours with compiled blocks, and Hugging Face's own
module without its head, whole and cut off behind the hook point. On a GPU also with the ring in host memory, and twelve SAEs on twelve
layers, with the hours that 300M activations for each take.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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

MIN_ROUNDS = 5
# Of rounds per scene, at least: two CPU cores vary by more than what is asked for.
SECONDS = {"cpu": 120.0, "cuda": 10.0}
N_TIMED = 9
WANTED = 300e6  # activations per SAE, for the hours


class Scene(NamedTuple):
    """What is trained on what: TopK SAEs on every hook point, in the model's precision."""

    model: str
    hook: str
    n_blocks: int
    """That run before the last hook point."""
    n_saes: int = 1
    """Per hook point."""
    placement: str = "device"
    d_sae: int = 8192
    k: int = 32
    batch: int = 4096
    contexts: int = 32
    context: int = 128
    n_batches: int = 3
    """Of a phase."""
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.hook}, {self.n_saes} SAEs each, ring on {self.placement}"


GPU: dict[str, Any] = {"d_sae": 24576, "batch": 8192, "contexts": 256, "n_batches": 12, "precision": "bf16"}
SCENES = {
    "cpu": [
        Scene(model, hook, n_blocks, n_saes)
        for model, hook, n_blocks in (
            ("demo", "blocks.2.hook_resid_post", 3),
            ("gpt2-small", "blocks.6.hook_resid_pre", 6),
        )
        for n_saes in (1, 4)
    ],
    "cuda": [
        Scene("gpt2-small", hook, n_blocks, placement=placement, **GPU)
        for hook, n_blocks in (("blocks.8.hook_resid_pre", 8), ("blocks.*.hook_resid_pre", 11))
        for placement in ("device", "host")
    ],
}


class Stream:
    """Contexts of random tokens, made before they are asked for. The first position of each does not count."""

    epoch = 0

    def __init__(self, d_vocab: int, scene: Scene) -> None:
        shape = scene.contexts, scene.context
        tokens = torch.randint(d_vocab, shape, generator=torch.Generator().manual_seed(0))
        keep = torch.ones_like(tokens, dtype=torch.bool)
        keep[:, 0] = False
        self.batch = TokenBatch(tokens, keep, keep)

    def take(self, _n_contexts: int) -> TokenBatch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {}


def models_of(scene: Scene, device: torch.device) -> tuple[Source, Any]:
    """The demo's model, or a random one of GPT-2 small's shape; and the same as Hugging Face has it."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    dtype = "bfloat16" if scene.precision == "bf16" else "float32"
    with tempfile.TemporaryDirectory() as made:
        folder = str(MODEL_DIR) if scene.model == "demo" else made
        if scene.model != "demo":
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        own = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
        return load_source(ModelConfig(name=folder, hook=(scene.hook,), dtype=dtype), device), own


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def phases(scene: Scene, source: Source, device: torch.device) -> dict[str, Any]:
    """Seconds of whole phases, of their forwards and of their steps, in turn."""
    stream = Stream(source.d_vocab, scene)
    per_forward = int(stream.batch.keep.sum())
    rows = scene.n_batches * scene.batch  # of a phase
    ring = RingBuffer(
        {hook.name: hook.width for hook in source.hooks},
        2 * rows,
        scene.batch,
        n_rows=10**12,
        max_write=stream.batch.tokens.numel(),
        device=device,
        dtype=source.dtype,
        placement=scene.placement,
    )
    harvester = Harvester(source, stream, ring, scene.contexts)  # type: ignore[arg-type]
    cfg = StepConfig.model_validate({"lr": 1e-9, "auxk_coefficient": 0.0, "precision": scene.precision})
    steps = [
        (hook.name, TrainStep(SAE(shape, device=device, seed=seed), cfg))
        for hook in source.hooks
        for shape in [SAEConfig(hook.width, scene.d_sae, activation="topk", k=scene.k)]
        for seed in range(scene.n_saes)
    ]
    n_forwards = [0]

    def more() -> bool:
        n_forwards[0] += 1
        return harvester.forward()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first_fill = seconds(lambda: ring.fill(more), device)
    batches = ring.batches(more)
    fixed = {name: batch.clone() for name, batch in next(batches).items()}

    def phase() -> None:
        for _ in range(scene.n_batches):
            batch = next(batches)
            for name, step in steps:
                step(batch[name])

    def bare_steps() -> None:
        for _ in range(scene.n_batches):
            for name, step in steps:
                step(fixed[name])

    def bare_forwards() -> None:
        hooks = [(hook.resolved, lambda acts: None) for hook in source.hooks]
        for _ in range(n_forwards[0]):
            source.forward(stream.batch.tokens, hooks, stop=True)

    phase(), bare_steps()
    times: dict[str, list[float]] = {"phase": [], "forwards": [], "steps": []}
    while len(times["phase"]) < MIN_ROUNDS or sum(map(sum, times.values())) < SECONDS[device.type]:
        n_forwards[0] = 0
        times["phase"].append(seconds(phase, device))
        times["forwards"].append(seconds(bare_forwards, device))
        times["steps"].append(seconds(bare_steps, device))
    # within rounds, since the machine's speed drifts from one to the next
    rounds = list(zip(*times.values(), strict=True))
    beside = [(p - f) / (s / len(steps)) for p, f, s in rounds]
    whole, forwards, bare = (statistics.median(took) for took in times.values())
    return {
        **scene._asdict(),
        "n_hooks": len(source.hooks),
        "rows_per_forward": per_forward,
        "first_fill_seconds": first_fill,
        "seconds": times,
        "over_forwards_and_steps": statistics.median(p / (f + s) for p, f, s in rounds),
        "steps_beside_the_forwards": statistics.median(beside),
        "standard_error": 1.25 * statistics.stdev(beside) / math.sqrt(len(beside)),  # of a median, if normal
        "activations_per_second": {"forward": rows / forwards, "steps": rows / bare, "whole": rows / whole},
        "hours": WANTED / (rows / whole) / 3600,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def forwards(scene: Scene, source: Source, own: Any, device: torch.device) -> dict[str, Any]:
    """The forward in six ways, taking turns: seconds, and each over ours; and what the compilation took."""
    tokens = Stream(source.d_vocab, scene).batch.tokens.to(device)
    hook = source.hooks[-1]
    assert source.is_short
    body: Any = own.transformer
    blocks, cut = body.h, body.h[: scene.n_blocks]

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
    compile_seconds = seconds(lambda: source.compile((scene.contexts, scene.context)), device)
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
    parser.add_argument("--device", choices=list(SCENES), default="cpu")
    parser.add_argument("--only", help="scenes whose names have this in them")
    parser.add_argument("--out", type=Path, help="JSON, rewritten after each scene")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report: dict[str, Any] = {**about(device), "runs": [], "forwards": {}}
    for scene in SCENES[arguments.device]:
        if (arguments.only or "") not in scene.name:
            continue
        source, own = models_of(scene, device)
        where = f"{scene.model}, {scene.hook}"
        if where not in report["forwards"]:
            report["forwards"][where] = row = forwards(scene, source, own, device)
            print(
                where,
                "forward, over ours:",
                {way: round(r, 2) for way, r in row["over_ours"].items()},
                flush=True,
            )
        run = phases(scene, source, device)
        report["runs"].append(run)
        print(
            f"{scene.name}: {run['over_forwards_and_steps']:.3f} of forwards and steps,",
            f"{run['steps_beside_the_forwards']:.2f} ± {run['standard_error']:.2f} steps beside the forwards,",
            f"{run['hours']:.3g} hours for {WANTED:.0e} activations each",
            flush=True,
        )
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
