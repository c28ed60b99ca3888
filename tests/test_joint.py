"""A model that gives its joint in two ways must mean one density by them: what is judged, when, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal
from toys import F64, Toy

from mcobjectives import IWAE, VAE, LAlpha, ModelError
from mcobjectives.evaluation import evaluate

X = torch.tensor([0.9, -0.4, 2.0, 0.1], dtype=F64)


class Two(Toy):
    """Its joint is not the sum of its parts, by `off`."""

    def __init__(self, off=0.0):
        super().__init__()
        self.off, self.asked = off, 0

    def log_likelihood(self, x, h):
        return -((x - h) ** 2)

    def log_prior(self, h):
        return -(h**2) / 2 + self.off

    def log_joint(self, x, h):
        self.asked += 1
        return super().log_joint(x, h)


def test_a_joint_that_is_not_the_sum_of_its_parts_is_refused_where_the_parts_are_taken():
    found = r"^log_joint\(x, h\) of Two is another density than log_likelihood\(x, h\) \+ log_prior\(h\): make"
    for use in (IWAE(k=3, kl_weight=0.5), LAlpha(k=3, alpha=0.5), IWAE(k=4, kl_weight=0.5, chunk_size=2)):
        with pytest.raises(ModelError, match=found):
            use(Two(off=1.0), X)
    with pytest.raises(ModelError, match=found):
        evaluate(Two(off=1.0), X, k=10)
    assert torch.isfinite(IWAE(k=3)(Two(off=1.0), X))  # which takes the joint alone
    model = Two()
    for _ in range(3):
        IWAE(k=3, kl_weight=0.5)(model, X).backward()
        evaluate(model, X, k=10)
    assert model.asked == 1  # looked at once


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_a_joint_that_is_another_is_refused_beside_a_closed_form_kl_too(off):
    class Standard(Two):
        def log_prior(self, h):
            return Normal(0.0, 1.0).log_prob(h)

        def log_joint(self, x, h):
            self.asked += 1
            return self.log_prior(h) + self.log_likelihood(x, h) + off

    model, objective = Standard(), VAE(k=3, analytic_kl=True)
    if off:
        with pytest.raises(ModelError, match=r"^log_joint\(x, h\) of Standard is another density than"):
            objective(model, X)
    else:
        assert torch.isfinite(objective(model, X) + objective(model, X)) and model.asked == 1


def test_a_random_joint_is_not_judged_and_the_look_leaves_no_trace():
    class Dropped(Two):
        def log_likelihood(self, x, h):
            return super().log_likelihood(x, torch.nn.functional.dropout(h, 0.5))

        def log_joint(self, x, h):
            return self.log_prior(h) + self.log_likelihood(x, h)

    class Parts(Dropped):
        log_joint = None

    losses = []
    for model in (Dropped(), Parts()):
        torch.manual_seed(0)
        losses.append(IWAE(k=3, kl_weight=0.5)(model, X))
    assert torch.equal(*losses)


class Awkward(Two):
    """Models with a joint that is not to be called, or is not to be judged; their parts are right."""

    def __init__(self, joint):
        super().__init__()
        self.joint = joint

    def log_joint(self, x, h):
        return self.joint(x, h)


def raises(x, h):
    raise NotImplementedError


@pytest.mark.parametrize(
    "joint",
    [
        raises,
        lambda x, h: None,
        lambda x, h: (h**2).sum(),
        lambda x, h: torch.randn_like(h),
        lambda x, h: h * torch.nan,
    ],
)
def test_a_joint_that_cannot_be_judged_is_let_be(joint):
    model = Awkward(joint)
    losses = []
    for subject in (model, Awkward(None)):
        torch.manual_seed(0)
        losses.append((IWAE(k=3, kl_weight=0.5)(subject, X), evaluate(subject, X, k=60).nll))
    assert losses[0] == losses[1]


def test_the_look_at_a_joint_leaves_buffers_and_casts_alone():
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(1, 1))

        def posterior(self, x):
            return Independent(Normal(self.layer(self.norm(x)), 1.0), 1)

        def log_likelihood(self, x, h):
            return -(x - self.norm(self.layer(h).flatten(0, 1)).view_as(h)).pow(2).sum(-1)

        def log_prior(self, h):
            return -(h**2).sum(-1) / 2

        def log_joint(self, x, h):
            return self.log_likelihood(x, h) + self.log_prior(h)

    torch.manual_seed(0)
    x, model = torch.randn(5, 1), Normed()
    with torch.nn.utils.parametrize.cached():
        VAE(k=2, kl_weight=0.5)(model, x).backward()
    assert all(p.grad is not None for p in model.parameters()) and int(model.norm.num_batches_tracked) == 2
