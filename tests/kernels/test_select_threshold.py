"""select_threshold against its dense reference: slots, tails, counts, bands, gradients; both backends."""

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import missing, rows, to_dense
from fastsae_kernels.encode import group_max_ref
from fastsae_kernels.select_threshold import select_threshold, select_threshold_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.forms import ALL_FORMS, BACKENDS

SELECT_FORMS = [("torch", torch.float64), *ALL_FORMS]
SIZES = [(1, 1), (3, 31), (2, 33), (5, 97), (4, 1100)]  # interpreted: 16 groups a block, 4 a tile
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def make(
    batch: int, d_sae: int, dtype: torch.dtype, device: torch.device, shift: float = -1.5
) -> torch.Tensor:
    gen = torch.Generator().manual_seed(batch * d_sae)
    pre_acts = torch.randn(batch, d_sae, generator=gen) + shift
    pre_acts[1::3] = -1  # empty rows
    return pre_acts.to(device, dtype)


def assert_holds(codes, emitted: torch.Tensor, values: torch.Tensor) -> None:
    """Codes without missing latents hold exactly the emitted ones, rising, with these values and clean free slots."""
    batch, d_sae = emitted.shape
    assert torch.equal(codes.counts.long(), emitted.sum(1)) and codes.counts.dtype == torch.int32
    assert codes.indices.dtype == torch.int32 and codes.values.dtype == values.dtype
    assert missing(codes) == 0
    owners, lengths = rows(codes)
    found = [[] for _ in range(batch)]
    for row, (owner, length) in enumerate(zip(owners.tolist(), lengths.tolist(), strict=True)):
        found[owner] += codes.indices[row, :length].tolist()
        assert not codes.indices[row, length:].any() and (codes.values[row, length:] == 0).all()
    assert found == [emitted[b].nonzero().squeeze(1).tolist() for b in range(batch)]
    assert torch.equal(
        to_dense(codes, d_sae).nan_to_num(7.0), torch.where(emitted, values, 0).nan_to_num(7.0)
    )


@pytest.mark.parametrize("backend, dtype", SELECT_FORMS, ids=str)
@pytest.mark.parametrize("batch, d_sae", SIZES)
def test_relu(batch, d_sae, backend, dtype, device):
    pre_acts = make(batch, d_sae, dtype, device)
    acts, emitted = select_threshold_ref(pre_acts)
    with use_backend(backend):
        given = select_threshold(pre_acts, group_max_ref(pre_acts), width=d_sae)
        assert_holds(given, emitted, acts)
        assert given.indices.shape == (batch, d_sae) and given.tail_starts is None
        assert_holds(select_threshold(pre_acts), emitted, acts)
        assert_holds(select_threshold(pre_acts, width=3, n_tail=None), emitted, acts)
        assert_as_accurate(
            lambda p: to_dense(select_threshold(p, width=d_sae), d_sae),
            lambda p: select_threshold_ref(p)[0],
            [pre_acts],
        )


@pytest.mark.parametrize("bandwidth", [0.0, 0.5])
@pytest.mark.parametrize("backend, dtype", SELECT_FORMS, ids=str)
@pytest.mark.parametrize("batch, d_sae", SIZES[:4])
def test_jumprelu(batch, d_sae, backend, dtype, bandwidth, device):
    pre_acts = make(batch, d_sae, dtype, device, shift=0.0)
    threshold = torch.linspace(-0.3, 1.2, d_sae, device=device)
    pre_acts[0, -1] = threshold[-1]  # rounded, so that it may lie on either side, but not on both
    acts, emitted = select_threshold_ref(pre_acts, threshold, bandwidth)
    arguments = {"threshold": threshold, "bandwidth": bandwidth}
    with use_backend(backend):
        assert_holds(select_threshold(pre_acts, **arguments), emitted, acts.to(dtype))
        assert_holds(select_threshold(pre_acts, width=2, n_tail=None, **arguments), emitted, acts.to(dtype))
        leaf = pre_acts.clone().requires_grad_()
        select_threshold(leaf, width=d_sae, **arguments).values.sum().backward()
    assert torch.equal(leaf.grad, (acts != 0).to(dtype)), "none for the band"
    assert bandwidth == 0 or d_sae == 1 or emitted.sum() > (acts != 0).sum(), "the band was tested"


@each_backend
def test_all_active_and_none(backend, device):
    pre_acts = make(2, 600, torch.float32, device).abs() + 1
    with use_backend(backend):
        assert_holds(select_threshold(pre_acts), pre_acts > 0, pre_acts)
        assert_holds(select_threshold(pre_acts, width=128, n_tail=None), pre_acts > 0, pre_acts)
        none = select_threshold(-pre_acts)
        assert none.indices.shape == (2, 1) and not none.counts.any()
        assert select_threshold(0 * pre_acts, width=2, n_tail=None).indices.shape == (2, 2)


@each_backend
@pytest.mark.parametrize("width, n_tail", [(None, 0), (4, 0), (4, None), (4, 3)])
def test_empty_batch(backend, width, n_tail, device):
    with use_backend(backend):
        codes = select_threshold(torch.empty(0, 65, device=device), width=width, n_tail=n_tail)
    assert codes.indices.shape == (n_tail or 0, width or 1) and codes.counts.shape == (0,)
    assert not codes.indices.any() and not codes.values.any()


