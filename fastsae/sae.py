"""SAE: a sparse autoencoder as a plain nn.Module, in raw units, in and out.

    pre_acts = (scale * x - b_dec) W_enc + b_enc
    x_hat    = (activation(pre_acts) W_dec + b_dec) / scale

Activations are homogeneous in the scale, so the module computes the same thing with the biases divided
by it; `save` writes those biases, and a loaded SAE has scale 1.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastsae import __version__
from fastsae.activations import Codes, activate, has_sparse_ops, jumprelu, to_codes
from fastsae.config import SAEConfig
from fastsae.errors import ConfigError, RunError, reason
from fastsae.files import save_tensors
from fastsae.seeds import generator

if TYPE_CHECKING:
    import fastsae_kernels

# Of d_sae: up to here `forward` goes through codes. On 2 cores they take two thirds of the dense form's time at 1/16, half with the
# backward pass (benches.codes_or_dense). On a GPU the cost model says 1/80; not measured.
SPARSE_SHARE = {"cpu": 1 / 16, "cuda": 1 / 80}
FREE_NORM = 0.1  # norm of decoder rows at the start where it is free; SAELens' decoder_init_norm
SAELENS_VERSION = "6.54.12"  # the release whose folder layout `save` writes
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"


class SAE(nn.Module):
    """Sparse autoencoder. Parameters: W_enc [d_in, d_sae] (a transposed view: latent-major in memory),
    b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], and for jumprelu threshold [d_sae], at least 0; buffers: scale [], and for
    batchtopk threshold []: the running mean, over training, of the smallest pre-activation that was selected, by which `encode`
    goes, one input at a time. Biases and thresholds are in scaled units.

    Args:
        cfg: its shape.
        device, dtype: of the parameters.
        seed: of the initial weights: random decoder rows, W_enc their transpose, scaled so that
            the first x_hat has about the norm of x, zero biases.
    """

    def __init__(
        self,
        cfg: SAEConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.metadata: dict[str, Any] = {}
        d_out = cfg.d_out or cfg.d_in
        norm = FREE_NORM if cfg.decoder_norm == "free" and cfg.activation == "relu" else 1.0
        rows = torch.randn(cfg.d_sae, d_out, generator=generator(seed, "sae/W_dec"), dtype=torch.float32)
        W_dec = norm * rows / rows.norm(dim=-1, keepdim=True)
        if d_out == cfg.d_in:
            W_encT = W_dec * (2 * cfg.d_in / cfg.d_sae / norm**2)
        else:
            W_encT = torch.randn(cfg.d_sae, cfg.d_in, generator=generator(seed, "sae/W_enc")) / cfg.d_in**0.5
        self.W_enc = nn.Parameter(W_encT.to(device, dtype).clone().T)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(W_dec.to(device, dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype))
        self.scale: Tensor
        self.register_buffer("scale", torch.ones((), device=device, dtype=dtype))
        self.threshold: Tensor | None
        if cfg.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros_like(self.b_enc))
        else:
            level = torch.zeros((), device=device, dtype=dtype) if cfg.activation == "batchtopk" else None
            self.register_buffer("threshold", level)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations of raw activations, in raw units."""
        self._check_width(x)
        x = x.to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec / self.scale
        return x @ self.W_enc + self.b_enc / self.scale

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of raw activations, in raw units; 0 where inactive. Raises ValueError for a wrong width."""
        pre_acts = self.pre_acts(x)
        if self.threshold is None:
            return activate(pre_acts, self.cfg)
        return jumprelu(pre_acts, self.cfg, self.threshold / self.scale)

    def encode_sparse(self, x: Float[Tensor, "*batch d_in"]) -> Codes:
        """Latents as Codes(indices, values, counts): k slots per row for topk, else as many as the fullest row has, which waits for
        the device. Differentiable at the cost of the active latents alone: an inactive one passes no gradient.
        """
        self._check_width(x)
        k = self.cfg.k if self.cfg.activation == "topk" else None
        if not has_sparse_ops(x):
            return to_codes(self.encode(x), k)
        from fastsae_kernels import encode_codes  # loads triton: not at the top

        codes = encode_codes(
            x.reshape(-1, self.cfg.d_in).contiguous(),
            _as_autocast(self.W_enc.T.contiguous().T),  # no copy: latent-major in memory
            self.b_enc / self.scale,
            self.b_dec / self.scale if self.cfg.apply_b_dec_to_input else None,
            k=k,
            threshold=self._thresholds(),
            width=None,
        )
        lead, width = x.shape[:-1], codes.indices.shape[1]
        return Codes(
            codes.indices.long().view(*lead, width),
            _as_with(self.b_enc, codes.values.view(*lead, width)),
            codes.counts.long().view(lead),
        )

    def decode(
        self, acts: "Float[Tensor, '*batch d_sae'] | Codes | fastsae_kernels.Codes"
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction in raw units, from dense latents or from Codes: one row of W_dec per active latent.

        The indices of one row must be different and in [0, d_sae), which is not checked. Codes of fastsae_kernels are taken too.
        """
        b_dec = self.b_dec / self.scale
        if isinstance(acts, Tensor):
            return acts @ self.W_dec + b_dec
        if not has_sparse_ops(acts.values):
            return torch.einsum("...k,...kd->...d", acts.values, self.W_dec[acts.indices]) + b_dec
        import fastsae_kernels as ops

        if isinstance(acts, ops.Codes):
            codes, lead = acts, acts.counts.shape
        else:
            lead, rows = acts.counts.shape, (acts.counts.numel(), acts.indices.shape[-1])
            codes = ops.Codes(
                acts.indices.int().reshape(rows).contiguous(),
                acts.values.reshape(rows).contiguous(),
                acts.counts.int().reshape(-1).contiguous(),
            )
        x_hat = ops.decode(codes, _as_autocast(self.W_dec), b_dec)
        return _as_with(b_dec, x_hat.view(*lead, self.W_dec.shape[1]))

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """decode(encode(x)), through codes where k is small beside d_sae.

        The others stay dense here: how many latents are active is known on the device alone, and with ReLU it is half at the start.
        """
        k = self.cfg.k if self.cfg.activation == "topk" else None
        sparse = k is not None and k <= SPARSE_SHARE.get(x.device.type, 0.0) * self.cfg.d_sae
        return self.decode(self.encode_sparse(x) if sparse else self.encode(x))

    def _thresholds(self) -> Float[Tensor, " d_sae"] | None:
        """In raw units, one per latent."""
        if self.threshold is None:
            return None
        level = (self.threshold.detach() / self.scale).to(
            torch.promote_types(self.threshold.dtype, torch.float32)
        )
        return level.expand(self.cfg.d_sae).contiguous()

    def extra_repr(self) -> str:
        cfg = self.cfg
        d_out = "" if cfg.d_out in (None, cfg.d_in) else f", d_out={cfg.d_out}"
        k = "" if cfg.k is None else f", k={cfg.k}"
        return f"d_in={cfg.d_in}{d_out}, d_sae={cfg.d_sae}, activation={cfg.activation}{k}"

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.cfg.d_in:
            raise ValueError(f"x is {tuple(x.shape)}; its last size must be d_in = {self.cfg.d_in}")

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """The parameters with the scale folded into biases and thresholds: contiguous, for raw inputs."""
        tensors = {
            "W_enc": self.W_enc,
            "b_enc": self.b_enc / self.scale,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec / self.scale,
        }
        thresholds = self._thresholds()
        if thresholds is not None:
            tensors["threshold"] = thresholds.to(self.b_enc.dtype)
        return {name: t.detach().contiguous() for name, t in tensors.items()}

    @torch.no_grad()
    def load_folded(self, tensors: dict[str, Tensor]) -> None:
        """Take over parameters for raw inputs; the scale that is set is divided out of them."""
        self.W_enc.copy_(tensors["W_enc"])
        self.W_dec.copy_(tensors["W_dec"])
        self.b_enc.copy_(tensors["b_enc"] * self.scale.cpu())
        self.b_dec.copy_(tensors["b_dec"] * self.scale.cpu())
        if self.threshold is not None:
            thresholds = tensors["threshold"] * self.scale.cpu()
            self.threshold.copy_(thresholds if self.threshold.ndim else thresholds[0])

    def save(self, folder: Path | str) -> None:
        """Write SAELens' layout: cfg.json and sae_weights.safetensors, each aside first, then renamed.

        Raises RunError where the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
            save_tensors(self.folded(), f"{weights}.part")
            os.replace(f"{weights}.part", weights)
            Path(f"{config}.part").write_text(
                json.dumps(self._saelens_config(), indent=1) + "\n", encoding="utf-8"
            )
            os.replace(f"{config}.part", config)
        except (OSError, SafetensorError) as error:
            raise RunError(f"cannot write {folder}: {reason(error)}") from None

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str | None = None) -> "SAE":
        """Read a folder that `save` wrote. Raises RunError where a file is missing, torn or not ours."""
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS_FILE)
        except (OSError, SafetensorError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(f"cannot read an SAE in {folder}: {error}") from None
        if not isinstance(config, dict) or "fastsae" not in config:
            raise RunError(f"{folder / CONFIG_FILE} was not written by fastsae (it has no key named fastsae)")
        try:
            shape = SAEConfig(**config["fastsae"]["config"])
        except (ConfigError, KeyError, TypeError) as error:
            raise RunError(f"{folder / CONFIG_FILE}: {error}") from None
        dtype = tensors["W_dec"].dtype if "W_dec" in tensors else torch.float32
        sae = cls(shape, device=device, dtype=dtype)
        wanted = {name: tuple(t.shape) for name, t in sae.folded().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if wanted != found:
            raise RunError(f"{folder / WEIGHTS_FILE} has {found}, but its {CONFIG_FILE} wants {wanted}")
        sae.load_folded(tensors)
        metadata = config.get("metadata")
        if isinstance(metadata, dict):
            sae.metadata = {k: v for k, v in metadata.items() if not k.startswith("sae_lens")}
        return sae

    def _saelens_config(self) -> dict[str, Any]:
        cfg, transcoder = self.cfg, (self.cfg.d_out or self.cfg.d_in) != self.cfg.d_in
        kind = {"relu": "standard", "batchtopk": "jumprelu"}.get(cfg.activation, cfg.activation)
        if transcoder:
            kind = "transcoder" if kind == "standard" else f"{kind}_transcoder"
        return {
            "architecture": kind,
            "d_in": cfg.d_in,
            "d_sae": cfg.d_sae,
            **({"d_out": cfg.d_out} if transcoder else {}),
            **({"k": cfg.k, "rescale_acts_by_decoder_norm": False} if cfg.activation == "topk" else {}),
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "hook_z"
            if self.metadata.get("hook_name", "").endswith("hook_z")
            else "none",
            "metadata": {
                "sae_lens_version": SAELENS_VERSION,
                "sae_lens_training_version": None,
                **self.metadata,
            },
            "fastsae": {"version": __version__, "config": cfg.model_dump()},
        }


def _as_autocast(weight: Tensor) -> Tensor:
    """The weight as autocast would have torch's own products take it."""
    device = weight.device.type
    return weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight


def _as_with(bias: Tensor, x: Tensor) -> Tensor:
    """x in the dtype that adding the bias gives: autocast's products are half precision, sums with fp32 are not."""
    return x.to(torch.promote_types(x.dtype, bias.dtype))
