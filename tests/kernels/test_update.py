import pytest
import torch

from fastsae_kernels import _rows, _rows_torch
from fastsae_kernels._launch import use_backend
from fastsae_kernels.codes import Codes, tail_starts, to_dense
from fastsae_kernels.testing import assert_as_accurate, assert_close
from fastsae_kernels.transpose import transpose
from fastsae_kernels.update import (
    grad_norms,
    grad_norms_ref,
    grad_rows,
    grad_rows_ref,
    update_rows,
    update_rows_ref,
)
from tests.kernels.forms import ALL_FORMS, BACKENDS, CPP, FORMS, TRITON_HALVES

BETAS, EPS = (0.9, 0.999), 1e-8
# the halves differ in a load alone
ADAM_FORMS = [("torch", torch.float64), *(form for form in FORMS if form != ("triton", torch.float16))]
# backend, dtype of the source, dtype of the coefficients
GRAD_FORMS = [
    *((name, dtype, dtype) for name, dtype in ADAM_FORMS),
    ("torch", torch.bfloat16, torch.float32),
    *((name, torch.bfloat16, torch.float32) for name, _ in CPP[:1]),
    *(("triton", half, torch.float32) for half in TRITON_HALVES),
    ("triton", torch.float16, torch.float16),
]
# batch, d_sae, d, width, chunk
SIZES = [
    (1, 1, 1, 1, 64),
    (3, 13, 7, 3, 64),
    (5, 7, 129, 7, 1),  # every latent, every entry a chunk
    (33, 65, 33, 5, 3),
    (37, 3, 17, 2, 4),  # up to nine extra chunks: more than are added up at once
    (9, 31, 96, 4, 2),
    (4, 5, 8, 0, 64),
    (0, 5, 8, 2, 64),
]


