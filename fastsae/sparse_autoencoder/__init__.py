"""The names that a script for `sparse_autoencoder` imports: `from sparse_autoencoder import X` becomes `from fastsae.sparse_autoencoder import X`.

docs/coming-from-sparse-autoencoder.md says where every other name of that library went.
"""

from fastsae.sparse_autoencoder.autoencoder import (
    ForwardPassResult,
    LitSparseAutoencoder,
    LitSparseAutoencoderConfig,
    SparseAutoencoder,
    SparseAutoencoderConfig,
)
from fastsae.sparse_autoencoder.losses import L1AbsoluteLoss, L2ReconstructionLoss, SparseAutoencoderLoss
from fastsae.sparse_autoencoder.pipeline import Pipeline
from fastsae.sparse_autoencoder.source_datasets import (
    MockDataset,
    PreTokenizedDataset,
    SourceDataset,
    TextDataset,
)
from fastsae.sparse_autoencoder.store import ActivationStore

__all__ = [
    "ActivationStore",
    "ForwardPassResult",
    "L1AbsoluteLoss",
    "L2ReconstructionLoss",
    "LitSparseAutoencoder",
    "LitSparseAutoencoderConfig",
    "MockDataset",
    "Pipeline",
    "PreTokenizedDataset",
    "SourceDataset",
    "SparseAutoencoder",
    "SparseAutoencoderConfig",
    "SparseAutoencoderLoss",
    "TextDataset",
]
