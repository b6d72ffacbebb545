"""The embedded default: a small trained language model, the corpus it reads, and the config of a run on the two.

Nothing here needs a network. The model is a GPT-2 of 4 layers and width 128, trained by `train_model.py` on the source
of Python's standard library; `corpus.py` reads the same text from the interpreter that runs it.
"""

from pathlib import Path

__all__ = ["MODEL_DIR", "config_path"]

MODEL_DIR: Path = Path(__file__).parent / "model"
"""A Hugging Face model folder: what `transformers` and TransformerLens take in place of a name."""


def config_path(activation: str) -> Path:
    """The run that `fastsae train` does without a config: a TOML file beside this one."""
    names = {"topk": "topk", "batchtopk": "topk", "jumprelu": "jumprelu"}
    return Path(__file__).parent / f"{names.get(activation, 'relu')}.toml"
