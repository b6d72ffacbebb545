"""The source model: load it, resolve its hook points, run it with our hooks and stop behind the last of them.

A forward stops by an exception of our own, raised in the hook that fires last. TransformerLens'
`stop_at_layer` knows only the `blocks` stack and block borders, and the bridges of encoders (BERT) ignore
it and return full logits; the exception works for every model, and in the middle of a block.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fastsae.bare import Bare, agree
from fastsae.boot import boot, weights_of
from fastsae.config import ModelConfig
from fastsae.errors import SourceError, first_line
from fastsae.hook_points import HookFn, HookPoint, probe_lengths, probe_tokens, resolve_hooks
from fastsae.lanes import to_device

# Hook points that fire only while a switch of TransformerLens is on: end of the name -> the switch.
SWITCHES = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
}

LIBRARIES = ("transformer_lens", "transformers")  # whose own hooks in a model change nothing

FAILURES = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    AssertionError,
    OSError,
    SourceError,
)
"""What somebody else's modules, and a compiler of them, raise where a faster way is not to be had."""


class _Stop(BaseException):
    """Ends a forward; no Exception, so that no handler inside the model takes it for a failure."""


@dataclass
class Source:
    """A source model, ready to run.

    Args:
        model: TransformerBridge or HookedTransformer; used where it is, never moved.
        tokenizer: None where there is none: the dataset must then be tokenised already.
        weights: "raw" (Hugging Face's numbers) or "processed" (folded by TransformerLens).
    """

    model: Any
    tokenizer: Any
    weights: str
    hooks: tuple[HookPoint, ...] = ()
    ce_reason: str | None = None
    """Why the model's cross-entropy means nothing; None where it does."""
    dtype: torch.dtype = field(init=False)
    device: torch.device = field(init=False)
    d_vocab: int = field(init=False)
    n_ctx: int | None = field(init=False)
    model_class_name: str = field(init=False)

    def __post_init__(self) -> None:
        parameter = next(p for p in self.model.parameters() if p.is_floating_point())
        self.dtype, self.device = parameter.dtype, parameter.device
        self.d_vocab = int(self.model.cfg.d_vocab)
        self.n_ctx = int(getattr(self.model.cfg, "n_ctx", None) or 0) or None
        self.model_class_name = type(self.model).__name__
        inner = getattr(self.model, "original_model", None)
        self._modules = (*self.model.modules(), *(inner.modules() if inner is not None else ()))
        self._options = _frugal_options(inner)
        self._bare: Bare | None = None
        self._compiled: tuple[tuple[int, ...], Bare] | None = None  # and the shape of tokens that it is for

    @property
    def is_short(self) -> bool:
        """Whether forwards that stop at `hooks` go past the bridge."""
        return self._bare is not None

    def take_short_way(self) -> bool:
        """Let forwards that stop at `hooks` go through the bare Hugging Face module from here on, where that has all of them and, by a
        forward of both, the same activations there; whether they do.
        """
        self._bare = self._compiled = None
        if self.weights != "raw" or getattr(self.model, "original_model", None) is None:
            return False
        try:
            bare = Bare(self.model)
            if not all(bare.place(hook.resolved) for hook in self.hooks):
                return False
            for length in probe_lengths(self):
                tokens = probe_tokens(self, length)
                slow = self._seen(tokens)
                self._bare = bare
                fast = self._seen(tokens)
                self._bare = None
                if not all(agree(slow[name], fast.get(name, tokens)) for name in slow):
                    return False
        except FAILURES:
            self._bare = None
            return False
        self._bare = bare
        return True

    def compile(self, shape: tuple[int, int]) -> bool:
        """Let forwards on tokens of this shape that stop at `hooks` run compiled blocks; whether they do.

        Only past the bridge, and where a forward of both gives the same activations.
        """
        if self._bare is None:
            return False
        tokens = torch.arange(shape[0] * shape[1]).view(shape) % self.d_vocab
        try:
            with self.uncompiled():
                plain = self._seen(tokens)
            compiled = Bare(self.model)
            compiled.compile_blocks(hook.resolved for hook in self.hooks)
            self._compiled = shape, compiled
            found = self._seen(tokens)
            agrees = all(agree(plain[name], found[name]) for name in plain)
        except FAILURES:
            agrees = False
        if not agrees:
            self._compiled = None
        return agrees

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """In this block every forward runs the blocks as they are."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    def compile_no_more(self) -> None:
        """Undo `compile`."""
        self._compiled = None

    def _is_hooked(self) -> bool:
        """Whether somebody else has hooks in the model, which have to fire."""
        fns = [
            getattr(handle, "user_hook", None)
            for point in self.model.hook_dict.values()
            for handle in point.fwd_hooks
        ]
        for module in self._modules:
            fns += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        return any(str(getattr(fn, "__module__", "")).split(".")[0] not in LIBRARIES for fn in fns)

    def _seen(self, tokens: Tensor) -> dict[str, Tensor]:
        """What `hooks` see."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> HookFn:
            def fn(acts: Tensor) -> None:
                seen[name] = acts.clone()

            return fn

        self.forward(tokens, [(hook.resolved, keep(hook.name)) for hook in self.hooks], stop=True)
        return seen

    def check_context_size(self, context_size: int) -> None:
        """Raise SourceError where the model cannot take contexts of `context_size` tokens."""
        if self.n_ctx is not None and context_size > self.n_ctx:
            raise SourceError(
                f"data.context_size = {context_size} is more than the {self.n_ctx} tokens that the model takes; "
                f"use at most {self.n_ctx}"
            )

    def to_device(self, tokens: Int[Tensor, "n context"]) -> Int[Tensor, "n context"]:
        """CPU tokens on the model's device; a GPU is not waited for."""
        return to_device(tokens, self.device)

    def forward(
        self,
        tokens: Int[Tensor, "n context"],
        hooks: Sequence[tuple[str, HookFn]] = (),
        *,
        stop: bool = False,
    ) -> Float[Tensor, "n context d_vocab"] | None:
        """One forward on tokens as they are, in eval mode, with hooks at places given by `resolved` name.

        With `stop` nothing runs behind the hook that fires last, and None is returned; what hooks return is then of no use. On leaving, also by
        an exception, our hooks are gone, and modes, switches and the user's own hooks are as they were.

        Raises SourceError if a hook did not fire.
        """
        if stop and self._bare is not None and not self._is_hooked():
            bare = self._bare
            if self._compiled is not None and tuple(tokens.shape) == self._compiled[0]:
                bare = self._compiled[1]
            silent = self._run_bare(bare, tokens, hooks)
            if silent is not None:
                if silent:
                    raise SourceError(f"{', '.join(silent)} did not fire in a forward")
                return None
        logits, silent = self.run(tokens, hooks, stop)
        if silent:
            raise SourceError(f"{', '.join(silent)} did not fire in a forward")
        return logits

    def _run_bare(self, bare: Bare, tokens: Tensor, hooks: Sequence[tuple[str, HookFn]]) -> list[str] | None:
        """The places that did not fire; None where the bare module has not all of them, and nothing was run."""
        if not hooks or not all(bare.place(name) for name, _ in hooks):
            return None
        waiting = set(range(len(hooks)))

        def taking(number: int, fn: HookFn) -> Callable[[Tensor], None]:
            def take(acts: Tensor) -> None:
                waiting.discard(number)
                fn(acts)
                if not waiting:
                    raise _Stop

            return take

        try:
            taken = [(name, taking(number, fn)) for number, (name, fn) in enumerate(hooks)]
            bare.forward(self.to_device(tokens), taken, self._options)
        except _Stop:
            pass
        return [hooks[number][0] for number in sorted(waiting)]

    @torch.no_grad()
    def run(
        self, tokens: Tensor, hooks: Sequence[tuple[str, HookFn]], stop: bool
    ) -> tuple[Tensor | None, list[str]]:
        """`forward` through the model as TransformerLens made it: the logits, and the places that did not fire."""
        points, waiting = self.model.hook_dict, set(range(len(hooks)))

        def attached(number: int, fn: HookFn) -> Callable[..., Tensor | None]:
            def hook_fn(acts: Tensor, hook: Any) -> Tensor | None:
                waiting.discard(number)
                heads = acts.shape[2:] if acts.ndim > 3 else None
                new = fn(acts if heads is None else acts.flatten(2))
                if stop and not waiting:
                    raise _Stop
                return new if new is None or heads is None else new.reshape(*new.shape[:2], *heads)

            return hook_fn

        with ExitStack() as cleanup:
            cleanup.enter_context(eval_mode(self._modules))
            cleanup.enter_context(_switched_on(self.model, [name for name, _ in hooks]))
            for number, (name, fn) in enumerate(hooks):
                points[name].add_hook(attached(number, fn))
                cleanup.callback(_detach, points[name], points[name].fwd_hooks[-1])
            try:
                logits = self.model(self.to_device(tokens), return_type="logits", **self._options)
            except _Stop:
                logits = None
        return logits, [hooks[number][0] for number in sorted(waiting)]


