import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae_kernels._launch import use_backend
from fastsae_kernels.move_rows import CACHED, _move_rows_torch, move_rows, move_rows_ref
from tests.kernels.forms import BACKENDS, FORMS

# rows of source, rows of out, rows moved, d
SIZES = [(1, 1, 1, 1), (9, 9, 4, 7), (40, 90, 33, 129), (300, 500, 300, 257), (5, 5, 0, 8), (5, 0, 0, 3)]


def random_rows(n: int, m: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:n].to(dtype)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name, dtype", FORMS, ids=str)
@pytest.mark.parametrize("m, p, n, d", SIZES, ids=str)
def test_rows_come_to_their_slots(m, p, n, d, name, dtype, to, kind, device):
    """With a cast, from a matrix that is a part of a wider one, and without touching any other row."""
    gen = torch.Generator().manual_seed(0)
    source = torch.randn(m, d + 3, generator=gen).to(device, dtype)[:, :d]
    out = torch.randn(p, d, generator=gen).to(device, to)
    rows, slots = (random_rows(n, size, i, kind).to(device) for i, size in enumerate((m, p)))
    for places in (slots, None):
        expected, got = (
            move_rows_ref(source.cpu(), rows.cpu(), out.cpu(), None if places is None else places.cpu()),
            out.clone(),
        )
        with use_backend(name):
            move_rows(source, rows, got, places)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("runs", [[(0, 200), (310, 150), (300, 10)], [(7, 360)]])
def test_runs_of_slots_and_columns_of_integers(runs, name, device):
    slots = torch.cat([torch.arange(first, first + n) for first, n in runs]).to(device)
    rows = random_rows(len(slots), 400, 0, torch.int64).to(device)
    source = torch.arange(800, device=device).view(400, 2)
    out = torch.zeros(500, 2, dtype=torch.int64, device=device)
    expected = move_rows_ref(source.cpu(), rows.cpu(), out.cpu(), slots.cpu())
    with use_backend(name):
        move_rows(source, rows, out, slots)
    assert torch.equal(out.cpu(), expected) and len(out.cpu()[:, 1].unique()) == len(slots) + 1


@pytest.mark.parametrize("name", BACKENDS)
def test_more_than_a_cache_is_cast_by_pieces(name, device):
    if name == "triton" and device.type == "cpu":
        pytest.skip("the interpreter does not round to bf16")
    source, rows = torch.randn(3000, 64, device=device), torch.arange(3000, device=device).flip(0)
    out = torch.empty(3000, 64, dtype=torch.bfloat16, device=device)
    with use_backend(name):
        move_rows(source, rows, out)
    assert torch.equal(out, source.flip(0).bfloat16())


def test_what_does_not_fit_is_refused(device):
    x, rows = torch.zeros(4, 3, device=device), torch.arange(4, device=device)
    for message, arguments in {
        "out is": (x, rows, torch.zeros(4, 2, device=device)),
        "out is torch|int64": (x, rows, torch.zeros(4, 3, device=device, dtype=torch.int64)),
        "float32": (x.long(), rows, x),
        "rows is": (x, rows.float(), x),
        "slots is": (x, rows, x, rows[:3]),
        "room for 2": (x, rows, x[:2]),
        "rows of source": (torch.zeros(3, 4, device=device).T, rows, x),
        "out must be contiguous": (x, rows, torch.zeros(3, 4, device=device).T),
    }.items():
        with pytest.raises(ValueError, match=message):
            move_rows(*arguments)


class Gathers(TorchDispatchMode):
    """What every index_select returned, and how many other ops read or wrote data."""

    def __init__(self):
        super().__init__()
        self.found, self.n_copies = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        if "index_select" in func.name():
            self.found.append(returned)
        elif not {"split", "slice"} & {*func.name().replace(".", "::").split("::")}:
            self.n_copies += 1
        return returned


def test_the_torch_form_moves_each_byte_once():
    """Into place, or for a cast by way of pieces that stay in a cache."""
    source, rows = torch.randn(8192, 512), torch.randperm(8192, dtype=torch.int32)
    out, half = torch.empty(8192, 512), torch.empty(8192, 512, dtype=torch.bfloat16)
    with Gathers() as straight:
        _move_rows_torch(source, rows, out, None)
    assert [t.data_ptr() for t in straight.found] == [out.data_ptr()] and straight.n_copies == 0
    with Gathers() as cast:
        _move_rows_torch(source, rows, half, None)
    assert sum(t.numel() for t in cast.found) == source.numel()
    assert max(t.numel() for t in cast.found) <= CACHED and cast.n_copies == len(cast.found)
