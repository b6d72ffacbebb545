"""select_topk against a stable sort: indices and values equal, ties to the smallest index; both backends."""

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.encode import group_max_ref
from fastsae_kernels.select_topk import select_topk, select_topk_ref
from tests.kernels.forms import ALL_FORMS, BACKENDS

SELECT_FORMS = [("torch", torch.float64), *ALL_FORMS]
SIZES = [(1, 1, 1), (3, 5, 2), (2, 33, 33), (2, 129, 7), (1, 600, 20), (1, 1100, 3)]


def assert_exact(pre_acts, k, positive=True, group_max=None):
    codes = select_topk(pre_acts, k, group_max, positive=positive)
    _, selected = select_topk_ref(pre_acts, k, positive)
    counts = selected.sum(1)
    assert torch.equal(codes.counts.long(), counts)
    for row, n in enumerate(counts.tolist()):
        latents = selected[row].nonzero().squeeze(1)
        assert torch.equal(codes.indices[row, :n].long(), latents), f"row {row}"
        torch.testing.assert_close(
            codes.values[row, :n], pre_acts[row, latents], rtol=0, atol=0, equal_nan=True
        )
        assert not codes.indices[row, n:].any() and not codes.values[row, n:].any(), "free slots hold 0"
    return codes


def normal(batch, d_sae, dtype, device, seed=0):
    return torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("batch, d_sae, k", SIZES)
@pytest.mark.parametrize("backend, dtype", SELECT_FORMS, ids=str)
def test_select_topk(backend, dtype, batch, d_sae, k, positive, device):
    pre_acts = normal(batch, d_sae, dtype, device)
    with use_backend(backend):
        assert_exact(pre_acts, k, positive)
        assert_exact(pre_acts, k, positive, group_max_ref(pre_acts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("d_sae, k, top", [(1, 1, 1), (97, 40, 1), (128, 7, 4), (130, 130, 2), (167, 3, 1)])
def test_ties(backend, positive, d_sae, k, top, device):
    gen = torch.Generator().manual_seed(d_sae)
    pre_acts = torch.randint(-top, top + 1, (3, d_sae), generator=gen).float().to(device)
    with use_backend(backend):
        assert_exact(pre_acts, k, positive)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_groups_tie_than_any_tile_holds_with_larger_winners_after_them(backend, device):
    pre_acts = torch.zeros(2, 32 * 200, device=device)
    pre_acts[:, ::32] = 1.0
    pre_acts[0, -10:] = 2.0
    pre_acts[1, -3 * 32 :: 32] = 3.0
    with use_backend(backend):
        assert_exact(pre_acts, 13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positive", [True, False])
def test_degenerate_rows(backend, positive, device):
    pre_acts = torch.stack(
        [
            torch.zeros(97),
            torch.full((97,), -1.0),
            torch.full((97,), 2.0),
            torch.full((97,), float("-inf")),
            torch.full((97,), float("nan")),
            torch.cat([torch.full((40,), float("nan")), torch.full((57,), float("inf"))]),
            torch.cat([torch.full((50,), -0.0), torch.full((47,), 0.0)]),
            torch.full((97,), 1e-45),
        ]
    ).to(device)
    with use_backend(backend):
        for k in (1, 33, 97):
            assert_exact(pre_acts, k, positive)


@pytest.mark.parametrize("backend, dtype", ALL_FORMS, ids=str)
@pytest.mark.parametrize("positive", [True, False])
def test_nans_tie_whatever_their_sign_and_payload(backend, dtype, positive, device):
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    infinity = int(torch.tensor(float("inf"), dtype=dtype).view(integer))
    payloads = [infinity + 1, infinity + 2, torch.iinfo(integer).max]
    payloads += [p + torch.iinfo(integer).min for p in payloads]  # -nan
    nans = torch.tensor(payloads, dtype=integer).view(dtype)
    pre_acts = normal(3, 130, dtype, "cpu")
    for row in range(3):  # in another order in each row
        pre_acts[row, 7 : 7 + 20 * 6 : 20] = nans.roll(2 * row)
    assert pre_acts.isnan().sum() == 18
    with use_backend(backend):
        for k in (3, 6, 9):
            assert_exact(pre_acts.to(device), k, positive)


@pytest.mark.parametrize("backend, dtype", ALL_FORMS, ids=str)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("k", [3, 9, 40])
def test_one_nan_takes_one_place(backend, dtype, positive, k, device):
    """With k below half the number of groups, between, and above it."""
    pre_acts = normal(3, 600, dtype, device)
    pre_acts[1, 333], pre_acts[2, 5] = float("nan"), float("inf")
    with use_backend(backend):
        assert (assert_exact(pre_acts, k, positive).counts == k).all()


@pytest.mark.parametrize("positive", [True, False])
def test_maxima_of_pairs_of_groups_bound_as_well(positive, device):
    """With 8 k groups and more the torch form halves them; 6 groups are odd after one halving of 12, of 24 ..."""
    for n_groups in (6, 24, 96):
        pre_acts = normal(4, 32 * n_groups, torch.float32, device, n_groups)
        pre_acts[1, : 32 * (n_groups // 2)] -= 10  # all winners in one half
        pre_acts[2] = pre_acts[2].clamp(max=0)
        for k in (1, 3):
            with use_backend("torch"):
                assert_exact(pre_acts, k, positive)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    with use_backend(backend):
        codes = select_topk(torch.zeros(0, 65, device=device), 4)
    assert codes.indices.shape == (0, 4) and codes.counts.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_the_selected_latents_alone(backend, device):
    pre_acts = normal(3, 129, torch.float32, device)
    pre_acts[1] = pre_acts[1].clamp(max=0)  # a row with nothing to select
    pre_acts.requires_grad_()
    weights = normal(3, 7, torch.float32, device, 1)
    with use_backend(backend):
        codes = select_topk(pre_acts, 7)
        (codes.values * weights).sum().backward()
    truth = torch.zeros_like(pre_acts)
    for row, n in enumerate(codes.counts.tolist()):
        truth[row, codes.indices[row, :n].long()] = weights[row, :n]
    assert torch.equal(pre_acts.grad, truth) and codes.counts[1] == 0


def test_compiles_whole(device):
    pre_acts = normal(3, 129, torch.float32, device)
    compiled = torch.compile(lambda p: select_topk(p, 7), fullgraph=True, backend="eager")
    assert torch.equal(compiled(pre_acts).indices, select_topk(pre_acts, 7).indices)


def test_opcheck(device):
    pre_acts = normal(3, 129, torch.float32, device)
    group_max, op = group_max_ref(pre_acts), torch.ops.fastsae.select_topk.default
    torch.library.opcheck(op, (pre_acts, group_max, 7, True))
    # the check of gradients adds up outputs as they come, integers first: it cannot
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (pre_acts.requires_grad_(), group_max, 7, False), test_utils=checks)


def test_errors_name_what_is_wrong(device):
    pre_acts = normal(3, 129, torch.float32, device)
    with pytest.raises(ValueError, match=r"k is 130, .* at most d_sae, 129"):
        select_topk(pre_acts, 130)
    with pytest.raises(ValueError, match=r"k is 0"):
        select_topk(pre_acts, 0)
    with pytest.raises(ValueError, match=r"group_max is \[3, 4\], but must be \[3, 5\]"):
        select_topk(pre_acts, 3, group_max_ref(pre_acts)[:, 1:])
    with pytest.raises(ValueError, match=r"pre_acts is int64"):
        select_topk(pre_acts.long(), 3)
    with pytest.raises(ValueError, match=r"pre_acts must be contiguous"):
        select_topk(pre_acts.T, 3)