def load_source(cfg: ModelConfig, device: torch.device, model: Any | None = None) -> Source:
    """Load the model that `cfg` names, or take `model`, and resolve its hook points.

    `model` may be a TransformerBridge or a HookedTransformer; it stays as it is, so `cfg.dtype` and
    `cfg.weights` do not act on it. Raises SourceError, in one line, for all that a user can mend.
    """
    missing: tuple[str, ...] = ()
    if model is None:
        model, tokenizer, missing = boot(cfg, device)
        source = Source(model, tokenizer, cfg.weights)
    else:
        if isinstance(model, nn.DataParallel):
            warnings.warn("the model is unwrapped from DataParallel: it runs on one device", stacklevel=2)
            model = model.module
        if not hasattr(model, "hook_dict"):
            raise SourceError(
                f"model is a {type(model).__name__}; give a TransformerBridge or a HookedTransformer of TransformerLens"
            )
        source = Source(model, getattr(model, "tokenizer", None), weights_of(model))
        if (source.device.type, source.device.index or 0) != (device.type, device.index or 0):
            raise SourceError(
                f"the model is on {source.device} and the run on {device}; move the model, or set device"
            )
        if source.weights != cfg.weights:
            warnings.warn(
                f"the model's weights are {source.weights}; model.weights is not used", stacklevel=2
            )
    source.hooks = resolve_hooks(source, cfg.hook)
    source.ce_reason = _no_cross_entropy(source, missing)
    source.take_short_way()
    return source


