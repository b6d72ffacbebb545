"""The config tree: one frozen pydantic model per section of the TOML file.

A value is set in one place: the file, then a flag over it (configfile.py). `resolved_step` replaces "auto" by the
value that the run uses. Defaults and their sources: README, section "Defaults".
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fastsae.errors import ConfigError
from fastsae.explain import explain

Activation = Literal["relu", "topk", "batchtopk", "jumprelu"]
DecoderNorm = Literal["unit", "free"]
Precision = Literal["fp64", "fp32", "tf32", "bf16"]
Dtype = Literal["float32", "bfloat16", "float16"]

TOPK = ("topk", "batchtopk")  # activations that have a k
# By benches.step_scaling on 2 cores (results/cpu/step_scaling_amx.json); on a GPU by the cost model of the kernels, not measured.
CROSSOVER = {"cpu": 1 / 16, "cuda": 1 / 100}
DEFAULT_K = 32
DEFAULT_BANDWIDTH = 0.25
DEFAULT_L1 = 5.0  # at a loss summed over d_in and inputs of norm sqrt(d_in); Anthropic, April 2024 update
DEFAULT_AUXK = 1 / 32  # Gao et al. 2024, section 2.4 and appendix A.2
# Fields of [step] that belong to some activations alone.
OWN_FIELDS = {
    "relu": ("l1_coefficient",),
    "topk": ("auxk_coefficient", "k_aux"),
    "batchtopk": ("auxk_coefficient", "k_aux"),
    "jumprelu": ("l0_coefficient", "target_l0", "bandwidth", "l0_loss"),
}


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def folder_name(value: str) -> str:
    """The value. Raises ValueError where it cannot name a folder of ours."""
    if not value.strip() or value in (".", "..") or "/" in value or "\\" in value or "\0" in value:
        raise ValueError("must be a plain folder name, without a path in it")
    if len(value.encode()) > 100 or value in ("cfg.json", "sae_weights.safetensors", "step.safetensors"):
        raise ValueError("cannot be a folder's name here; take another one, of at most 100 bytes")
    return value


PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
PositiveFloat = Annotated[float, Field(gt=0, strict=True)]
NonNegativeFloat = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Beta = Annotated[float, Field(ge=0, lt=1, strict=True)]
FolderName = Annotated[str, AfterValidator(folder_name)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no NaN, no infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    # A section inside another is built without this constructor, so that its errors keep their place.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class ModelConfig(Section):
    """[model]: the source model and where in it."""

    name: str = "demo"
    """Hub name, local folder, or "demo", the model that fastsae carries."""
    hook: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = ()
    """Hook points; `*` matches any part, as in "blocks.*.hook_resid_pre"."""
    dtype: Dtype = "float32"
    """Data type of the source model."""
    weights: Literal["raw", "processed"] = "raw"
    """Hugging Face's numbers, or those after TransformerLens' folding and centring."""
    batch_size: PositiveInt = 32
    """Contexts per forward pass; independent of the SAE's batch."""
    compile: Literal["auto"] | bool = "auto"
    """Put the model's blocks under torch.compile; "auto": where a measurement shows that the run gains more than it costs."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights."""


class DataConfig(Section):
    """[data]: the text, and which of its positions count."""

    dataset: str = "demo"
    """Hub name, a local file or folder (parquet, jsonl, text, saved dataset), or "demo"."""
    subset: str | None = None
    """Name of the dataset's configuration on the hub."""
    split: str = "train"
    """Split to train on."""
    text_column: str = "text"
    """Column of strings, one document a row."""
    tokens_column: str | None = None
    """Column of token ids; replaces text_column for a pre-tokenised dataset."""
    streaming: bool = False
    """Read a hub dataset while training, without downloading it first."""
    context_size: Annotated[int, Field(ge=2, strict=True)] = 128
    """Tokens per context, the BOS at its start included."""
    exclude: Literal["bos", "special", "none"] | tuple[NonNegativeInt, ...] = "bos"
    """Positions left out of training and statistics: inserted BOS and separators, every special token, or ids."""
    shuffle_buffer: PositiveInt = 10_000
    """Documents that are shuffled together."""
    on_exhausted: Literal["stop", "repeat"] = "stop"
    """When the documents end before n_tokens: finish cleanly, or begin another epoch."""
    validation_split: str | None = None
    """Split to validate on; without one, the first documents of `split` are held out."""
    n_validation_tokens: PositiveInt = 131_072
    """Activations to validate on."""
    cache_dir: Path | None = None
    """Folder of tokenised text; by default below the user's cache folder."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the hub."""
    activations: Path | None = None
    """Folder of `fastsae harvest` to train on; model and text are then those that it was made of."""


