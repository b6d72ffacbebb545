"""Pipeline: the job of `sparse_autoencoder`'s class of that name, on our ring, step and validation.

The constructor's arguments and the methods are that library's; what its documentation promises happens. One ring-like store per
generation, filled by hooks during the forward; one TrainStep, and so one optimizer, per component for the life of the object.
"""

import logging
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fastsae.checkpoint import appearing, read_run, read_steps, write_steps
from fastsae.config import ModelConfig, folder_name
from fastsae.errors import ConfigError, DataError, NonFiniteLossError, RunError, reason
from fastsae.evaluate import Validation, evaluate
from fastsae.harvest import Harvester
from fastsae.interrupt import InterruptedRun, interruptible, until
from fastsae.origin import facts_of, name_of, sae_metadata
from fastsae.packing import TokenBatch
from fastsae.ring import RingBuffer
from fastsae.seeds import derive
from fastsae.source import load_source
from fastsae.sparse_autoencoder import dashboard
from fastsae.sparse_autoencoder.autoencoder import LitSparseAutoencoder, SparseAutoencoder
from fastsae.sparse_autoencoder.source_datasets import SourceDataset
from fastsae.sparse_autoencoder.store import ActivationStore, check_positive
from fastsae.step import TrainStep
from fastsae.tokens import Tokens
from fastsae.train import crossed

logger = logging.getLogger(__name__)

CHECKPOINTS = Path(tempfile.gettempdir()) / "sparse_autoencoder"
FIELDS = {"total_activations_trained_on", "cache_names", "n_generated", "n_held_out", "tokens", "store"}
HELD_OUT = 1024  # activations to validate on, where nobody has said how many before the first are needed


class _Ended(DataError):
    """The dataset has no activation more."""