def _no_cross_entropy(source: Source, missing: Iterable[str]) -> str | None:
    """Why the model's next-token cross-entropy means nothing; None where it does.

    Causality is measured: a last token that changes earlier logits says more than a config.
    """
    name, cfg = source.model_class_name, source.model.cfg
    inner = getattr(source.model, "original_model", None)
    if inner is not None:
        name = type(inner).__name__
    logits = source.forward(probe_tokens(source, probe_lengths(source)[0]))
    sizes = {source.d_vocab, int(getattr(cfg, "d_vocab_out", source.d_vocab))}
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[-1] not in sizes:
        return f"{name} yields no next-token logits"
    if not logits.isfinite().all():
        return f"{name}'s logits are NaN or infinite in {source.dtype}"
    early = logits[:, :-1].float()
    causal = (early[0] - early[1]).abs().max() <= 1e-3 * early.abs().max()
    declared = (
        getattr(cfg, "attention_dir", "causal") == "causal"
        and getattr(getattr(source.model, "adapter", None), "supports_causal_loss", True)
        and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    )
    if not (causal and declared):
        return f"{name} is not a causal language model"
    if missing := sorted(missing):
        return f"the weights hold no language-model head ({missing[0]} is missing), so its output is random"
    return None


def _frugal_options(inner: Any) -> dict[str, bool]:
    """Keyword arguments that keep a Hugging Face model from collecting attention patterns and a KV cache.

    TransformerLens loads models with `output_attentions` on; its hooks work without.
    """
    if inner is None:
        return {}
    parameters = inspect.signature(type(inner).forward).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    options = {
        "use_cache": "use_cache" in parameters,
        "output_attentions": anything or "output_attentions" in parameters,
    }
    return {name: False for name, known in options.items() if known}


def _switch(place: str) -> str | None:
    return next((switch for end, switch in SWITCHES.items() if place.endswith(end)), None)


@contextmanager
def _switched_on(model: Any, places: Iterable[str]) -> Iterator[None]:
    """TransformerLens' switches that these places need are on inside, and off again where they were off.

    Raises SourceError where the model refuses one.
    """
    wanted = {switch: place for place in places if (switch := _switch(place))}
    with ExitStack() as cleanup:
        for switch, place in sorted(wanted.items()):
            set_switch = getattr(model, f"set_{switch}", None)
            if set_switch is None or getattr(model.cfg, switch, False):
                continue
            cleanup.callback(set_switch, False)
            try:
                set_switch(True)
            except (NotImplementedError, ValueError, AssertionError) as error:
                raise SourceError(f"{place} needs {switch}, which fails: {first_line(error)}") from None
        yield


@contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Every module is in eval mode inside, and in its own mode again afterwards."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _detach(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks.remove(handle)