class RingConfig(Section):
    """[ring]: the buffer between the source model and the step."""

    capacity: PositiveInt = 524_288
    """Activations it holds per hook point."""
    placement: Literal["auto", "device", "host"] = "auto"
    """On the training device, in pinned host memory, or the first of these that fits."""
    dtype: Literal["auto", "float64"] | Dtype = "auto"
    """Data type of its rows; "auto" is the source model's."""


class SAESection(Section):
    """[sae], and one entry of [[saes]]: the shape of one SAE. d_in comes from the hook point."""

    d_sae: PositiveInt = 16_384
    """Latents."""
    activation: Activation = "relu"
    """Which latents are active."""
    k: PositiveInt | None = None
    """Active latents per token, topk and batchtopk (there on average over a batch); 32 unless given."""
    decoder_norm: DecoderNorm | None = None
    """Rows of W_dec held at norm 1 ("unit"), or free with the norm in the L1 term; unit unless given, free for jumprelu."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec before the encoder."""


class ResampleConfig(Section):
    """[dead]'s fields: when and from what dead latents start again; see resample.py. In activations."""

    interval: PositiveInt = 200_000_000
    """From one resampling to the next."""
    max_n_resamples: NonNegativeInt = 4
    """How often at most."""
    collate: PositiveInt = 100_000_000
    """The last ones of an interval, over which it is counted how often a latent fires."""
    dataset_size: PositiveInt = 819_200
    """The last ones of an interval, from which inputs are drawn."""
    threshold: Share = 0.0
    """Share of these on which a latent may fire and be dead nevertheless."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.collate > self.interval:
            raise ValueError(f"collate = {self.collate} is more than interval = {self.interval}")
        return self


class DeadConfig(ResampleConfig):
    """[dead]: what is done about dead latents."""

    method: Literal["auto", "resample"] = "auto"
    """ "auto": AuxK for topk and batchtopk (step.auxk_coefficient), nothing for relu and jumprelu. "resample", for relu: start them again from
    inputs that are explained badly."""


class StepConfig(Section):
    """[step]: one optimisation step."""

    batch_size: PositiveInt = 4096
    """Activations per step."""
    accumulate: PositiveInt = 1
    """Pieces in which a step takes its batch, for less memory; what looks at a whole batch (batchtopk, the L0 count, AuxK's scale)
    looks at a piece."""
    precision: Precision = "fp32"
    """Arithmetic of the matrix products; sums, losses and Adam are fp32 (fp64 for fp64)."""
    path: Literal["auto", "dense", "sparse"] = "auto"
    """How the step is computed, with the same numbers; "auto" is sparse where few latents are active."""
    crossover: Literal["auto"] | Share = "auto"
    """Share of active latents up to which path "auto" is sparse; "auto" is measured once per machine (by TrainStep alone: 1/16 on a
    CPU, 1/100 on a GPU)."""
    cuda_graph: bool = True
    """Record the step on a GPU once and replay it: one launch in place of a hundred."""
    lr: Literal["auto"] | PositiveFloat = "auto"
    """Learning rate of Adam after warm-up; "auto": 3e-4 for relu, 7e-5 for jumprelu, else 2e-4 / sqrt(d_sae / 2^14)."""
    betas: Literal["auto"] | tuple[Beta, Beta] = "auto"
    """Decay of Adam's first and second moment; "auto": 0.9 and 0.999, for jumprelu 0 and 0.999. With 0 no first moment is kept, and the
    sparse path leaves weights without a gradient where they are."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    first_moment: Literal["full", "bf16"] = "full"
    """Data type of Adam's first moment of the two matrices: theirs, or bfloat16, for 2 bytes less per weight."""
    ema_decay: Beta | None = None
    """Decay of a running mean of the weights, which validation and the saved SAEs then have; off unless given, or where a file says false."""
    grad_clip: PositiveFloat | None = 1.0
    """Largest global norm of the gradient; none where a file says false."""
    lr_warmup_steps: Literal["auto"] | NonNegativeInt = "auto"
    """Steps of linear warm-up; "auto" is min(1000, 5% of the run)."""
    lr_decay_fraction: Share = 0.2
    """Last share of the run over which lr falls linearly to 0."""
    l1_coefficient: NonNegativeFloat | None = None
    """Weight of the L1 term, relu only; 5 unless given."""
    l1_warmup_fraction: Share = 0.05
    """First share of the run over which the L1 weight rises linearly from 0."""
    l0_coefficient: NonNegativeFloat | None = None
    """Weight of the L0 term (l0 / target_l0 - 1)^2, jumprelu only; d_in unless given."""
    target_l0: PositiveFloat | None = None
    """Active latents per activation to aim at, jumprelu only; 32 unless given, or d_sae where that is smaller."""
    l0_loss: Literal["step", "tanh"] | None = None
    """What the L0 term counts, jumprelu only: active latents ("step", unless given), or sum_j tanh(4 acts_j ||W_dec_j||)."""
    bandwidth: PositiveFloat | None = None
    """Width of the band around a threshold in which it has a gradient, jumprelu only, in scaled units; 0.25 unless given."""
    l0_warmup_fraction: Share = 0.3
    """First share of the run over which the L0 weight rises linearly from 0."""
    auxk_coefficient: NonNegativeFloat | None = None
    """Weight of the auxiliary loss on dead latents, topk and batchtopk; 1/32 unless given."""
    k_aux: PositiveInt | None = None
    """Dead latents that may explain a residual, topk and batchtopk; d_in / 2 unless given."""
    dead_after: PositiveInt = 10_000_000
    """Activations without firing after which a latent counts as dead."""

    @model_validator(mode="before")
    @classmethod
    def _false_is_off(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        may_be_off = ("grad_clip", "ema_decay")
        return {f: None if f in may_be_off and value is False else value for f, value in data.items()}


class SAEEntry(SAESection):
    """One entry of [[saes]]: fields of [sae] to override, and under `step` fields of [step]."""

    name: FolderName | None = None
    """Folder below the hook point's; made from the entry's own fields unless given."""
    seed: NonNegativeInt | None = None
    """Seed of its initial weights; the run's unless given."""
    step: StepConfig = StepConfig()
    """Fields of [step] for this SAE alone."""


class Variant(NamedTuple):
    """One SAE per hook point."""

    name: str
    """Its folder; "" where there is one SAE per hook point."""
    sae: SAESection
    """[sae] with the entry's overrides."""
    step: StepConfig
    """[step] with the entry's overrides."""
    seed: int


class SaveConfig(Section):
    """[save]: what is written, and when."""

    checkpoint_every: PositiveInt | None = None
    """Activations between checkpoints; only at the end where not given."""
    validate_every: PositiveInt | None = None
    """Activations between validations; only at the end where not given."""
    keep: PositiveInt | None = None
    """Checkpoints to keep, the newest; all of them where not given."""
    ring: bool = False
    """Store the ring's activations in a checkpoint, so that a resume runs no forward again: where that costs more than the disk."""
    baselines: bool = True
    """Measure simple replacements beside the SAEs at the end: four more forwards over the validation tokens each."""


class LogConfig(Section):
    """[log]: where the figures go."""

    every: PositiveInt = 50
    """Steps between two reads of the step's counters."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """Project on Weights & Biases; nothing is sent where not given."""


class SAEConfig(Section):
    """Shape of one SAE: `SAEConfig(768, 24_576, activation="topk", k=32)`.

    Raises ConfigError for a field that belongs to another activation and for sizes that cannot be.
    """

    d_in: PositiveInt
    """Width of the input."""
    d_sae: PositiveInt
    """Latents."""
    d_out: PositiveInt | None = None
    """Width of the output where it differs from the input (a transcoder)."""
    activation: Activation = "relu"
    """Which latents are active."""
    k: PositiveInt | None = None
    """Active latents per input, topk and batchtopk (there on average over a batch); 32 unless given, or d_sae where that is smaller."""
    decoder_norm: DecoderNorm = "unit"
    """Rows of W_dec held at norm 1, or free with the norm in the L1 term; unit unless given, free for jumprelu."""
    apply_b_dec_to_input: bool = True
    """Subtract b_dec before the encoder; off for transcoders."""

    def __init__(self, d_in: int, d_sae: int, **fields: Any) -> None:
        super().__init__(d_in=d_in, d_sae=d_sae, **fields)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled, activation, d_sae = dict(data), data.get("activation"), data.get("d_sae")
        if activation in TOPK and data.get("k") is None:
            filled["k"] = min(DEFAULT_K, d_sae) if isinstance(d_sae, int) and d_sae > 0 else DEFAULT_K
        if data.get("decoder_norm") is None:
            filled["decoder_norm"] = "free" if activation == "jumprelu" else "unit"
        return filled

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.activation not in TOPK and self.k is not None:
            raise ValueError(
                f"k = {self.k} belongs to topk and batchtopk, not to {self.activation}; drop k or say topk"
            )
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k = {self.k} is more than d_sae = {self.d_sae}")
        if self.d_out not in (None, self.d_in) and self.apply_b_dec_to_input:
            raise ValueError(
                f"b_dec has width d_out = {self.d_out} and cannot be subtracted from inputs of width "
                f"{self.d_in}; set apply_b_dec_to_input = false"
            )
        return self


class RunConfig(Section):
    """A whole run. `fastsae.train(RunConfig(...))`, or the TOML file of `fastsae train`."""

    name: FolderName | None = None
    """Folder of the run below runs_dir; a fresh one is made where not given."""
    n_tokens: PositiveInt = 100_000_000
    """Activations to train on, per SAE: exactly this many."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, document order and ring order."""
    device: str = "auto"
    """Where everything runs: "cuda", "cuda:1", "mps", "cpu"; "auto" is the first there is."""
    runs_dir: Path = Path("runs")
    """Folder of all runs."""
    init_from: Path | None = None
    """SAE, checkpoint or run folder whose weights training starts from."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    ring: RingConfig = RingConfig()
    sae: SAESection = SAESection()
    saes: tuple[SAEEntry, ...] = ()
    """Several SAEs per hook point; every hook point gets every entry."""
    step: StepConfig = StepConfig()
    dead: DeadConfig = DeadConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [variant.name for variant in self.variants()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'two entries of [[saes]] have the folder name "{name}"; give one a name')
        if self.dead.method == "resample":
            other = [v.sae.activation for v in self.variants() if v.sae.activation != "relu"]
            if other:
                raise ValueError(f'dead.method = "resample" is for activation = relu, not {other[0]}')
        return self

    def variants(self) -> list[Variant]:
        """What every hook point gets: one per entry of [[saes]]."""
        if not self.saes:
            return [Variant("", self.sae, self.step, self.seed)]
        result = []
        for entry in self.saes:
            leaves_topk = "activation" in entry.model_fields_set and entry.activation not in TOPK
            base = self.sae.model_copy(update={"k": None}) if leaves_topk else self.sae
            own = {f: getattr(entry, f) for f in SAESection.model_fields if f in entry.model_fields_set}
            own_step = {
                f: getattr(entry.step, f) for f in StepConfig.model_fields if f in entry.step.model_fields_set
            }
            sae, step = base.model_copy(update=own), self.step.model_copy(update=own_step)
            if step.batch_size != self.step.batch_size:
                raise ValueError(
                    "saes.step.batch_size cannot differ from step.batch_size: batches are shared"
                )
            own_seed = {} if entry.seed is None else {"seed": entry.seed}
            fields = {**own, **own_step, **own_seed}
            made = "-".join([sae.activation, *(f"{f}={v}" for f, v in fields.items() if f != "activation")])
            name = entry.name or folder_name(made.replace("/", "_"))
            result.append(Variant(name, sae, step, own_seed.get("seed", self.seed)))
        alone = len(result) == 1 and self.saes[0].name is None and self.saes[0].seed is None
        return [result[0]._replace(name="")] if alone else result


def resolved_step(
    step: StepConfig, sae: SAEConfig, n_steps: int | None, device_type: str = "cpu"
) -> StepConfig:
    """`step` with every "auto" replaced by the value it stands for, but path, which may change within a run.

    Raises ConfigError for a field that belongs to another activation.
    """
    activation = sae.activation
    for field in set().union(*OWN_FIELDS.values()) - set(OWN_FIELDS[activation]):
        if getattr(step, field) is not None:
            raise ConfigError(
                f"step.{field} = {getattr(step, field)} does not belong to activation = {activation}; drop it"
            )
    lrs = {"relu": 3e-4, "jumprelu": 7e-5}
    own: dict[str, Any] = {
        "l1_coefficient": DEFAULT_L1,
        "l0_coefficient": float(sae.d_in),
        "target_l0": float(min(DEFAULT_K, sae.d_sae)),
        "l0_loss": "step",
        "bandwidth": DEFAULT_BANDWIDTH,
        "auxk_coefficient": DEFAULT_AUXK,
        "k_aux": max(sae.d_in // 2, 1),
    }
    warmup = min(1000, math.ceil(0.05 * n_steps)) if n_steps else 1000
    auto: dict[str, Any] = {}
    if step.crossover == "auto":
        auto["crossover"] = CROSSOVER.get(device_type, 0.0)
    if step.lr == "auto":
        auto["lr"] = lrs.get(activation, 2e-4 / math.sqrt(sae.d_sae / 2**14))
    if step.betas == "auto":
        auto["betas"] = (0.0, 0.999) if activation == "jumprelu" else (0.9, 0.999)
    if step.first_moment == "bf16" and auto.get("betas", step.betas)[0] == 0:
        raise ConfigError(
            'step.first_moment = "bf16" is for betas[0] above 0; with 0 no first moment is kept'
        )
    if step.lr_warmup_steps == "auto":
        auto["lr_warmup_steps"] = warmup
    for field in OWN_FIELDS[activation]:
        auto[field] = own[field] if getattr(step, field) is None else getattr(step, field)
    if auto.get("target_l0", 0) > sae.d_sae:
        raise ConfigError(
            f"step.target_l0 = {auto['target_l0']:g} is more than the {sae.d_sae} latents (d_sae)"
        )
    if "k_aux" in auto:
        auto["k_aux"] = min(auto["k_aux"], sae.d_sae)
    return step.model_copy(update=auto)
