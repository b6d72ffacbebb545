"""What a run will take of the training device's memory, predicted before it starts."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from fastsae.config import RunConfig, SAEConfig, StepConfig
from fastsae.dense import SMOOTH_CHUNK
from fastsae.errors import ConfigError, first_line
from fastsae.paths import first_slots
from fastsae.ring import rows_held

WIDE = 2  # on the dense path, tensors of [batch, d_sae] that live at once
# There on a CPU in plain torch, tensors of a chunk of these that live within an op, in the dtype of its sums: for fp32, and for bf16.
CHUNKS = {"relu": (2.5, 4.5), "topk": (2.5, 4.5), "batchtopk": (2.5, 4.5), "jumprelu": (4.0, 5.5)}
SUMS = {
    "relu": 3,
    "topk": 3,
    "batchtopk": 3,
    "jumprelu": 6,
}  # and on a GPU, of a block of rows, which a second pass adds up


class Form(NamedTuple):
    """What the ops of the sparse path hold on the way, in the forms that a device runs."""

    code: int
    """Bytes of a code: index and value, and what selection, decoding and transposition add."""
    taken: int
    """Of that, what is left when gradient rows are summed."""
    decoded: int
    """Tensors of [batch, d_out] beside a decoding."""
    explained: int
    """The same as dead latents' gradient is added."""


CPP = Form(code=24, taken=20, decoded=1, explained=0)
OTHERS = Form(code=44, taken=28, decoded=3, explained=2)
GROUPS_PER_CODE = 1.2  # groups of latents that a selection reads, before some coincide


def predict(
    config: RunConfig,
    widths: Mapping[str, int],
    shapes: Mapping[str, SAEConfig],
    steps: Mapping[str, StepConfig],
    ring_dtype: torch.dtype,
    max_write: int,
    device_type: str,
) -> dict[str, int]:
    """Bytes per part of the device's memory, without the source model, its forward and the framework's own; "host" is what the ring
    takes of the host's beside a GPU.

    ring: see ring_bytes. saes: weights and moments, for bf16 the copies that the products read, and what a resampler keeps. step: what the hungriest SAE's
    step holds beside them.
    """
    batch = min(config.step.batch_size, config.n_tokens)
    ring, host = ring_bytes(config, widths, ring_dtype, max_write, device_type)
    step_sizes = [step_bytes(shape, steps[key], batch, device_type) for key, shape in shapes.items()]
    kept = device_type == "cuda" and any(
        steps[key].cuda_graph for key in shapes
    )  # a recorded step keeps its memory
    return {
        "ring": ring,
        "saes": sum(
            sae_bytes(shape, steps[key]) + (inputs_bytes(shape) if config.dead.method == "resample" else 0)
            for key, shape in shapes.items()
        ),
        "step": sum(step_sizes) if kept else max(step_sizes),
        **({"host": host} if host else {}),
    }


def ring_bytes(
    config: RunConfig, widths: Mapping[str, int], ring_dtype: torch.dtype, max_write: int, device_type: str
) -> tuple[int, int]:
    """Of the device's memory and the host's: `capacity`, one forward less a row, and a batch, in rows of every hook point.

    In host memory beside a GPU two batches on either side, and on the GPU two forwards of the widest hook point.
    """
    batch = min(config.step.batch_size, config.n_tokens)
    slots, carry = rows_held(config.ring.capacity, config.n_tokens, max_write)
    row = sum(widths.values()) * ring_dtype.itemsize
    if config.ring.placement != "host" or device_type != "cuda":
        return (slots + carry + batch) * row, 0
    on_the_way = 2 * batch * row
    forwards = 2 * max_write * max(widths.values()) * ring_dtype.itemsize
    return on_the_way + forwards, (slots + carry) * row + on_the_way


def sae_bytes(shape: SAEConfig, step: StepConfig) -> int:
    """Weights, their moments (no first where it would forget at once), the running mean, and bf16 copies that the products read."""
    copies = 2 if step.precision == "bf16" and step.path != "dense" else 0
    element = _master_bytes(step)
    saved = element - 2 if step.first_moment == "bf16" else 0
    matrices = shape.d_sae * (shape.d_in + (shape.d_out or shape.d_in))
    assert step.betas != "auto"
    n_copies = 2 + (step.betas[0] > 0) + (step.ema_decay is not None)
    return n_copies * element * n_parameters(shape) + (copies - saved) * matrices


def inputs_bytes(shape: SAEConfig) -> int:
    """What a resampler keeps: an input for each latent, and a few numbers."""
    return shape.d_sae * (shape.d_in * 4 + 12)


