"""fastsae: train sparse autoencoders on TransformerLens activations.

Importing this package loads torch, and neither transformer_lens, datasets, wandb nor triton.
"""

__version__ = "0.1.0.dev0"

from fastsae.activations import Codes
from fastsae.checkpoint import load, load_all
from fastsae.config import (
    DataConfig,
    DeadConfig,
    LogConfig,
    ModelConfig,
    RingConfig,
    RunConfig,
    SAEConfig,
    SAEEntry,
    SAESection,
    SaveConfig,
    StepConfig,
)
from fastsae.configfile import load_config
from fastsae.errors import ConfigError, DataError, FastSAEError, NonFiniteLossError, RunError, SourceError
from fastsae.evaluate import Validation, evaluate
from fastsae.init import initialise
from fastsae.ring import RingBuffer
from fastsae.sae import SAE
from fastsae.sparse_autoencoder.pipeline import Pipeline
from fastsae.step import TrainStep
from fastsae.train import Result, resume, train

__all__ = [
    "SAE",
    "Codes",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DeadConfig",
    "FastSAEError",
    "LogConfig",
    "ModelConfig",
    "NonFiniteLossError",
    "Pipeline",
    "Result",
    "RingBuffer",
    "RingConfig",
    "RunConfig",
    "RunError",
    "SAEConfig",
    "SAEEntry",
    "SAESection",
    "SaveConfig",
    "SourceError",
    "StepConfig",
    "TrainStep",
    "Validation",
    "evaluate",
    "initialise",
    "load",
    "load_all",
    "load_config",
    "resume",
    "train",
]