def make_codes(batch: int, d_sae: int, width: int, *, seed: int = 0, hot: bool = True) -> Codes:
    """Random codes; the last quarter of the latents is never active, latent 0 (hot) is in every input with a slot."""
    gen = torch.Generator().manual_seed(seed)
    live = max(d_sae - d_sae // 4, min(width, d_sae))
    indices = torch.zeros(batch, width, dtype=torch.int32)
    values = torch.zeros(batch, width)
    counts = torch.randint(0, width + 1, (batch,), generator=gen, dtype=torch.int32)
    for b, count in enumerate(counts.tolist()):
        latents = torch.randperm(live, generator=gen)[:count]
        if hot and count and 0 not in latents:
            latents[0] = 0
        indices[b, :count] = latents.sort().values.int()
        values[b, :count] = torch.randn(count, generator=gen)
    return Codes(indices, values, counts)


def to(codes: Codes, device, dtype=None) -> Codes:
    indices, values, counts, starts = codes
    moved = None if starts is None else starts.to(device)
    return Codes(indices.to(device), values.to(device, dtype), counts.to(device), moved)


def unit_rows(n: int, d: int, gen) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=gen, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("name, dtype, coefficients", GRAD_FORMS, ids=str)
@pytest.mark.parametrize("batch, d_sae, d, width, chunk", SIZES)
def test_grad_rows(name, dtype, coefficients, batch, d_sae, d, width, chunk, device):
    codes = to(make_codes(batch, d_sae, width), device)
    source = torch.randn(batch, d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    with use_backend(name):
        t = transpose(codes, d_sae, chunk=chunk)

        def op(values, source):
            return grad_rows(t, values, source)

        def ref(values, source):
            sums = torch.promote_types(source.dtype, torch.float32)
            return grad_rows_ref(t, values.to(sums), source.to(sums))

        inputs = [codes.values.to(coefficients), source]
        assert_as_accurate(op, ref, inputs, grads=False)
        once, again = op(*inputs), op(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert once[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dense = to_dense(to(codes, device, torch.float64), d_sae)
    assert torch.equal(
        once[0][(dense != 0).sum(0) == 0].abs().sum().cpu(), torch.zeros((), dtype=once[0].dtype)
    )


@pytest.mark.parametrize("name, dtype, coefficients", GRAD_FORMS, ids=str)
@pytest.mark.parametrize("how", [{}, {"project": True}, {"l1_rows": True}], ids=["plain", "project", "l1"])
@pytest.mark.parametrize("batch, d_sae, d, width, chunk", SIZES)
def test_grad_norms(name, dtype, coefficients, batch, d_sae, d, width, chunk, how, device, monkeypatch):
    monkeypatch.setattr(_rows_torch, "BLOCK", 2 * d)  # several blocks of rows in the torch form
    gen = torch.Generator().manual_seed(1)
    codes = to(make_codes(batch, d_sae, width), device)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    W = unit_rows(d_sae, d, gen).to(device, own)
    inputs = [codes.values.to(coefficients), torch.randn(batch, d, generator=gen).to(device, dtype), W]
    with use_backend(name):
        t = transpose(codes, d_sae, chunk=chunk)

        def op(values, source, W):
            scalars = torch.tensor([0, 1, 1, 0.5, 2.0**-4, 0], device=device, dtype=own)
            return grad_norms(t, values, source, W, scalars=scalars, **how)

        def ref(values, source, W):
            sums = torch.promote_types(source.dtype, torch.float32)
            scalars = torch.tensor([0, 1, 1, 0.5, 2.0**-4, 0], device=device, dtype=sums)
            return grad_norms_ref(t, values.to(sums), source.to(sums), W.to(sums), scalars=scalars, **how)

        assert_as_accurate(op, ref, inputs, grads=False)
        squares, g_b = op(*inputs)
        if not how:
            alone = grad_norms(t, *inputs[:2])
            assert torch.equal(squares, alone[0]) and torch.equal(g_b, alone[1])
    assert squares.dtype == own


@pytest.mark.parametrize("name", BACKENDS)
def test_tails_are_summed_too(name, device):
    counts = torch.tensor([2, 7, 0, 5], dtype=torch.int32)
    indices = torch.zeros(4 + 3, 3, dtype=torch.int32)
    values = torch.zeros(7, 3)
    rows = {0: [1, 4], 1: [0, 1, 2], 4: [5, 6, 8], 5: [9], 3: [2, 3, 4], 6: [7, 8]}
    for row, latents in rows.items():
        indices[row, : len(latents)] = torch.tensor(latents, dtype=torch.int32)
        values[row, : len(latents)] = torch.arange(len(latents)) + row + 1.0
    codes = to(Codes(indices, values, counts, tail_starts(counts, 3)), device)
    owners = {0: 0, 1: 1, 4: 1, 5: 1, 3: 3, 6: 3}
    acts = torch.zeros(4, 10)
    for row, latents in rows.items():
        for i, latent in enumerate(latents):
            acts[owners[row], latent] = i + row + 1.0
    source = torch.arange(8.0, device=device).view(4, 2)
    with use_backend(name):
        g_W, g_b = grad_rows(transpose(codes, 10, chunk=1), codes.values, source)
    assert torch.equal(g_W.cpu(), acts.T @ source.cpu())  # small integers: no rounding
    assert torch.equal(g_b.cpu(), acts.sum(0))


@pytest.mark.parametrize("name", BACKENDS)
def test_nan_and_inf_stay_in_their_rows(name, device):
    codes = to(
        Codes(
            torch.tensor([[0, 2], [1, 2]], dtype=torch.int32),
            torch.ones(2, 2),
            torch.tensor([2, 2], dtype=torch.int32),
        ),
        device,
    )
    source = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0]], device=device)
    with use_backend(name):
        g_W, _ = grad_rows(transpose(codes, 4), codes.values, source)
    expected = torch.tensor([[float("nan"), 1], [float("inf"), 2], [float("nan"), 3], [0, 0]])
    assert torch.equal(g_W.cpu().nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


class Oracle:
    """torch.optim.Adam on dense gradients in `dtype`, with the projection and renormalisation around it."""

    def __init__(self, W, bias, dtype, lr, flags, scale, l1, betas=BETAS):
        self.W, self.bias = (a.to(dtype).clone().requires_grad_() for a in (W, bias))
        self.adam = torch.optim.Adam([self.W, self.bias], lr=lr, betas=betas, eps=EPS)
        self.flags, self.scale, self.l1, self.dtype = flags, scale, l1, dtype

    def step(self, codes, source, d_sae):
        acts, W = to_dense(codes, d_sae).to(self.dtype), self.W.detach()
        g = acts.T @ source.to(self.dtype)
        if self.flags["l1_rows"]:
            rows = W.clone().requires_grad_()
            (self.l1 * (acts.sum(0) * rows.norm(dim=-1)).sum()).backward()
            g = g + rows.grad
        if self.flags["project"]:
            g = g - (g * W).sum(-1, keepdim=True) * W
        self.W.grad, self.bias.grad = g * self.scale, acts.sum(0) * self.scale
        self.adam.step()
        if self.flags["renormalise"]:
            with torch.no_grad():
                self.W /= self.W.norm(dim=-1, keepdim=True)

    def tensors(self):
        state = self.adam.state
        return {
            "W": self.W.detach(),
            "m": state[self.W]["exp_avg"],
            "v": state[self.W]["exp_avg_sq"],
            "bias": self.bias.detach(),
            "bias_m": state[self.bias]["exp_avg"],
            "bias_v": state[self.bias]["exp_avg_sq"],
        }


PLAIN = {"project": False, "renormalise": False, "l1_rows": False}
VARIANTS = [
    PLAIN,
    {"project": True, "renormalise": True, "l1_rows": False},
    {"project": False, "renormalise": False, "l1_rows": True},
]


def state(n, d, device, dtype=torch.float32, *, m_dtype=None):
    gen = torch.Generator().manual_seed(5)
    W, bias = unit_rows(n, d, gen), torch.randn(n, generator=gen, dtype=torch.float64)
    made = {
        "W": W,
        "m": torch.zeros(n, d),
        "v": torch.zeros(n, d),
        "bias": bias,
        "bias_m": torch.zeros(n),
        "bias_v": torch.zeros(n),
    }
    made = {name: a.to(device, dtype) for name, a in made.items()}
    if m_dtype is not None:
        made["m"] = made["m"].to(m_dtype)
    return made


def scalars_at(step, lr, device, dtype=torch.float32, *, scale=1.0, l1=0.0, skip=0.0):
    return torch.tensor(
        [lr, 1 - BETAS[0] ** step, 1 - BETAS[1] ** step, scale, l1, skip], dtype=dtype, device=device
    )


@pytest.mark.parametrize("flags", VARIANTS, ids=["plain", "unit", "free"])
@pytest.mark.parametrize("name, dtype", ADAM_FORMS, ids=str)
def test_twenty_steps_are_adam(name, dtype, flags, device):
    # lr, grad_scale and l1 are exact in fp32: the oracle's fp64 run takes the same numbers
    batch, n, d, lr, scale, l1 = 9, 13, 17, 2.0**-9, 0.75, 2.0**-4
    own = torch.float64 if dtype == torch.float64 else torch.float32
    got = state(n, d, device, own)
    truth = Oracle(got["W"].cpu().double(), got["bias"].cpu(), torch.float64, lr, flags, scale, l1)
    rival = Oracle(got["W"].cpu(), got["bias"].cpu(), torch.float32, lr, flags, scale, l1)
    for step in range(1, 21):
        # latent 0 has extra chunks, some come and go, a quarter never have an entry; at step 7 none has
        codes = make_codes(batch, n, 4, seed=step) if step != 7 else make_codes(0, n, 4)
        source = torch.randn(len(codes.counts), d, generator=torch.Generator().manual_seed(step)).to(dtype)
        for oracle in (truth, rival):
            oracle.step(codes, source, n)
        scalars = scalars_at(step, lr, device, own, scale=scale, l1=l1)
        on_device = to(codes, device)
        with use_backend(name):
            t = transpose(on_device, n, chunk=2)
            update_rows(
                t,
                on_device.values.to(own),
                source.to(device),
                **got,
                scalars=scalars,
                betas=BETAS,
                eps=EPS,
                **flags,
            )
    if flags["renormalise"]:
        norms = got["W"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=4 * torch.finfo(own).eps)
    assert_close({k: a.cpu() for k, a in got.items()}, rival.tensors(), truth.tensors())
    if own == torch.float64:  # no hiding behind the fp32 rival
        assert_close({k: a.cpu() for k, a in got.items()}, truth.tensors(), truth.tensors())


@pytest.mark.parametrize("flags", VARIANTS, ids=["plain", "unit", "free"])
@pytest.mark.parametrize("name, dtype", ADAM_FORMS, ids=str)
def test_idle_rows_left_behind_are_adam_too(name, dtype, flags, device):
    """betas[0] = 0: twelve steps in which rows that are left stay to the bit; what they are behind is made up for at the end."""
    batch, n, d, lr, scale, l1, beta2 = 5, 23, 17, 2.0**-9, 0.75, 2.0**-4, 0.75
    own = torch.float64 if dtype == torch.float64 else torch.float32
    got = state(n, d, device, own)
    oracles = [
        Oracle(got["W"].cpu().to(o), got["bias"].cpu(), o, lr, flags, scale, l1, betas=(0.0, beta2))
        for o in (torch.float64, torch.float32)
    ]
    got |= {"m": None, "bias_m": None, "shadow": got["W"].clone()}
    behind, n_left = torch.zeros(n, dtype=torch.int32, device=device), 0
    for step in range(1, 13):
        codes = make_codes(batch, n, 3 if step % 3 == 1 else 1, seed=step, hot=step % 2 == 0)
        source = torch.randn(batch, d, generator=torch.Generator().manual_seed(step)).to(dtype)
        for oracle in oracles:
            oracle.step(codes, source, n)
        on_device, before = to(codes, device), {k: a.clone() for k, a in got.items() if a is not None}
        with use_backend(name):
            t = transpose(on_device, n, chunk=2)
            update_rows(
                t,
                on_device.values.to(own),
                source.to(device),
                **got,
                scalars=torch.tensor([lr, 1, 1 - beta2**step, scale, l1, 0], dtype=own, device=device),
                betas=(0.0, beta2),
                eps=EPS,
                behind=behind,
                **flags,
            )
        left, idle = behind > 0, t.starts.diff() == 0
        n_left += int(left.sum())
        assert torch.equal(left, idle) or (name == "torch" and not left.any())
        assert all(torch.equal(got[k][left], a[left]) for k, a in before.items())
        assert torch.equal(got["shadow"], got["W"])
    assert n_left > 5 and behind.any()
    for key in ("v", "bias_v"):
        got[key] *= (beta2 ** behind.to(own)).view(-1, *[1] * (got[key].ndim - 1))
    truth, rival = ({k: a for k, a in o.tensors().items() if "m" not in k} for o in oracles)
    assert_close({k: got[k].cpu() for k in truth}, rival, truth)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_without_entries_move_by_momentum(name, device):
    got = state(3, 5, device)
    got["m"][1], got["v"][1], before = 0.5, 0.25, got["W"].clone()
    codes = to(
        Codes(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), torch.ones(2, dtype=torch.int32)),
        device,
    )
    with use_backend(name):
        update_rows(
            transpose(codes, 3),
            codes.values,
            torch.ones(2, 5, device=device),
            **got,
            scalars=scalars_at(3, 0.01, device),
            betas=BETAS,
            eps=EPS,
        )
    truth = (
        torch.full((1,), 0.5 * 0.9, dtype=torch.float64),
        torch.full((1,), 0.25 * 0.999, dtype=torch.float64),
    )
    assert torch.allclose(got["m"][1].cpu().double(), truth[0], rtol=1e-6, atol=0)
    assert torch.allclose(got["v"][1].cpu().double(), truth[1], rtol=1e-6, atol=0)
    step = -0.01 * (truth[0] / (1 - 0.9**3)) / ((truth[1] / (1 - 0.999**3)).sqrt() + EPS)
    moved = (got["W"].double() - before.double())[1].cpu()
    assert torch.allclose(moved, step.expand(5), rtol=0, atol=2 * torch.finfo(torch.float32).eps)
    assert torch.equal(got["W"][2], before[2])  # neither gradient nor momentum


@pytest.mark.parametrize("name", BACKENDS)
def test_skip_leaves_every_bit(name, device):
    got = state(7, 9, device)
    got["m"].uniform_(), got["v"].uniform_(), got["bias_m"].uniform_(), got["bias_v"].uniform_()
    got["shadow"] = got["W"].half() + 1
    before = {k: a.clone() for k, a in got.items()}
    codes = to(make_codes(5, 7, 3), device)
    source = torch.full((5, 9), float("nan"), device=device)

    def step(skip):
        update_rows(
            transpose(codes, 7, chunk=1),
            codes.values,
            source,
            **got,
            project=True,
            renormalise=True,
            scalars=scalars_at(2, 0.1, device, skip=skip),
            betas=BETAS,
            eps=EPS,
        )

    with use_backend(name):
        step(1.0)
        assert all(torch.equal(got[k], before[k]) for k in got)
        step(0.0)
        assert got["W"].isnan().any() and not any(torch.equal(got[k], before[k]) for k in got)


@pytest.mark.parametrize("name, dtype", [form for form in ALL_FORMS if form[1] != torch.float32], ids=str)
@pytest.mark.parametrize("flags", VARIANTS[:2], ids=["plain", "unit"])
def test_shadow_is_the_new_weight_rounded(name, dtype, flags, device):
    got = state(11, 33, device)
    shadow = torch.full((11, 33), float("nan"), device=device, dtype=dtype)
    codes = to(make_codes(6, 11, 3), device)
    before = got["W"].clone()
    with use_backend(name):
        update_rows(
            transpose(codes, 11),
            codes.values,
            torch.randn(6, 33, device=device),
            **got,
            shadow=shadow,
            scalars=scalars_at(1, 0.01, device),
            betas=BETAS,
            eps=EPS,
            **flags,
        )
    assert torch.equal(shadow, got["W"].to(dtype)) and not torch.equal(got["W"], before)


@pytest.mark.parametrize("name", sorted({name for name, dtype in FORMS if dtype == torch.bfloat16}))
def test_bf16_momentum(name, device):
    """The first step from zero: W as with fp32 momentum, m its rounding."""
    wide, narrow = state(11, 33, device), state(11, 33, device, m_dtype=torch.bfloat16)
    codes, source = to(make_codes(6, 11, 3), device), torch.randn(6, 33, device=device)
    with use_backend(name):
        for got in (wide, narrow):
            update_rows(
                transpose(codes, 11),
                codes.values,
                source,
                **got,
                scalars=scalars_at(1, 0.01, device),
                betas=BETAS,
                eps=EPS,
            )
    assert torch.equal(narrow["m"], wide["m"].bfloat16()) and wide["m"].any()
    assert torch.equal(narrow["W"], wide["W"])


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # lanes beyond d
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("d", [5, 8])
def test_momentum_zero_and_eps_zero(name, d, device):
    """betas (0, 0) and eps 0: every touched element moves by lr against its gradient's sign; lanes beyond d stay out of norms."""
    got, codes = (
        state(2, d, device),
        Codes(
            torch.tensor([[0, 1]], dtype=torch.int32),
            torch.tensor([[1.0, -2.0]]),
            torch.tensor([2], dtype=torch.int32),
        ),
    )
    codes, source = to(codes, device), torch.randn(1, d, device=device)
    before = got["W"].clone()
    scalars = torch.tensor([0.125, 1, 1, 1, 0, 0], device=device)
    with use_backend(name):
        update_rows(
            transpose(codes, 2),
            codes.values,
            source,
            **got,
            renormalise=True,
            scalars=scalars,
            betas=(0.0, 0.0),
            eps=0.0,
        )
    stepped = before - 0.125 * torch.cat([source.sign(), -source.sign()])
    torch.testing.assert_close(got["W"], stepped / stepped.norm(dim=-1, keepdim=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_beta_zero_forgets_the_moments(name, device):
    """Whatever they were: what is left of 1e30 would hide the gradient."""
    got, codes = state(7, 19, device), to(make_codes(40, 7, 5), device)
    got["m"].fill_(1e30), got["bias_m"].fill_(1e30)
    source = torch.randn(40, 19, device=device)
    with use_backend(name):
        t = transpose(codes, 7)
        update_rows(
            t, codes.values, source, **got, scalars=scalars_at(1, 0.0, device), betas=(0.0, 0.5), eps=1.0
        )
        g_W, g_b = grad_rows(t, codes.values, source)
    assert torch.equal(got["m"], g_W) and torch.equal(got["bias_m"], g_b)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("flags", VARIANTS[1:], ids=["unit", "free"])
def test_a_row_of_zeros_is_not_divided_by_its_norm(name, flags, device):
    got, codes = state(7, 19, device), to(make_codes(40, 7, 5), device)
    idle = int((to_dense(codes, 7) != 0).any(0).logical_not().nonzero()[0])
    got["W"][0], got["W"][idle] = 0, 0  # an active one, and one without a gradient
    with use_backend(name):
        update_rows(
            transpose(codes, 7),
            codes.values,
            torch.randn(40, 19, device=device),
            **got,
            scalars=scalars_at(1, 0.01, device, l1=0.5),
            betas=BETAS,
            eps=EPS,
            **flags,
        )
    assert got["W"].isfinite().all() and got["W"][0].any() and not got["W"][idle].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_updates_repeat_to_the_bit(name, device):
    codes, source = to(make_codes(40, 7, 5), device), torch.randn(40, 19, device=device)
    runs = [state(7, 19, device) for _ in range(2)]
    with use_backend(name):
        for got in runs:
            update_rows(
                transpose(codes, 7, chunk=3),
                codes.values,
                source,
                **got,
                project=True,
                renormalise=True,
                scalars=scalars_at(1, 0.01, device),
                betas=BETAS,
                eps=EPS,
            )
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_update_is_made_of_grad_rows(name, device, monkeypatch):
    """betas (0, 1): m is the gradient itself; over several blocks of rows in the torch form."""
    monkeypatch.setattr(_rows_torch, "BLOCK", 2 * 19)
    codes, source = to(make_codes(40, 7, 5), device), torch.randn(40, 19, device=device)
    got = state(7, 19, device)
    with use_backend(name):
        t = transpose(codes, 7, chunk=3)
        g_W, g_b = grad_rows(t, codes.values, source)
        update_rows(
            t,
            codes.values,
            source,
            **got,
            scalars=torch.tensor([0.5, 1, 1, 1, 0, 0], device=device),
            betas=(0.0, 0.5),
            eps=1.0,
        )
    assert torch.equal(got["m"], g_W) and torch.equal(got["bias_m"], g_b)


def test_columns_in_blocks_are_the_same_bits(device, monkeypatch):
    """As for rows that do not fit one program; every latent hot, so that there are partial sums too."""
    codes, source = to(make_codes(40, 7, 5), device), torch.randn(40, 19, device=device)
    found = []
    for block in (32, 8):
        monkeypatch.setattr(_rows, "BLOCK_D", block)
        got = state(7, 19, device)
        with use_backend("triton"):
            t = transpose(codes, 7, chunk=3)
            found.append(grad_rows(t, codes.values, source))
            squares, _ = grad_norms(t, codes.values, source)
            torch.testing.assert_close(squares, found[-1][0].square().sum(1))
            update_rows(
                t, codes.values, source, **got, scalars=scalars_at(1, 0.01, device), betas=BETAS, eps=EPS
            )
        found[-1] += tuple(got.values())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("flags", VARIANTS, ids=["plain", "unit", "free"])
def test_ref_is_the_oracle(flags, device):
    codes, source = make_codes(9, 13, 3), torch.randn(9, 17, dtype=torch.float64)
    got = state(13, 17, "cpu", torch.float64)
    oracle = Oracle(got["W"], got["bias"], torch.float64, 2.0**-9, flags, 0.75, 2.0**-4)
    t, (W, m, v) = transpose(codes, 13), (got[name] for name in ("W", "m", "v"))
    for step in (1, 2, 3):
        oracle.step(codes, source, 13)
        at = scalars_at(step, 2.0**-9, "cpu", torch.float64, scale=0.75, l1=2.0**-4)
        W, m, v = update_rows_ref(
            t, codes.values.double(), source, W, m, v, scalars=at, betas=BETAS, eps=EPS, **flags
        )
    for name, tensor in {"W": W, "m": m, "v": v}.items():
        torch.testing.assert_close(tensor, oracle.tensors()[name], rtol=1e-10, atol=1e-13)


def test_gradients_carry_no_graph(device):
    codes = to(make_codes(5, 7, 3), device)
    values = codes.values.clone().requires_grad_()
    g_W, g_b = grad_rows(transpose(codes, 7), values, torch.ones(5, 4, device=device))
    assert not g_W.requires_grad and not g_b.requires_grad


@pytest.mark.parametrize("name", BACKENDS)
def test_opcheck(name, device):
    codes = to(make_codes(5, 7, 3), device)
    source, got = torch.randn(5, 9, device=device), state(7, 9, device)
    ops = torch.ops.fastsae
    with use_backend(name):
        t = transpose(codes, 7, chunk=2)
        torch.library.opcheck(ops.grad_rows.default, (*t, codes.values, source))
        norms = (got["W"], scalars_at(1, 0.01, device), True, True)
        torch.library.opcheck(ops.grad_norms.default, (*t, codes.values, source, *norms))
        torch.library.opcheck(ops.grad_norms.default, (*t, codes.values, source, None, None, False, False))
        arguments = (got["W"], got["m"], got["v"], scalars_at(1, 0.01, device), *BETAS, EPS, got["W"].half())
        biases = (got["bias"], got["bias_m"], got["bias_v"])
        torch.library.opcheck(
            ops.update_rows.default, (*t, codes.values, source, *arguments, True, True, False, *biases, None)
        )
        behind = torch.ones(7, dtype=torch.int32, device=device)
        arguments = (got["W"], None, got["v"], scalars_at(1, 0.01, device), 0.0, 0.9, EPS, None)
        biases = (got["bias"], None, got["bias_v"])
        torch.library.opcheck(
            ops.update_rows.default,
            (*t, codes.values, source, *arguments, True, True, False, *biases, behind),
        )


def test_errors(device):
    codes = make_codes(5, 7, 3)
    t, values, source, got = transpose(codes, 7), codes.values, torch.ones(5, 9), state(7, 9, "cpu")
    rest = {"scalars": scalars_at(1, 0.01, "cpu"), "betas": BETAS, "eps": EPS}
    W, m, v = got["W"], got["m"], got["v"]
    with pytest.raises(ValueError, match=r"coefficients has 14 slots, but the codes that were transposed 15"):
        grad_rows(t, torch.zeros(7, 2), source)
    with pytest.raises(ValueError, match=r"coefficients is \[15\], but must be \[any, any\]"):
        grad_rows(t, values.flatten(), source)
    with pytest.raises(ValueError, match=r"source must be contiguous"):
        grad_rows(t, values, torch.ones(9, 5).T)
    with pytest.raises(ValueError, match=r"source is \[4, 9\], but must be \[5, any\]"):
        grad_rows(t, values, source[:4])
    with pytest.raises(ValueError, match=r"source is \[6, 9\], but must be \[5, any\]"):
        update_rows(t, values, torch.ones(6, 9), W, m, v, **rest)
    with pytest.raises(ValueError, match=r"t.owners is int64"):
        grad_rows(t._replace(owners=t.owners.long()), values, source)
    with pytest.raises(ValueError, match=r"project needs W"):
        grad_norms(t, values, source, project=True)
    with pytest.raises(ValueError, match=r"l1_rows needs W and scalars"):
        grad_norms(t, values, source, W, l1_rows=True)
    with pytest.raises(ValueError, match=r"W is \[7, 8\], but must be \[7, 9\]"):
        grad_norms(t, values, source, W[:, :8])
    with use_backend("triton"), pytest.raises(ValueError, match=r"16385 elements.*at most 16384"):
        grad_norms(t, values, torch.ones(5, 16385), torch.ones(7, 16385), project=True)
    with use_backend("triton"), pytest.raises(ValueError, match=r"16385 elements.*at most 16384"):
        update_rows(t, values, torch.ones(5, 16385), *torch.ones(3, 7, 16385), **rest, project=True)
    with pytest.raises(ValueError, match=r"W is \[7, 8\], but must be \[7, 9\]"):
        update_rows(t, values, source, W[:, :8], m, v, **rest)
    with pytest.raises(ValueError, match=r"W is float16, but must be one of: float32, float64"):
        update_rows(t, values, source, W.half(), m, v, **rest)
    with pytest.raises(ValueError, match=r"v is bfloat16, but must be one of: float32"):
        update_rows(t, values, source, W, m, v.bfloat16(), **rest)
    with pytest.raises(ValueError, match=r"m is float16, but must be one of: float32, bfloat16"):
        update_rows(t, values, source, W, m.half(), v, **rest)
    with pytest.raises(ValueError, match=r"scalars is \[5\], but must be \[6\]"):
        update_rows(t, values, source, W, m, v, **{**rest, "scalars": rest["scalars"][:5]})
    with pytest.raises(ValueError, match=r"given together"):
        update_rows(t, values, source, W, m, v, **rest, bias=got["bias"])
    with pytest.raises(ValueError, match=r"m is None, but betas\[0\] is 0.9"):
        update_rows(t, values, source, W, None, v, **rest)
    with pytest.raises(ValueError, match=r"behind leaves rows .* m must be None"):
        update_rows(t, values, source, W, m, v, **rest, behind=torch.zeros(7, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"shadow is \[7, 8\]"):
        update_rows(t, values, source, W, m, v, **rest, shadow=W[:, :8].half())
