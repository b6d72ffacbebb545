"""select_topk on ties that hypothesis draws; a GPU machine may lack it, and has the fixed ones of test_select_topk."""

import pytest
import torch

from fastsae_kernels._launch import use_backend
from tests.kernels.forms import BACKENDS
from tests.kernels.test_select_topk import assert_exact

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies


@pytest.mark.parametrize("positive", [True, False])
@hypothesis.settings(
    max_examples=6, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(data=st.data())
def test_ties(positive, device, data):
    d_sae = data.draw(st.integers(1, 130))
    k = data.draw(st.integers(1, d_sae))
    top = data.draw(st.integers(1, 4))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    pre_acts = torch.randint(-top, top + 1, (1, d_sae), generator=gen).float().to(device)
    for backend in BACKENDS:
        with use_backend(backend):
            assert_exact(pre_acts, k, positive)