def step_bytes(shape: SAEConfig, step: StepConfig, batch: int, device_type: str) -> int:
    """The most that a step holds beside weights and moments, on the hungrier of the paths that it may take.

    On the sparse path of relu and jumprelu for as many codes as let "auto" take it; on a GPU for as many slots as it begins with, and
    the dense path too, which takes what does not fit there. AuxK is in it from the start.
    """
    assert step.crossover != "auto"
    if step.accumulate > 1:  # by the piece, beside all inputs, and gradients twice: the sum, and a piece's
        whole = step.model_copy(update={"accumulate": 1})
        kept = _master_bytes(step) * (2 * n_parameters(shape) + batch * shape.d_in)
        return kept + step_bytes(shape, whole, -(-batch // step.accumulate), device_type)
    on_gpu = device_type == "cuda"
    may_overflow = on_gpu and shape.k is None
    n_codes = shape.k or max(round(step.crossover * shape.d_sae), 1)
    if may_overflow:
        n_codes = first_slots(step.crossover, shape.d_sae)
    always_sparse = shape.k is not None and shape.k <= step.crossover * shape.d_sae
    sizes = []
    if step.path == "dense" or (step.path == "auto" and not always_sparse) or may_overflow:
        sizes.append(dense_bytes(shape, step, batch, device_type))
    if step.path != "dense":
        sizes.append(sparse_bytes(shape, step, batch, n_codes=n_codes, device_type=device_type))
    recorded = on_gpu and step.cuda_graph  # then the step has a place of its own for what it is given
    return max(sizes) + recorded * batch * shape.d_in * _master_bytes(step)


def dense_bytes(shape: SAEConfig, step: StepConfig, batch: int, device_type: str) -> int:
    """pre_acts and acts, then acts and their gradient, beside the first weight gradient; or all gradients, as AuxK adds to them or as they are
    projected."""
    from fastsae_kernels.dense_loss import CHUNK, ROWS  # loads triton: not at the top

    n, d_in, d_out = shape.d_sae, shape.d_in, shape.d_out or shape.d_in
    half, element = step.precision == "bf16", _master_bytes(step)
    compute = 2 if half else element
    rows = batch * (d_in + d_out) * compute
    casts = n * (d_in + d_out) * 2 if half else 0
    gradients = n * (d_in + d_out) * element
    if _in_cpp(step, device_type) and step.l0_loss != "tanh":
        chunks = n * d_out * 2.0 * half  # nothing within an op, but a gradient before it is widened
    elif device_type == "cpu":
        chunks = CHUNKS[shape.activation][half] * min(CHUNK, batch * n) * element
    else:
        chunks = SUMS[shape.activation] * -(-batch // ROWS) * n * 4.0
        if step.l0_loss == "tanh":
            chunks = max(chunks, 4.0 * SMOOTH_CHUNK["cuda"] * element)
    if shape.activation == "jumprelu" and _by_onednn(compute, device_type):
        chunks = max(chunks, (n + batch) * d_out * element)  # a product to be turned, beside g as it is taken
    within = WIDE * batch * n * compute + rows + n * d_out * element + casts + chunks
    auxk = 0.0
    if step.auxk_coefficient and step.k_aux:
        dead = dead_bytes(shape, step, batch, device_type)
        auxk = gradients + rows + casts + max(auxk_bytes(shape, step, batch, device_type), dead)
    projects = shape.decoder_norm == "unit" or step.l1_coefficient is not None or step.l0_loss == "tanh"
    last = max(projects * n * d_out * element, casts + n * d_in * 2 * half)  # W_enc's, before it is widened
    return round(max(within, auxk, gradients + last))


def sparse_bytes(shape: SAEConfig, step: StepConfig, batch: int, *, n_codes: int, device_type: str) -> int:
    """A chunk of pre_acts (for batchtopk all of them), with the groups of latents that the selection reads; or what W_dec's gather makes.

    AuxK writes its gradients out, and selects k_aux more; the smooth L0 count beside a free decoder norm writes them out too.
    """
    n, d_in, d_out = shape.d_sae, shape.d_in, shape.d_out or shape.d_in
    element = _master_bytes(step)
    compute = 2 if step.precision == "bf16" else element
    rows, auxk = batch * 2 * d_in * element, 0
    form = _form(step, device_type)
    decode = batch * (form.decoded * d_out * element + n_codes * form.code)
    select = select_bytes(shape, step, batch, n_codes, device_type)
    if step.auxk_coefficient and step.k_aux:
        wide_rows = (
            2 if shape.activation == "batchtopk" else 1
        )  # codes of all rows are as many as of the fullest
        rows += batch * (d_out * (element + compute) + wide_rows * n_codes * form.taken)
        auxk = n * (d_in + d_out) * element + auxk_bytes(shape, step, batch, device_type)
        select = max(select, dead_bytes(shape, step, batch, device_type))
        n_codes = max(n_codes, step.k_aux)
    if step.l0_loss == "tanh" and shape.decoder_norm == "free":  # writes its gradients out
        auxk = n * (d_in + 2 * d_out) * element + batch * n_codes * form.code
    return round(rows + max(select, decode, auxk))


def auxk_bytes(shape: SAEConfig, step: StepConfig, batch: int, device_type: str) -> int:
    """Codes of dead latents, with what they explain, and what they add to one matrix's gradient."""
    d_in, d_out, element = shape.d_in, shape.d_out or shape.d_in, _master_bytes(step)
    form = _form(step, device_type)
    assert step.k_aux is not None
    more = shape.d_sae * max(d_in, d_out) * element
    return batch * (step.k_aux * form.taken + form.explained * d_out * element) + more


def dead_bytes(shape: SAEConfig, step: StepConfig, batch: int, device_type: str) -> int:
    """What finding k_aux of dead latents holds, with the copy of their rows of W_enc."""
    assert step.k_aux is not None
    compute = 2 if step.precision == "bf16" else _master_bytes(step)
    topk = shape.model_copy(update={"activation": "topk", "k": step.k_aux})
    return select_bytes(topk, step, batch, step.k_aux, device_type) + shape.d_sae * shape.d_in * compute


def select_bytes(shape: SAEConfig, step: StepConfig, batch: int, n_codes: int, device_type: str) -> int:
    """A chunk of pre_acts, and what finding n_codes of each row in it holds."""
    from fastsae_kernels.encode import (
        CHUNK_ROWS,
        GROUP,
        WIDE_ROWS,
        has_fast_products,
    )  # load triton: not at the top
    from fastsae_kernels.encode_codes import chunk_rows
    from fastsae_kernels.matmul import PACKED_FROM, block_rows

    n, half = shape.d_sae, step.precision == "bf16"
    compute = 2 if half else _master_bytes(step)
    chunk = batch if shape.activation == "batchtopk" else min(batch, chunk_rows(n * compute, device_type))
    n_groups = -(-n // GROUP)
    slow = half and device_type == "cpu" and not has_fast_products(torch.empty(0, dtype=torch.bfloat16))
    onednn = _by_onednn(4 if slow else compute, device_type)
    in_fp32 = n * shape.d_in * 4 if slow or (onednn and batch >= PACKED_FROM) else 0  # W_enc, for the product
    product = min(chunk, CHUNK_ROWS) * n * 4 if slow else 0
    if onednn:
        at_once = chunk if _in_cpp(step, device_type) and shape.activation != "batchtopk" else CHUNK_ROWS
        product += min(chunk, at_once, block_rows(n)) * n * 4
    if _in_cpp(step, device_type):
        hits, code = 4 * n_groups, 4 + compute
        if shape.activation == "topk":
            hits = 0
        if shape.activation == "batchtopk":  # with maxima
            hits += compute * n_groups
            code = (
                2 * code + 10
            )  # rows are as wide as the fullest; and what is sorted, outside of torch's memory
        found = chunk * hits + batch * n_codes * code
        return chunk * n * compute + in_fp32 + max(product, found)
    groups = n_groups * (1 - math.exp(-GROUPS_PER_CODE * n_codes / n_groups))  # that are hit, by chance
    select = chunk * (groups * (GROUP * (compute + 1) + 24) + n_codes * OTHERS.code)
    wide = min(chunk, WIDE_ROWS) * n * 4 if half and device_type == "cpu" and not slow else 0
    return round(chunk * (n + n_groups) * compute + in_fp32 + max(select, product, wide))


def _form(step: StepConfig, device_type: str) -> Form:
    return CPP if _in_cpp(step, device_type) else OTHERS


def _in_cpp(step: StepConfig, device_type: str) -> bool:
    """Whether the ops are those in C++."""
    from fastsae_kernels._launch import backend  # loads triton: not at the top

    return (
        device_type == "cpu"
        and step.precision != "fp64"
        and backend(torch.empty(0, dtype=torch.float32, device="cpu")) == "cpp"
    )


def _by_onednn(compute: int, device_type: str) -> bool:
    """Whether products of numbers of so many bytes are oneDNN's."""
    from fastsae_kernels.matmul import by_onednn  # loads triton: not at the top

    return (
        device_type == "cpu" and compute == 4 and by_onednn(torch.empty(0, dtype=torch.float32, device="cpu"))
    )


def _master_bytes(step: StepConfig) -> int:
    """Of a parameter, a moment or a gradient."""
    return 8 if step.precision == "fp64" else 4


def n_parameters(shape: SAEConfig) -> int:
    """Numbers in W_enc, b_enc, W_dec, b_dec and thresholds."""
    d_out = shape.d_out or shape.d_in
    thresholds = shape.d_sae if shape.activation == "jumprelu" else 0
    return shape.d_sae * (shape.d_in + d_out + 1) + d_out + thresholds


@contextmanager
def refused_if_too_large(what: str) -> Iterator[None]:
    """An allocation that fails in this block is a ConfigError that names `what`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, as is the CPU's
        if isinstance(error, RuntimeError) and not re.search("memory|allocate|overflow", str(error)):
            raise
        raise ConfigError(f"{what} does not fit into memory: {first_line(error)}") from None
