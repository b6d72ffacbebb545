"""What users of `sparse_autoencoder` construct: its autoencoder and config classes, over our SAE and TrainStep.

A component is an SAE of ours; where there are several, tensors have an axis for them behind the batch. The loss is that library's,
`mean over batch and components of [mean_i (x_hat - x)_i^2 + l1_coefficient * sum_j |acts_j|]`. Ours sums over i and counts a
component alone, which is the same with l1 times d_in and, since Adam divides a common factor out of everything but epsilon, with epsilon
times d_in and the number of components.
"""

import math
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from fastsae.config import ResampleConfig, SAEConfig, Section, Share, StepConfig
from fastsae.errors import ConfigError, RunError, reason
from fastsae.sae import SAE

BIASES = ("tied_bias", "pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")
"""That library's names for b_dec in a state dict."""


class SparseAutoencoderConfig(Section):
    """Shape of the autoencoder."""

    n_input_features: PositiveInt
    """d_in."""
    n_learned_features: PositiveInt
    """d_sae."""
    n_components: PositiveInt | None = None
    """Hook points; None: one, and no axis for it."""


class LitSparseAutoencoderConfig(SparseAutoencoderConfig):
    """Shape and training."""

    component_names: tuple[str, ...]
    """One for each component: what its figures are logged under."""
    l1_coefficient: NonNegativeFloat = 0.001
    """Weight of the L1 term beside a squared error that is a mean over d_in."""
    resample_interval: PositiveInt = 200_000_000
    """Activations from one resampling of dead latents to the next."""
    max_n_resamples: NonNegativeInt = 4
    """How often at most; 0: never."""
    resample_dead_neurons_dataset_size: PositiveInt = 100_000_000
    """The last activations of an interval, over which it is counted how often a latent fires."""
    resample_loss_dataset_size: PositiveInt = 819_200
    """The last activations of an interval, from which inputs are drawn."""
    resample_threshold_is_dead_portion_fires: Share = 0.0
    """Share of the counted ones on which a latent may fire and be dead nevertheless."""

    @property
    def resample(self) -> ResampleConfig | None:
        """For TrainStep."""
        if self.max_n_resamples == 0:
            return None
        return ResampleConfig(
            interval=self.resample_interval,
            max_n_resamples=self.max_n_resamples,
            collate=self.resample_dead_neurons_dataset_size,
            dataset_size=self.resample_loss_dataset_size,
            threshold=self.resample_threshold_is_dead_portion_fires,
        )

    def model_post_init(self, _: Any) -> None:
        if self.n_components is not None and len(self.component_names) != self.n_components:
            raise ConfigError(
                f"n_components = {self.n_components}, but component_names are {len(self.component_names)}: "
                f"{', '.join(self.component_names)}"
            )


class ForwardPassResult(NamedTuple):
    """Of a batch, with an axis for components where the autoencoder has one."""

    learned_activations: Float[Tensor, "*batch d_sae"]
    decoded_activations: Float[Tensor, "*batch d_in"]


