"""Train the embedded model: `python -m fastsae.demo.train_model --out DIR [--minutes N]`.

A byte-level BPE tokenizer and a GPT-2 of 4 layers and width 128 are fitted to the train split of `corpus.py`.
Documents are packed with the beginning-of-sequence token between them, and every context starts with one: of
128 tokens in three steps out of four, as `fastsae` feeds them to a model, and of 256 in the fourth, so that no
position stays untrained. It is meant for two CPU cores and a quarter of an hour; where they are shared, set
`OMP_WAIT_POLICY=PASSIVE`, without which threads that wait for a busy core made a step up to five times as long.

What is written is a Hugging Face model folder (weights in float16) and `training_log.json`, with the held-out
bits per byte of the weights as they were written, beside those of simpler predictors of the same text.
"""

import argparse
import json
import lzma
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fastsae.demo.corpus import load_corpus
from fastsae.seeds import derive, generator

__all__ = ["model_bits", "ngram_bits", "train", "train_tokenizer"]

BOS = "<|endoftext|>"

CONFIG: dict[str, Any] = {
    "vocab_size": 4096,
    "n_layer": 4,
    "n_embd": 128,
    "n_head": 4,
    "n_positions": 256,
    "tokens_per_step": 2048,
    "lr_muon": 0.02,
    "lr_adam": 3e-3,
    "lr_warmup_steps": 100,
    "grad_clip_norm": 1.0,
    "autocast": "bfloat16",
    "seed": 0,
}


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE of `vocab_size` tokens: any text can be coded, and decoding gives back its bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False)


def encode(tokenizer: Any, texts: list[str]) -> list[Tensor]:
    """The tokens of each text, int64, without special tokens."""
    encodings = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [torch.tensor(ids) for ids in encodings["input_ids"]]


def with_bos(targets: Tensor, bos: int) -> Tensor:
    """The inputs `[n, context]` that predict these targets: BOS, then all targets but the last."""
    return torch.cat([targets.new_full((len(targets), 1), bos), targets[:, :-1]], dim=1)