class Pipeline:
    """Generate activations, train on them, validate, save; `run_pipeline` does all of it in turn.

    Args:
        autoencoder: a LitSparseAutoencoder, or a SparseAutoencoder, which is then trained with the defaults of the former.
        cache_names: hook points, one per component.
        layer: the deepest layer of these; None: as their names say.
        source_dataset: contexts of token ids.
        source_model: a TransformerBridge or HookedTransformer, on the device to train on; one wrapped in DataParallel is unwrapped with a warning.
        n_input_features, n_learned_features: d_in and d_sae, which must be the autoencoder's.
        run_name: in the names of checkpoints.
        checkpoint_directory: where these go.
        log_frequency: steps between two rows of figures, to wandb where a run of it is active.
        num_workers_data_loading: has no meaning here: a thread reads and tokenises ahead, and there is no loader.
        source_data_batch_size: contexts per forward.
        lr, betas, precision: of the step.
        seed: of the order of tokens and activations.
    Raises: ConfigError or SourceError, before any forward of a run, for arguments that do not fit one another, or the model.
    """

    def __init__(
        self,
        autoencoder: SparseAutoencoder,
        cache_names: Sequence[str],
        layer: int | None,
        source_dataset: SourceDataset,
        source_model: Any,
        n_input_features: int,
        n_learned_features: int,
        run_name: str = "sparse_autoencoder",
        checkpoint_directory: Path | str = CHECKPOINTS,
        log_frequency: int = 100,
        num_workers_data_loading: int = 0,
        source_data_batch_size: int = 12,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        inner = getattr(source_model, "module", source_model)
        for name, value, kind, allowed in (
            ("autoencoder", autoencoder, SparseAutoencoder, "a LitSparseAutoencoder or a SparseAutoencoder"),
            ("source_dataset", source_dataset, SourceDataset, "a PreTokenizedDataset or a TextDataset"),
            (
                "source_model",
                inner,
                nn.Module,
                "a TransformerBridge or a HookedTransformer of TransformerLens",
            ),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"{name} is a {type(value).__name__}; give {allowed}")
        if isinstance(cache_names, str) or not isinstance(cache_names, Sequence):
            raise ConfigError(f"cache_names must be a list of hook points: say ['{cache_names}']")
        self.autoencoder, self.cache_names = autoencoder, list(cache_names)
        self.source_dataset, self.source_model = source_dataset, source_model
        self.n_input_features, self.n_learned_features = n_input_features, n_learned_features
        self.run_name, self.checkpoint_directory = run_name, Path(checkpoint_directory).expanduser()
        self.log_frequency, self.source_data_batch_size = log_frequency, source_data_batch_size
        self.num_workers_data_loading = num_workers_data_loading
        self.seed = seed
        self.total_activations_trained_on = self._reported_at = 0
        self.progress_bar: Any = None
        self._check_shape()
        device = next(inner.parameters()).device
        cfg = ModelConfig(hook=tuple(self.cache_names), batch_size=source_data_batch_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the model's weights are")
            self._source = load_source(cfg, device, source_model)
        self.layer = self._checked_layer(layer)
        self._source.check_context_size(source_dataset.context_size)
        for hook in self._source.hooks:
            if hook.width != n_input_features:
                raise ConfigError(
                    f"{hook.name} has {hook.width} numbers per token, but n_input_features = {n_input_features}"
                )
        autoencoder.to(device)
        config = autoencoder.config if isinstance(autoencoder, LitSparseAutoencoder) else None
        l1 = 0.001 if config is None else config.l1_coefficient
        resample = None if config is None else config.resample
        step = autoencoder.step_config(l1, lr=lr, betas=betas, precision=precision)
        logger.info(
            "l1_coefficient = %g beside a mean over %d features is %g beside our sum over them",
            l1,
            n_input_features,
            step.l1_coefficient,
        )
        self.steps = {
            name: TrainStep(sae, step, resample=resample, seed=seed)
            for name, sae in zip(self.cache_names, autoencoder.components, strict=True)
        }
        self._tokens: Tokens | None = None
        self._n_generated = 0
        self._n_held_out: int | None = None
        self._resume_at: dict[str, Any] | None = None
        # while run_pipeline is in the middle of a store, and what is left of one where it ended there, or a checkpoint did
        self._store: ActivationStore | None = None
        self._left: dict[str, Any] | None = None

    @property
    def n_components(self) -> int:
        """Hook points."""
        return len(self.cache_names)

    @property
    def component_names(self) -> list[str]:
        """What figures are logged under."""
        config = self.autoencoder.config
        return list(getattr(config, "component_names", self.cache_names))

    def generate_activations(self, store_size: int) -> ActivationStore:
        """A store of that many activations per component, shuffled; fewer where the dataset ends first.

        Raises ConfigError unless store_size is a multiple of what a forward brings, DataError where the dataset has ended.
        """
        check_positive(store_size=store_size)
        per_forward = self._per_forward
        if store_size % per_forward:
            nearest = max(round(store_size / per_forward), 1) * per_forward
            raise ConfigError(
                f"store_size = {store_size} is no multiple of source_data_batch_size x context_size = {self.source_data_batch_size} x "
                f"{self.source_dataset.context_size} = {per_forward}; the nearest is {nearest}"
            )
        return self._generate(store_size)

    def train_autoencoder(
        self, activation_store: ActivationStore, train_batch_size: int
    ) -> Int[Tensor, "components d_sae"]:
        """Train every component on all that the store holds; returns how often each latent fired on that."""
        before = self._fired()
        if not isinstance(activation_store, ActivationStore) or activation_store.names != self.cache_names:
            raise ConfigError(
                "activation_store must be one that this pipeline's generate_activations returned"
            )
        for _ in self._train(activation_store, train_batch_size):
            pass
        self._report()
        return self._fired() - before

    def validate_sae(self, validation_n_activations: int) -> dict[str, Validation]:
        """Figures per component on at least so many held-out activations (whole contexts), the same ones at every call; logged to wandb
        where a run of it is active. What is held out is said by the first use of the dataset; beyond that there is a warning."""
        check_positive(validation_n_activations=validation_n_activations)
        found = evaluate(
            self._source,
            {
                name: (hook, step.sae)
                for name, (hook, step) in zip(self.component_names, self.steps.items(), strict=True)
            },
            self._held_out(validation_n_activations),
            batch_size=self.source_data_batch_size,
        )
        dashboard.log(dashboard.validation_row(found))
        return found

    def save_checkpoint(self, *, is_final: bool = False) -> Path:
        """Write `<run_name>_<activations>` or `<run_name>_final`: a folder that fastsae.load_all opens, and `load_checkpoint`; then, where a run
        of wandb is active, upload it, which may fail without harm. Returns the folder."""
        name = f"{self.run_name}_{'final' if is_final else self.total_activations_trained_on}"
        folder = self.checkpoint_directory / name
        state = {
            "total_activations_trained_on": self.total_activations_trained_on,
            "cache_names": self.cache_names,
            "n_generated": self._n_generated,
            "n_held_out": self._n_held_out,
            "tokens": None if self._tokens is None else self._tokens.train.state_dict(),
            "store": self._left if self._store is None else self._store.place(),
        }
        data, facts = self.source_dataset.config, facts_of(self._source)
        facts = facts._replace(separator=facts.separator and self.source_dataset.tokenizer is not None)
        for hook, step in self.steps.items():
            step.sae.metadata = sae_metadata(
                name_of(self._source),
                data,
                facts,
                hook,
                step.sae.cfg,
                step.cfg,
                given=True,
                n_tokens=self.total_activations_trained_on,
                seed=self.seed,
            )
        with appearing(folder, "the checkpoint ") as aside:
            write_steps(aside, self.steps, state)
        dashboard.upload(folder)
        return folder

    def load_checkpoint(self, folder: Path | str) -> None:
        """Go on from a checkpoint of a pipeline that was made with the same arguments: weights, optimizer, counter, and the next activations, to
        the bit. What run_pipeline had not yet used of a store is generated again when that is called.

        Raises RunError for a folder that holds no such checkpoint; all is as it was then. What uses the dataset next raises DataError where it is
        another one.
        """
        state = read_run(Path(folder))
        if missing := sorted(FIELDS - state.keys()):
            raise RunError(
                f"{folder} is no checkpoint of a pipeline: its run.json lacks {', '.join(missing)}"
            )
        if state["cache_names"] != self.cache_names:
            raise RunError(f"{folder} is of {state['cache_names']}, not of {self.cache_names}")
        read_steps(Path(folder), self.steps)
        self.total_activations_trained_on = state["total_activations_trained_on"]
        self._n_generated, self._n_held_out = state["n_generated"], state["n_held_out"]
        self._resume_at, self._left = state["tokens"], state["store"]
        if self._tokens is not None:
            self._tokens.train.close()
        self._tokens = None  # opened again where they stood

    def run_pipeline(
        self,
        train_batch_size: int,
        max_store_size: int,
        max_activations: int,
        validation_n_activations: int = 1024,
        validate_frequency: int | None = None,
        checkpoint_frequency: int | None = None,
    ) -> None:
        """Train on exactly max_activations per component, in stores of at most max_store_size, and save a final checkpoint.

        Validates and saves at every multiple of the frequencies, counted over the life of the object. Ctrl-C, or a dataset that ends, ends it
        with the final checkpoint. Called again, it goes on.
        """
        counts = {"train_batch_size": train_batch_size, "max_store_size": max_store_size}
        counts |= {"max_activations": max_activations, "validation_n_activations": validation_n_activations}
        every = {"validate_frequency": validate_frequency, "checkpoint_frequency": checkpoint_frequency}
        check_positive(**counts, **{name: n for name, n in every.items() if n is not None})
        try:
            self.checkpoint_directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot write checkpoints into {self.checkpoint_directory}: {reason(error)}"
            ) from None
        per_forward = self._per_forward
        store_size = max_store_size // per_forward * per_forward
        if store_size == 0:
            raise ConfigError(
                f"max_store_size = {max_store_size} holds not one forward: source_data_batch_size x context_size = "
                f"{self.source_data_batch_size} x {self.source_dataset.context_size} = {per_forward}"
            )
        self._opened(validation_n_activations)
        goal = self.total_activations_trained_on + max_activations
        with interruptible() as stop, _progress_bar(max_activations) as self.progress_bar:
            while (n_left := goal - self.total_activations_trained_on) > 0 and not stop.is_set():
                self._stage("generate")
                try:
                    self._store = self._next_store(min(store_size, n_left), stop)
                except InterruptedRun:
                    break
                except _Ended as error:
                    warnings.warn(f"{error}; the run ends here", stacklevel=2)
                    break
                try:
                    self._stage("train")
                    for n in self._train(self._store, train_batch_size, n_left):
                        if crossed(self.total_activations_trained_on, n, validate_frequency):
                            self._stage("validate")
                            self.validate_sae(validation_n_activations)
                        if crossed(self.total_activations_trained_on, n, checkpoint_frequency):
                            self._stage("checkpoint")
                            self.save_checkpoint()
                        if stop.is_set():
                            break
                        self._stage("train")
                finally:
                    self._left, self._store = self._store.place(), None  # its memory, before the next
            self._report()
            self.save_checkpoint(is_final=True)

    def _train(self, store: ActivationStore, batch_size: int, n_rows: int | None = None) -> Iterator[int]:
        """Steps on the store's next n_rows, or on all that is left; yields the size of each batch behind it."""
        for batch in store.batches(batch_size, n_rows):
            n = 0
            for name, step in self.steps.items():
                step(batch[name])
                n = len(batch[name])
            self.total_activations_trained_on += n
            if self.progress_bar is not None:
                self.progress_bar.update(n)
            if next(iter(self.steps.values())).n_done % self.log_frequency == 0:
                self._report()
            yield n

    def _next_store(self, n_rows: int, stop: threading.Event) -> ActivationStore:
        """What is left of the one that run_pipeline was in the middle of; else n_rows more. Raises InterruptedRun, and nothing has happened."""
        left, stream = self._left, self._opened(HELD_OUT).train
        if left is None:
            return self._generate(n_rows, stop)
        now = stream.state_dict()
        stream.load_state_dict(left["tokens"])
        try:
            store = self._filled(left["n_rows"], left["number"], stop)
        finally:
            if stream.state_dict() != now:
                stream.load_state_dict(now)
        store.ring.begin(left["ring"])
        self._left = None
        return store

    def _generate(self, n_rows: int, stop: threading.Event | None = None) -> ActivationStore:
        stream = self._opened(HELD_OUT).train
        before = stream.state_dict()
        try:
            store = self._filled(n_rows, self._n_generated, stop or threading.Event())
        except BaseException:
            stream.load_state_dict(before)
            raise
        self._n_generated += 1
        store.ring.begin()
        return store

    def _filled(self, n_rows: int, number: int, stop: threading.Event) -> ActivationStore:
        """From the stream's next tokens, in the order of the number-th store."""
        stream = self._opened(HELD_OUT).train
        origin = {"n_rows": n_rows, "number": number, "tokens": stream.state_dict()}
        ring = RingBuffer(
            dict.fromkeys(self.cache_names, self.n_input_features),
            n_rows,
            1,
            n_rows=n_rows,
            max_write=self._per_forward,
            device=self._source.device,
            dtype=self._source.dtype,
            seed=derive(self.seed, "pipeline/store", number),
        )
        harvester = Harvester(self._source, stream, ring, self.source_data_batch_size)
        ring.fill(until(stop, harvester.forward))
        if ring.n_written == 0:
            raise _Ended("the dataset has ended")
        return ActivationStore(ring, self.cache_names, origin)

    def _opened(self, n_validation: int) -> Tokens:
        if self._tokens is None:
            self._n_held_out = self._n_held_out or n_validation
            tokens = self.source_dataset.open(
                n_validation=self._n_held_out, seed=self.seed, d_vocab=self._source.d_vocab
            )
            if self._resume_at is not None:
                tokens.train.load_state_dict(self._resume_at)
            self._tokens = tokens
        return self._tokens

    def _held_out(self, n: int) -> TokenBatch:
        """Contexts with at least n positions that count, from the first ones that are held out; all where these are fewer."""
        held_out = self._opened(n).validation
        counted = held_out.keep.sum(1).cumsum(0)
        n_contexts = int((counted < n).sum()) + 1
        if n_contexts > len(held_out):
            warnings.warn(
                f"validating on the {int(counted[-1])} activations that are held out, fewer than {n}: the first use of the dataset says how many",
                stacklevel=3,
            )
        return held_out[:n_contexts]

    @property
    def _per_forward(self) -> int:
        return self.source_data_batch_size * self.source_dataset.context_size

    def _fired(self) -> Int[Tensor, "components d_sae"]:
        return torch.stack([step.times_fired for step in self.steps.values()]).cpu()

    def _stage(self, stage: str) -> None:
        if self.progress_bar is not None:
            self.progress_bar.set_postfix(stage=stage)

    def _report(self) -> None:
        """Figures since the last report, to wandb, under that library's keys and in its scale. Raises NonFiniteLossError, behind a checkpoint."""
        if self._reported_at == self.total_activations_trained_on:
            return
        self._reported_at = self.total_activations_trained_on
        read = {
            name: step.read() for name, step in zip(self.component_names, self.steps.values(), strict=True)
        }
        rows = {
            name: dashboard.training_row(figures, self.n_input_features, self.n_learned_features)
            for name, figures in read.items()
        }
        dashboard.log(dashboard.with_means(rows))
        for name, figures in read.items():
            if (bad := figures["first_bad_step"]) >= 0:
                folder = self.save_checkpoint()
                raise NonFiniteLossError(
                    f"the loss of {name} became NaN or infinite at step {bad:.0f}, and nothing moved by it; checkpoint: {folder}"
                )

    def _check_shape(self) -> None:
        config = self.autoencoder.config
        own = {
            "n_input_features": config.n_input_features,
            "n_learned_features": config.n_learned_features,
        }
        for field, value in own.items():
            if getattr(self, field) != value:
                raise ConfigError(f"{field} = {getattr(self, field)}, but the autoencoder's is {value}")
        n = config.n_components or 1
        if len(self.cache_names) != n:
            raise ConfigError(
                f"cache_names are {len(self.cache_names)} ({', '.join(self.cache_names)}), but the autoencoder has {n} components"
            )
        names = self.component_names
        if len(set(names)) != n or len(names) != n:
            raise ConfigError(f"component_names must be {n}, each another: {', '.join(names)}")
        if any("*" in name for name in self.cache_names):
            raise ConfigError(f"cache_names must be hook points, without a *: {', '.join(self.cache_names)}")
        try:
            folder_name(self.run_name)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"run_name = {self.run_name!r}: {error}") from None
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed = {self.seed!r}; must be an integer of at least 0")
        check_positive(log_frequency=self.log_frequency, source_data_batch_size=self.source_data_batch_size)

    def _checked_layer(self, layer: int | None) -> int:
        deepest = max((h.layer for h in self._source.hooks if h.layer is not None), default=0)
        if layer is not None and (not isinstance(layer, int) or layer < deepest):
            raise ConfigError(
                f"layer = {layer!r}, but {', '.join(self.cache_names)} reach layer {deepest}; say layer = {deepest}, or None"
            )
        return deepest if layer is None else layer


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="activations trained on", unit=" activations", unit_scale=True)