class SparseAutoencoder(nn.Module):
    """ReLU autoencoders with a tied bias and decoder rows of norm 1, one per component.

    Weights start as that library documents: encoder Kaiming-uniform for ReLU over d_in, its bias uniform within 1/sqrt(d_in), decoder rows
    random of norm 1, the tied bias at `geometric_median_dataset` ([d_in], or [components, d_in]) or 0. From torch's global generator.
    """

    def __init__(
        self, config: SparseAutoencoderConfig, geometric_median_dataset: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        shape = SAEConfig(config.n_input_features, config.n_learned_features, decoder_norm="unit")
        self.saes = nn.ModuleList(SAE(shape) for _ in range(config.n_components or 1))
        with torch.no_grad():
            for i, sae in enumerate(self.components):
                nn.init.kaiming_uniform_(sae.W_enc.T, nonlinearity="relu")
                nn.init.uniform_(sae.b_enc, -1 / math.sqrt(shape.d_in), 1 / math.sqrt(shape.d_in))
                sae.W_dec.copy_(nn.functional.normalize(torch.randn_like(sae.W_dec)))
                if geometric_median_dataset is not None:
                    median = geometric_median_dataset
                    sae.b_dec.copy_(median if median.ndim == 1 else median[i])

    @property
    def components(self) -> list[SAE]:
        """The SAEs."""
        return list(self.saes)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> ForwardPassResult:
        """x is [batch, d_in], or [batch, components, d_in] where config.n_components is given."""
        if self.config.n_components is None:
            (sae,) = self.components
            acts = sae.encode(x)
            return ForwardPassResult(acts, sae.decode(acts))
        if x.shape[-2] != self.config.n_components:
            raise ValueError(f"x is {tuple(x.shape)}; it must be [batch, {self.config.n_components}, d_in]")
        each = [sae.encode(part) for sae, part in zip(self.components, x.unbind(-2), strict=True)]
        decoded = [sae.decode(part) for sae, part in zip(self.components, each, strict=True)]
        return ForwardPassResult(torch.stack(each, -2), torch.stack(decoded, -2))

    def step_config(self, l1_coefficient: float, **fields: Any) -> StepConfig:
        """For TrainStep, with that library's defaults: Adam at 1e-3, no warm-up, no decay, no clipping; `fields` go over them."""
        d_in, n = self.config.n_input_features, self.config.n_components or 1
        return StepConfig(
            **{
                "lr": 1e-3,
                "lr_warmup_steps": 0,
                "lr_decay_fraction": 0.0,
                "l1_warmup_fraction": 0.0,
                "grad_clip": None,
                "eps": 1e-8 * d_in * n,
                "l1_coefficient": l1_coefficient * d_in,
                **fields,
            }
        )

    @torch.no_grad()
    def old_state_dict(self) -> dict[str, Tensor]:
        """The weights under that library's names and in its shapes: encoder.weight [components, d_sae, d_in], decoder.weight
        [components, d_in, d_sae]; without the first axis where config.n_components is None."""
        folded = [sae.folded() for sae in self.components]
        stacked = {
            "encoder.weight": torch.stack([f["W_enc"].T for f in folded]),
            "encoder.bias": torch.stack([f["b_enc"] for f in folded]),
            "decoder.weight": torch.stack([f["W_dec"].T for f in folded]),
            **dict.fromkeys(BIASES, torch.stack([f["b_dec"] for f in folded])),
        }
        if self.config.n_components is None:
            stacked = {name: t[0] for name, t in stacked.items()}
        return {name: t.clone() for name, t in stacked.items()}

    @torch.no_grad()
    def load_old_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `old_state_dict`, or that library, returned. Raises RunError for a missing name or another shape; nothing has changed then."""
        _check_fit(self.config, state)
        for i, sae in enumerate(self.components):
            own = {name: t if self.config.n_components is None else t[i] for name, t in state.items()}
            sae.load_folded(
                {
                    "W_enc": own["encoder.weight"].T,
                    "b_enc": own["encoder.bias"],
                    "W_dec": own["decoder.weight"].T,
                    "b_dec": own[BIASES[0]],
                }
            )

    def save(self, path: Path | str) -> None:
        """Write config and weights under that library's names; torch.load opens it with weights_only."""
        content = {"config": self._shape().model_dump(), "state_dict": self.old_state_dict()}
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        except OSError as error:
            raise RunError(f"cannot write {path}: {reason(error)}") from None

    @classmethod
    def load(
        cls, path: Path | str, component_idx: int | None = None, *, trust_pickle: bool = False
    ) -> "SparseAutoencoder":
        """Read what `save` wrote; with trust_pickle also that library's own files.

        Args:
            component_idx: this component alone, without an axis.
            trust_pickle: those files are pickles. They are read by an unpickler that knows tensors, dicts and that library's two classes,
                and refuses everything else.
        Raises: RunError where the file cannot be read, or is a pickle that is not trusted.
        """
        config, state = _read(Path(path), trust_pickle=trust_pickle)
        if component_idx is not None:
            if config.n_components is None:
                raise ConfigError(f"component_idx = {component_idx}, but {path} has no components")
            if component_idx not in range(config.n_components):
                raise ConfigError(
                    f"component_idx = {component_idx!r}, but {path} has {config.n_components} components"
                )
            _check_fit(config, state)
            config = config.model_copy(update={"n_components": None})
            state = {name: t[component_idx] for name, t in state.items()}
        loaded = SparseAutoencoder(config)
        loaded.load_old_state_dict(state)
        return loaded

    def _shape(self) -> SparseAutoencoderConfig:
        fields = SparseAutoencoderConfig.model_fields
        return SparseAutoencoderConfig(**{name: getattr(self.config, name) for name in fields})


class LitSparseAutoencoder(SparseAutoencoder):
    """A SparseAutoencoder that says how it is trained."""

    config: LitSparseAutoencoderConfig

    def __init__(self, config: LitSparseAutoencoderConfig) -> None:
        super().__init__(config)

    @property
    def sparse_autoencoder(self) -> SparseAutoencoder:
        """Where that library kept the weights: here they are its own."""
        return self


def _check_fit(config: SparseAutoencoderConfig, state: dict[str, Tensor]) -> None:
    """Raise RunError for a name that `state` lacks, or a shape that is not of this config."""
    d_in, d_sae = config.n_input_features, config.n_learned_features
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)}
    components = [] if config.n_components is None else [config.n_components]
    for name, own in (shapes | dict.fromkeys(BIASES, (d_in,))).items():
        wanted = [*components, *own]
        found = state.get(name, state.get(BIASES[0]) if name in BIASES else None)
        if not isinstance(found, Tensor) or list(found.shape) != wanted:
            what = list(found.shape) if isinstance(found, Tensor) else "missing"
            raise RunError(f"the weights are not those of {config}: {name} is {what}, not {wanted}")