@each_backend
@pytest.mark.parametrize("n_active", [3, 4, 7, 8, 9])
def test_rows_at_the_edge_of_their_slots(n_active, backend, device):
    """Width 4: one entry beyond it needs a tail row of its own, and four more fill that."""
    pre_acts = torch.full((2, 40), -1.0, device=device)
    pre_acts[1, 5 : 5 + n_active] = 1.0
    with use_backend(backend):
        codes = select_threshold(pre_acts, width=4, n_tail=None)
    assert_holds(codes, pre_acts > 0, pre_acts)
    assert len(codes.indices) == 2 + (n_active - 1) // 4


@each_backend
def test_a_short_tail_loses_nothing_silently(backend, device):
    pre_acts = make(5, 97, torch.float32, device, shift=0.0)
    acts, emitted = select_threshold_ref(pre_acts)
    with use_backend(backend):
        for n_tail in (0, 1, 7):
            codes = select_threshold(pre_acts, width=10, n_tail=n_tail)
            held = to_dense(codes, 97) != 0
            assert codes.indices.shape == (5 + n_tail, 10)
            assert torch.equal(codes.counts.long(), emitted.sum(1))
            assert missing(codes) == emitted.sum() - held.sum() > 0
            assert torch.equal(to_dense(codes, 97)[held], acts[held])
            leaf = pre_acts.clone().requires_grad_()
            select_threshold(leaf, width=10, n_tail=n_tail).values.sum().backward()
            assert torch.equal(leaf.grad, held.float())


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_is_active(backend, bad, device):
    pre_acts = make(3, 97, torch.float32, device)
    pre_acts[0, 96], pre_acts[1, 40] = bad, bad
    threshold = torch.full((97,), 0.5, device=device)
    for extra in ({}, {"threshold": threshold, "bandwidth": 0.1}):
        acts, emitted = select_threshold_ref(pre_acts, **extra)
        with use_backend(backend):
            assert_holds(select_threshold(pre_acts, width=97, **extra), emitted, acts)
            leaf = pre_acts.clone().requires_grad_()
            select_threshold(leaf, width=97, **extra).values.backward(torch.ones(3, 97, device=device))
        assert torch.equal(leaf.grad, (acts != 0).float())


@each_backend
def test_zero_and_signed_zero_are_not_active(backend, device):
    pre_acts = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, 2.0]], device=device)
    with use_backend(backend):
        assert select_threshold(pre_acts).indices.tolist() == [[2, 4]]


@pytest.mark.parametrize("backend", ["torch", "triton"])  # C++ takes the maxima itself
def test_only_groups_whose_maximum_passes_are_read(backend, device):
    pre_acts = make(2, 96, torch.float32, device, shift=3.0)
    pre_acts[0] = pre_acts[0].abs() + 1
    group_max = group_max_ref(pre_acts)
    group_max[0, 1] = 0
    with use_backend(backend):
        codes = select_threshold(pre_acts, group_max)
    assert codes.indices[0, :64].tolist() == [*range(32), *range(64, 96)] and codes.counts[0] == 64


def test_opcheck(device):
    pre_acts = make(3, 97, torch.float32, device)
    gmax, op = group_max_ref(pre_acts), torch.ops.fastsae.select_threshold.default
    for width, n_tail in ((8, 0), (2, 9), (2, None), (None, 0)):
        torch.library.opcheck(op, (pre_acts, gmax, None, 0.0, width, n_tail))
    leaf = (
        pre_acts.requires_grad_()
    )  # the last of the checks adds up outputs as they come, integers first: it cannot
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (leaf, gmax, None, 0.0, 8, 0), test_utils=checks)


def test_compiles_whole(device):
    pre_acts = make(5, 97, torch.float32, device)
    compiled = torch.compile(
        lambda p: select_threshold(p, width=4, n_tail=9), fullgraph=True, backend="eager"
    )
    for a, b in zip(compiled(pre_acts), select_threshold(pre_acts, width=4, n_tail=9), strict=True):
        assert torch.equal(a, b)


def test_errors_name_what_is_wrong(device):
    pre_acts = make(3, 97, torch.float32, device)
    threshold = torch.zeros(97, device=device)
    with pytest.raises(ValueError, match=r"pre_acts is \[97\]"):
        select_threshold(pre_acts[0])
    with pytest.raises(ValueError, match=r"pre_acts must be contiguous"):
        select_threshold(pre_acts.T)
    with pytest.raises(ValueError, match="at least one latent"):
        select_threshold(pre_acts[:, :0].contiguous())
    with pytest.raises(ValueError, match=r"group_max is \[3, 97\], but must be \[3, 4\]"):
        select_threshold(pre_acts, pre_acts)
    with pytest.raises(ValueError, match="group_max is float16, but must be one of: float32"):
        select_threshold(pre_acts, group_max_ref(pre_acts).half())
    with pytest.raises(ValueError, match="width is 0"):
        select_threshold(pre_acts, width=0)
    with pytest.raises(ValueError, match="n_tail is -1"):
        select_threshold(pre_acts, width=1, n_tail=-1)
    with pytest.raises(ValueError, match="n_tail is 3, but without a width"):
        select_threshold(pre_acts, n_tail=3)
    with pytest.raises(ValueError, match=r"threshold is \[96\]"):
        select_threshold(pre_acts, threshold=threshold[1:])
    with pytest.raises(ValueError, match="threshold is float16"):
        select_threshold(pre_acts, threshold=threshold.half())
    with pytest.raises(ValueError, match=r"bandwidth is 0\.1, but ReLU"):
        select_threshold(pre_acts, bandwidth=0.1)
    with pytest.raises(ValueError, match="bandwidth is -1"):
        select_threshold(pre_acts, threshold=threshold, bandwidth=-1)
