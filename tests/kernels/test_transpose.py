import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import Codes, tail_starts
from fastsae_kernels.transpose import Transposed, transpose, transpose_ref
from tests.kernels.forms import BACKENDS

# counts (their number is the batch), d_sae, width, n_tail, chunk
SIZES = [
    ([1], 1, 1, None, 64),
    ([0], 1, 1, None, 1),
    ([3, 0, 2], 13, 3, None, 2),
    ([97] * 3, 97, 97, None, 1),  # every latent, every entry a chunk
    ([5] * 33, 65, 5, None, 3),  # a word of 32 inputs, and a tile of 64 latents, plus one
    ([1] * 71, 1, 1, None, 7),  # one latent, active everywhere
    ([2, 300, 0, 257], 301, 300, None, 64),  # a block of 256 entries plus one
    ([0, 0, 0], 16, 4, None, 4),
    ([], 16, 4, None, 4),
    ([0, 0], 16, 0, None, 4),
    ([2, 9, 0, 4, 8, 41], 50, 4, 15, 3),
    ([3, 9, 12], 20, 4, 2, 4),  # 8 latents of the last input have no slot
    ([1, 1], 5, 2, 0, 4),
    ([2] * 1057, 9, 1, 1057, 64),  # 34 words: more than a tile of them
]


def make_codes(counts, d_sae, width, n_tail, seed=0) -> Codes:
    """Random codes with these counts, laid out as codes.py says."""
    gen = torch.Generator().manual_seed(seed)
    true = torch.tensor(counts, dtype=torch.int32)
    starts = None if n_tail is None else tail_starts(true, width)
    indices = torch.zeros(len(counts) + (n_tail or 0), width, dtype=torch.int32)
    for b, count in enumerate(counts):
        latents = torch.randperm(d_sae, generator=gen)[:count].sort().values
        for page, here in enumerate(latents.split(max(width, 1))):
            row = b if page == 0 else len(counts) + int(starts[b]) + page - 1
            if row < len(indices):
                indices[row, : len(here)] = here
    values = torch.randn(indices.shape, generator=gen)
    values[:, ::3] = 0  # entries of value 0 count
    return Codes(indices, values, true, starts)


def expected(counts, codes: Codes, d_sae: int, chunk: int) -> dict[str, list[int]]:
    """By plain lists, from the layout's definition and no code of the package."""
    (n_rows, width), batch = codes.indices.shape, len(counts)
    by_latent: list[list[tuple[int, int]]] = [[] for _ in range(d_sae)]
    next_tail = batch
    for b, count in enumerate(counts):
        slots = list(range(b * width, b * width + min(count, width)))
        while len(slots) < count and width:
            left = min(count - len(slots), width)
            slots += range(next_tail * width, next_tail * width + left)
            next_tail += 1
        for slot in slots:
            if slot < n_rows * width:
                by_latent[int(codes.indices.flatten()[slot])].append((b, slot))
    starts, chunk_starts, chunk_latents = [0], [0], []
    for j, taken in enumerate(by_latent):
        extra = len(range(chunk, len(taken), chunk))
        starts.append(starts[-1] + len(taken))
        chunk_starts.append(chunk_starts[-1] + extra)
        chunk_latents += [j] * extra
    flat = [entry for taken in by_latent for entry in taken]
    flat += [(0, 0)] * (n_rows * width - len(flat))
    chunk_latents += [d_sae] * (n_rows * width // chunk - len(chunk_latents))
    return {
        "starts": starts,
        "owners": [b for b, _ in flat],
        "slots": [slot for _, slot in flat],
        "chunk_starts": chunk_starts,
        "chunk_latents": chunk_latents,
    }


def lists(t: Transposed) -> dict[str, list[int]]:
    tensors = {name: a for name, a in t._asdict().items() if isinstance(a, torch.Tensor)}
    assert {a.dtype for a in tensors.values()} == {torch.int32}
    return {name: a.tolist() for name, a in tensors.items()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("counts, d_sae, width, n_tail, chunk", SIZES)
def test_transpose(name, counts, d_sae, width, n_tail, chunk, device):
    codes = make_codes(counts, d_sae, width, n_tail)
    truth = expected(counts, codes, d_sae, chunk)
    on_device = Codes(*(a if a is None else a.to(device) for a in codes))
    with use_backend(name):
        got = transpose(on_device, d_sae, chunk=chunk)
    assert lists(got) == truth
    assert lists(transpose_ref(codes, d_sae, chunk=chunk)) == truth
    assert got.chunk == chunk and got.batch == len(counts)


def test_torch_form_beyond_int16():
    codes = make_codes([40, 40, 3], 40_000, 40, None)
    codes.indices[0, -1] = 39_999
    assert int(codes.indices.max()) > 2**15
    assert lists(transpose(codes, 40_000)) == expected([40, 40, 3], codes, 40_000, 64)


@pytest.mark.parametrize("d_sae", [2**15, 2**15 + 1])
def test_torch_form_at_the_edge_of_int16(d_sae):
    codes = make_codes([3, 2], d_sae, 3, None)
    codes.indices[0, -1] = d_sae - 1
    assert lists(transpose(codes, d_sae)) == expected([3, 2], codes, d_sae, 64)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("n_tail", [None, 12])
def test_opcheck(name, n_tail, device):
    codes = make_codes([2, 9, 0, 4, 8, 3], 50, 4 if n_tail else 9, n_tail)
    indices, _, counts, starts = (a if a is None else a.to(device) for a in codes)
    with use_backend(name):
        torch.library.opcheck(torch.ops.fastsae.transpose.default, (indices, counts, starts, 50, 4))


def test_errors():
    codes = make_codes([3, 0, 2], 13, 3, None)
    indices, values, counts, _ = codes
    with pytest.raises(ValueError, match=r"d_sae is 0 and chunk 64"):
        transpose(codes, 0)
    with pytest.raises(ValueError, match=r"d_sae is 13 and chunk 0"):
        transpose(codes, 13, chunk=0)
    with pytest.raises(ValueError, match=r"codes.indices is int64, but must be one of: int32"):
        transpose(Codes(indices.long(), values, counts), 13)
    with pytest.raises(ValueError, match=r"codes.counts is \[3, 1\]"):
        transpose(Codes(indices, values, counts[:, None]), 13)
    with pytest.raises(ValueError, match=r"codes.tail_starts is \[3\], but must be \[4\]"):
        transpose(Codes(indices, values, counts, counts), 13)
    with pytest.raises(ValueError, match=r"codes.indices has 3 rows, but must have 2"):
        transpose(Codes(indices, values, counts[:2]), 13)
    for name in BACKENDS:
        if name != "triton":
            with use_backend(name), pytest.raises(ValueError, match=r"codes.indices .* \d+, but d_sae is 2"):
                transpose(codes, 2)
    huge = torch.zeros(1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(ValueError, match="contiguous"):
        transpose(Codes(huge, values, counts), 13)


def test_too_many_slots():
    with torch.device("meta"):
        indices = torch.empty(2**16, 2**15, dtype=torch.int32)
        counts = torch.empty(2**16, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"2147483648 slots"):
        transpose(Codes(indices, indices.float(), counts), 13)