def windows(documents: list[Tensor], length: int, bos: int, seed: int) -> Iterator[Tensor]:
    """Packed windows of `length` targets, without end: in each epoch in another order, and cut elsewhere."""
    epoch = 0
    while True:
        rng = generator(seed, "demo-order", epoch)
        order = torch.randperm(len(documents), generator=rng).tolist()
        separator = torch.tensor([bos])
        stream = torch.cat([part for i in order for part in (documents[i], separator)])
        stream = stream[int(torch.randint(length, (1,), generator=rng)) :]
        packed = stream[: len(stream) // length * length].view(-1, length)
        yield from packed[torch.randperm(len(packed), generator=rng)]
        epoch += 1


def train(documents: list[Tensor], config: dict[str, Any], bos: int, n_steps: int) -> tuple[Any, list[float]]:
    """The model and the loss of each step, in nats per token: a function of the arguments and the machine."""
    torch.manual_seed(derive(config["seed"], "demo-init"))
    settings = {key: config[key] for key in ("vocab_size", "n_layer", "n_embd", "n_head", "n_positions")}
    settings["attn_implementation"] = "eager"  # a fifth less CPU time: the fused backward is slow
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            **settings,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own function as one op
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=bos,
            eos_token_id=bos,
        )
    )
    optimizers = _optimizers(model)
    source = windows(documents, config["n_positions"], bos, config["seed"])
    losses = []
    for step in range(n_steps):
        for optimizer, key in zip(optimizers, ("lr_muon", "lr_adam"), strict=True):
            optimizer.param_groups[0]["lr"] = config[key] * lr_factor(step, n_steps, config)
        rows = torch.stack([next(source) for _ in range(config["tokens_per_step"] // config["n_positions"])])
        targets = rows if step % 4 == 3 else rows.view(2 * len(rows), -1)
        with torch.autocast("cpu", getattr(torch, config["autocast"])):
            logits = model(input_ids=with_bos(targets, bos), use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip_norm"])
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step}/{n_steps}  loss {losses[-1]:.3f} nats per token", flush=True)
    return model.eval(), losses


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms and biases.

    After 300 steps the two together were 0.27 nats per token ahead of AdamW alone. There is no weight decay: a
    training of the default length passes over its text only a few times.
    """
    blocks = {id(p) for p in model.transformer.h.parameters() if p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in blocks]
    others = [p for p in model.parameters() if id(p) not in blocks]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [torch.optim.Muon(matrices, weight_decay=0.0), adam]


def lr_factor(step: int, n_steps: int, config: dict[str, Any]) -> float:
    """What the learning rates are multiplied by: a linear warm-up, then a cosine down to 0.01."""
    warmup: int = config["lr_warmup_steps"]
    if step < warmup:
        return (step + 1) / warmup
    return 0.505 + 0.495 * math.cos(math.pi * (step - warmup) / (n_steps - warmup))


@torch.inference_mode()
def model_bits(model: Any, documents: list[Tensor], context: int, bos: int) -> float:
    """The bits in which the model codes these documents, each cut into windows of `context` tokens after a BOS.

    No window sees another one, so every token is predicted once, from at most `context - 1` tokens before it.
    """
    pieces = [piece for document in documents for piece in torch.split(document, context)]
    bits = 0.0
    for start in range(0, len(pieces), 16):
        targets = torch.nn.utils.rnn.pad_sequence(pieces[start : start + 16], True, padding_value=-100)
        inputs = with_bos(targets.clamp(min=0), bos)
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        bits += F.cross_entropy(logits, targets.flatten(), reduction="sum").item() / math.log(2)
    return bits


def ngram_bits(
    train_set: list[Tensor], held_out: list[Tensor], vocab_size: int, bos: int
) -> tuple[float, float]:
    """The bits in which a unigram and a bigram model, fitted to `train_set`, code the documents in `held_out`.

    The unigram adds one to each count. The bigram is interpolated Kneser-Ney: the discount is `n1 / (n1 + 2 n2)`,
    from the numbers of pairs seen once and twice, and what it frees goes to tokens by how many others they follow
    (Chen and Goodman 1999, section 2.7). Its first token of a document follows BOS.
    """
    n_pairs = torch.zeros(vocab_size * vocab_size, dtype=torch.int64)
    n_tokens = torch.ones(vocab_size, dtype=torch.float64)
    for document in train_set:
        n_tokens += document.bincount(minlength=vocab_size)
        n_pairs += (_previous(document, bos) * vocab_size + document).bincount(minlength=len(n_pairs))
    log_unigram = (n_tokens / n_tokens.sum()).log2()

    discount = (n_pairs == 1).sum().item() / ((n_pairs == 1).sum() + 2 * (n_pairs == 2).sum()).item()
    pairs = n_pairs.view(vocab_size, vocab_size)
    n_predecessors = (pairs > 0).sum(dim=0) + 1.0
    continuation = (n_predecessors / n_predecessors.sum()).double()
    n_after = pairs.sum(dim=1).clamp(min=1).double()
    freed = torch.where(pairs.sum(dim=1) > 0, discount * (pairs > 0).sum(dim=1) / n_after, 1.0)

    unigram = bigram = 0.0
    for document in held_out:
        previous = _previous(document, bos)
        unigram -= log_unigram[document].sum().item()
        seen = (pairs[previous, document] - discount).clamp(min=0) / n_after[previous]
        bigram -= (seen + freed[previous] * continuation[document]).log2().sum().item()
    return unigram, bigram


def _previous(document: Tensor, bos: int) -> Tensor:
    return with_bos(document[None], bos)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train fastsae's embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="length of the training, which sets the steps"
    )
    parser.add_argument(
        "--steps", type=int, help="number of steps; with it a training repeats another one's bits"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    train_texts, held_out_texts = (list(load_corpus(split)["text"]) for split in ("train", "validation"))
    tokenizer = train_tokenizer(train_texts, CONFIG["vocab_size"])
    bos = tokenizer.bos_token_id
    train_set, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    n_steps = args.steps or _steps_in(60 * args.minutes, train_set, bos)
    start = time.perf_counter()
    model, losses = train(train_set, CONFIG, bos, n_steps)
    seconds = time.perf_counter() - start

    tokenizer.save_pretrained(args.out)
    model.half().save_pretrained(args.out)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    written = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)

    held_out_bytes = [text.encode() for text in held_out_texts]
    n_bytes = sum(map(len, held_out_bytes))
    unigram, bigram = ngram_bits(train_set, held_out, CONFIG["vocab_size"], bos)
    packed = lzma.compress(b"".join(held_out_bytes), preset=9 | lzma.PRESET_EXTREME)
    every = max(n_steps // 20, 1)
    log = {
        "bits_per_byte": {
            "model": model_bits(written, held_out, 128, bos) / n_bytes,
            "model_context_256": model_bits(written, held_out, 256, bos) / n_bytes,
            "bigram": bigram / n_bytes,
            "unigram": unigram / n_bytes,
            "lzma": 8 * len(packed) / n_bytes,
        },
        "n_bytes": n_bytes,
        "n_tokens": sum(map(len, held_out)),
        "n_train_bytes": sum(len(text.encode()) for text in train_texts),
        "n_train_tokens": sum(map(len, train_set)),
        "n_params": sum(p.numel() for p in written.parameters()),
        "steps": n_steps,
        "tokens": n_steps * CONFIG["tokens_per_step"],
        "seconds": round(seconds, 1),
        "threads": args.threads,
        "loss_nats_per_token": [
            {"step": at + every, "loss": round(sum(losses[at : at + every]) / every, 4)}
            for at in range(0, n_steps - every + 1, every)
        ],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "config": CONFIG,
    }
    (args.out / "training_log.json").write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log["bits_per_byte"], indent=2))


def _steps_in(seconds: float, documents: list[Tensor], bos: int, n_timed: int = 40) -> int:
    """How many steps fit into this time, from a training of a few that is thrown away."""
    start = time.perf_counter()
    train(documents, CONFIG, bos, n_timed)
    return max(int(seconds * n_timed / (time.perf_counter() - start)), 1)


if __name__ == "__main__":
    main()
