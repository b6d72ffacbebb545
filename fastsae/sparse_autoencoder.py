"""The names that a script for `sparse_autoencoder` imports: `from sparse_autoencoder import X` becomes `from fastsae.sparse_autoencoder import X`.

docs/coming-from-sparse-autoencoder.md says where every other name of that library went.
"""

from fastsae.autoencoder import (
    ForwardPassResult,
    LitSparseAutoencoder,
    LitSparseAutoencoderConfig,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from fastsae.pipeline import ActivationStore, Pipeline
from fastsae.source_datasets import MockDataset, PreTokenizedDataset, SourceDataset, TextDataset

__all__ = [
    "ActivationStore",
    "ForwardPassResult",
    "LitSparseAutoencoder",
    "LitSparseAutoencoderConfig",
    "MockDataset",
    "Pipeline",
    "PreTokenizedDataset",
    "SourceDataset",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "TextDataset",
]
