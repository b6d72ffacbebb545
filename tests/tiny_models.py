"""Random models of three layers and width 16, as Hugging Face folders: no network, a tenth of a second each."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

N_LAYERS, D_MODEL, N_HEADS, N_CTX, D_VOCAB = 3, 16, 2, 32, 64

COMMON = {
    "num_hidden_layers": N_LAYERS,
    "hidden_size": D_MODEL,
    "num_attention_heads": N_HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": N_CTX,
    "vocab_size": D_VOCAB,
    "initializer_range": 0.2,
}
IDS = {"bos_token_id": 0, "eos_token_id": 0}


def gpt2_config() -> GPT2Config:
    return GPT2Config(
        n_layer=N_LAYERS,
        n_embd=D_MODEL,
        n_head=N_HEADS,
        n_positions=N_CTX,
        vocab_size=D_VOCAB,
        initializer_range=0.2,
        **IDS,
    )


KINDS = {
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config()),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, **IDS)),
    "neox_headless": lambda: GPTNeoXModel(GPTNeoXConfig(**COMMON, **IDS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=1, **IDS)),
    "bert": lambda: BertForMaskedLM(BertConfig(**COMMON)),
}


def save_model(kind: str, folder: Path) -> str:
    """Write a random model of this kind with a tokenizer; the folder's name."""
    torch.manual_seed(0)
    KINDS[kind]().save_pretrained(folder)
    vocab = {"<eos>": 0} | {f"w{i}": i for i in range(1, D_VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<eos>", eos_token="<eos>", unk_token="<eos>"
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads take several times as long over matrices of this size, on a busy machine above all."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
