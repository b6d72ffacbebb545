"""select_batchtopk against a stable sort of the whole batch; both backends."""

import pytest
import torch

from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import missing, to_dense
from fastsae_kernels.encode import group_max_ref
from fastsae_kernels.select_batchtopk import select_batchtopk, select_batchtopk_ref
from fastsae_kernels.testing import assert_as_accurate
from tests.kernels.test_select_threshold import SELECT_FORMS, assert_holds, each_backend, make

SIZES = [(1, 1, 1), (3, 31, 5), (2, 33, 33), (5, 97, 2), (4, 1100, 3)]


def smallest(acts: torch.Tensor) -> float:
    taken = acts[acts != 0]
    return float(taken.sort().values[0]) if len(taken) else 0.0


@pytest.mark.parametrize("backend, dtype", SELECT_FORMS, ids=str)
@pytest.mark.parametrize("batch, d_sae, k", SIZES)
@pytest.mark.parametrize("grid", [None, 2.0], ids=["distinct", "ties"])
def test_batchtopk(batch, d_sae, k, grid, backend, dtype, device):
    pre_acts = make(batch, d_sae, dtype, device, shift=0.5)
    if grid:
        pre_acts = (pre_acts * grid).round() / grid
    acts = select_batchtopk_ref(pre_acts, k)
    with use_backend(backend):
        codes, threshold = select_batchtopk(pre_acts, k)
        assert_holds(codes, acts != 0, acts)
        assert threshold.dtype == torch.promote_types(dtype, torch.float32) and threshold == smallest(acts)
        codes, _ = select_batchtopk(pre_acts, k, group_max_ref(pre_acts), width=3, n_tail=None)
        assert_holds(codes, acts != 0, acts)
        assert_as_accurate(
            lambda p: to_dense(select_batchtopk(p, k, width=d_sae)[0], d_sae),
            lambda p: select_batchtopk_ref(p, k),
            [pre_acts],
        )


@each_backend
def test_values_that_differ_in_their_last_bit(backend, device):
    """Every level of the search decides: bits near the top, in the middle and the lowest."""
    bits = torch.arange(0x3F80_0000, 0x3F80_0000 + 40, dtype=torch.int32)
    bits = torch.cat([bits, bits + (1 << 10), bits + (1 << 20)])
    pre_acts = bits[torch.randperm(120, generator=torch.Generator().manual_seed(0))].view(torch.float32)
    pre_acts = pre_acts.view(2, 60).to(device)
    for k in (1, 20, 21, 33, 60):
        acts = select_batchtopk_ref(pre_acts, k)
        with use_backend(backend):
            codes, threshold = select_batchtopk(pre_acts, k)
        assert_holds(codes, acts != 0, acts)
        assert threshold == smallest(acts)


@each_backend
def test_tiny_and_huge_values(backend, device):
    values = [1e-45, 1e-40, 1.2e-38, 3e38, float("inf"), -1.0, 0.0, -0.0, float("-inf"), 1.0]
    pre_acts = torch.tensor([values, values[::-1]], device=device)
    for k in (1, 2, 3, 5, 10):
        acts = select_batchtopk_ref(pre_acts, k)
        with use_backend(backend):
            codes, threshold = select_batchtopk(pre_acts, k)
        assert_holds(codes, acts != 0, acts)
        assert threshold == smallest(acts)


@each_backend
def test_one_row_may_take_all(backend, device):
    pre_acts = make(5, 97, torch.float32, device)
    pre_acts[3] = pre_acts[3].abs() + 10
    with use_backend(backend):
        codes, _ = select_batchtopk(pre_acts, 9, width=16, n_tail=2)
        assert codes.counts.tolist() == [0, 0, 0, 45, 0] and missing(codes) == 0
        codes, _ = select_batchtopk(pre_acts, 9, width=16, n_tail=1)
        assert codes.counts.tolist() == [0, 0, 0, 45, 0] and missing(codes) == 13


@each_backend
def test_fewer_positive_than_asked(backend, device):
    pre_acts = torch.full((3, 70), -1.0, device=device)
    with use_backend(backend):
        codes, threshold = select_batchtopk(pre_acts, 4)
        assert not codes.counts.any() and threshold == 0 and codes.indices.shape == (3, 1)
        pre_acts[1, 5], pre_acts[2, 69] = 2.0, 0.5
        codes, threshold = select_batchtopk(pre_acts, 4)
    assert codes.counts.tolist() == [0, 1, 1] and threshold == 0.5
    assert codes.indices.tolist() == [[0], [5], [69]]


@each_backend
@pytest.mark.parametrize("k", [1, 2, 30])
def test_nan_is_the_largest(backend, k, device):
    pre_acts = make(2, 97, torch.float32, device)
    pre_acts[0, 3], pre_acts[0, 50], pre_acts[1, 40] = float("inf"), float("nan"), -float("nan")
    order = [(0, 50), (1, 40), (0, 3)]
    with use_backend(backend):
        codes, threshold = select_batchtopk(pre_acts, k)
    dense = to_dense(codes, 97)
    assert codes.counts.sum() == min(2 * k, int((~(pre_acts <= 0)).sum()))
    assert [bool(dense[at] != 0) for at in order] == [2 * k > i for i in range(3)]
    assert threshold.isnan() == (k == 1)


@each_backend
def test_more_nans_than_asked_are_cut_in_order(backend, device):
    pre_acts = torch.full((3, 70), float("nan"), device=device)
    with use_backend(backend):
        codes, threshold = select_batchtopk(pre_acts, 30)
    assert codes.counts.tolist() == [70, 20, 0] and threshold.isnan()
    assert codes.indices[1].tolist() == [*range(20), *[0] * 50]


@each_backend
def test_empty_batch(backend, device):
    with use_backend(backend):
        codes, threshold = select_batchtopk(torch.empty(0, 65, device=device), 3, width=4, n_tail=2)
        assert select_batchtopk(torch.empty(0, 65, device=device), 3)[0].indices.shape == (0, 1)
    assert codes.indices.shape == (2, 4) and not codes.values.any() and threshold == 0


def test_opcheck(device):
    pre_acts = make(3, 97, torch.float32, device)
    gmax, op = group_max_ref(pre_acts), torch.ops.fastsae.select_batchtopk.default
    for width, n_tail in ((8, 0), (2, 9), (2, None), (None, 0)):
        torch.library.opcheck(op, (pre_acts, gmax, 3, width, n_tail))
    leaf = (
        pre_acts.requires_grad_()
    )  # the last of the checks adds up outputs as they come, integers first: it cannot
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (leaf, gmax, 3, 8, 0), test_utils=checks)


def test_errors_name_what_is_wrong(device):
    pre_acts = make(3, 97, torch.float32, device)
    with pytest.raises(ValueError, match="k is 0, but must be at least 1 and at most d_sae, 97"):
        select_batchtopk(pre_acts, 0)
    with pytest.raises(ValueError, match="k is 98"):
        select_batchtopk(pre_acts, 98)
    with pytest.raises(ValueError, match=r"pre_acts is \[97\]"):
        select_batchtopk(pre_acts[0], 3)
    with pytest.raises(ValueError, match="group_max is"):
        select_batchtopk(pre_acts, 3, pre_acts)
    with pytest.raises(ValueError, match="width is 0"):
        select_batchtopk(pre_acts, 3, width=0)