def _read(path: Path, *, trust_pickle: bool) -> tuple[SparseAutoencoderConfig, dict[str, Tensor]]:
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        if not trust_pickle:
            raise RunError(
                f"{path} is a pickle of sparse_autoencoder, or no checkpoint; trust_pickle=True reads the former"
            ) from error
        found = _read_pickle(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from None
    if not isinstance(found, dict | _Stored):
        raise RunError(f"{path} holds no autoencoder: it is a {type(found).__name__}")
    try:
        config = {name: found["config"][name] for name in SparseAutoencoderConfig.model_fields}
        return SparseAutoencoderConfig(**config), dict(found["state_dict"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise RunError(f"{path} holds no autoencoder: {type(error).__name__} {reason(error)}") from None


class _Stored:
    """Stands in for a pydantic object of that library: its fields as they were pickled."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = state.get("__dict__", state)

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


class _Unpickler(pickle.Unpickler):
    """Knows what a checkpoint of that library is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("sparse_autoencoder.") and name.endswith(("State", "Config")):
            return _Stored
        allowed = {
            ("collections", "OrderedDict"),
            ("builtins", "set"),  # of a pydantic object: the names of its fields that were set
            ("__builtin__", "set"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("torch._utils", "_rebuild_parameter"),
        }
        if (module, name) in allowed or (module == "torch" and name.endswith("Storage")):
            return super().find_class(module.replace("__builtin__", "builtins"), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def _read_pickle(path: Path) -> Any:
    module: Any = ModuleType("fastsae.restricted_pickle")  # torch.load takes Unpickler and load from it
    module.Unpickler, module.load = _Unpickler, lambda file, **_: _Unpickler(file).load()
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, LookupError, ValueError) as error:
        raise RunError(f"cannot read {path}: {reason(error)}") from None
