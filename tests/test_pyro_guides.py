"""Pyro guides and gradient estimators: enumeration, what is stopped, automatic guides, supports that move, flows."""

import itertools
import math

import pytest
import torch
from pyro_toys import DATA, LOG_P, PATHWISE, N, clean, close, conjugate, gradients, norm, same_as_trace_elbo  # noqa: F401  the fixture is for every test
from torch import nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro.infer import SVI, RenyiELBO  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from mcobjectives import IWAE, VAE, ModelError  # noqa: E402
from mcobjectives.evaluation import evaluate  # noqa: E402
from mcobjectives.pyro import ObjectiveELBO, PyroModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is biased for.*", "ignore:.*Jitter.*")


# Discrete guides, by enumeration of all samples.


class Enumerated(dist.Bernoulli):
    """A Bernoulli whose k samples at data point b are the b-th combination of {0, 1}^k."""

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Enumerated, _instance))

    def sample(self, sample_shape=()):
        k, batch = sample_shape[0] if sample_shape else 1, self.batch_shape[-1]
        combinations = torch.tensor(list(itertools.product([0.0, 1.0], repeat=(batch - 1).bit_length())))
        return combinations.T[:k].reshape(self.shape(sample_shape)).clone()


@pytest.mark.parametrize("gradient", ["score", "vimco"])
@pytest.mark.parametrize("k", [2, 3])
def test_bernoulli_guide_by_exact_enumeration(gradient, k):
    batch = 2**k

    def model(x):
        bias = pyro.param("bias", torch.tensor(0.4))
        with pyro.plate("data", batch):
            z = pyro.sample("z", dist.Bernoulli(logits=bias))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.tensor(-0.3))
        with pyro.plate("data", batch):
            pyro.sample("z", Enumerated(logits=logit))

    x = torch.ones(batch)
    pair = PyroModel(model, guide)
    bounds = IWAE(k=k, gradient=gradient).surrogate(pair, x)
    logit, bias = pyro.param("logit"), pyro.param("bias")
    combinations = torch.tensor(list(itertools.product([0.0, 1.0], repeat=k))).T
    log_q = dist.Bernoulli(logits=logit).log_prob(combinations)
    chance = log_q.sum(0).exp()
    log_w = dist.Bernoulli(logits=bias).log_prob(combinations) + dist.Normal(3 * combinations, 1.0).log_prob(x) - log_q
    close(bounds.detach(), (log_w.logsumexp(0) - math.log(k)).detach())
    close(chance.sum().detach(), 1.0)
    expected = torch.autograd.grad((chance * (log_w.logsumexp(0) - math.log(k))).sum(), [logit, bias])
    found = torch.autograd.grad((chance.detach() * bounds).sum(), [logit, bias])
    close(found, expected)
    assert abs(expected[0]) > 0.01


def test_where_renyi_gives_a_discrete_guide_no_gradient():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    x = torch.tensor([0.0, 3.0])
    RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True).loss_and_grads(model, guide, x)
    close(pyro.param("logit").grad, torch.zeros(2))
    pyro.param("logit").grad = None
    ObjectiveELBO(IWAE(k=50, gradient="vimco")).loss_and_grads(model, guide, x)
    assert pyro.param("logit").grad[0] > 0 > pyro.param("logit").grad[1]  # towards z = 0 and z = 1
    with pytest.raises(ModelError, match=r"pathwise gradient needs rsample, which the guide of site\(s\) z does not"):
        ObjectiveELBO(IWAE(k=50)).loss_and_grads(model, guide, x)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), ObjectiveELBO(IWAE(k=50, gradient="vimco")))
    for _ in range(200):
        loss = svi.step(x)
    evidence = sum(math.log(0.6 * norm(v) + 0.4 * norm(v - 3)) for v in x.tolist())
    assert abs(loss + evidence) < 0.02


# Which parameters an estimator stops.


class Shared(nn.Module):
    """p(z) = N(m, 1), p(x | z) = N(z, 1), q = N(m + a, s): the parameter m is in both."""

    def __init__(self):
        super().__init__()
        self.m, self.a, self.s = (nn.Parameter(torch.tensor(v)) for v in (0.3, -0.2, 0.8))

    def posterior(self, x):
        return Normal((self.m + self.a).expand(len(x)), self.s)

    def log_joint(self, x, h):
        return Normal(self.m, 1.0).log_prob(h) + Normal(h, 1.0).log_prob(x)


@pytest.mark.parametrize("gradient", [*PATHWISE, "score", "vimco", "rws"])
def test_a_parameter_that_guide_and_model_share(gradient):
    def m():
        return pyro.param("m", torch.tensor(0.3))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(m(), 1.0)), 1.0), obs=x)

    def guide(x):
        a, s = pyro.param("a", torch.tensor(-0.2)), pyro.param("s", torch.tensor(0.8))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m() + a, s))

    by_hand, x = Shared(), torch.tensor([1.0, -2.0, 0.5])
    objective = IWAE(k=4, gradient=gradient)
    torch.manual_seed(2)
    expected = gradients(by_hand, objective(by_hand, x))
    torch.manual_seed(2)
    objective(PyroModel(model, guide), x).backward()
    for name in ("m", "a", "s"):
        close(pyro.param(name).grad, expected[name])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_at_the_exact_guide_stl_and_dreg_are_zero(gradient):
    def guide(x):
        loc, scale = pyro.param("loc", x / 2), pyro.param("scale", torch.full_like(x, 0.5**0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    ObjectiveELBO(IWAE(k=10, gradient=gradient)).loss_and_grads(conjugate, guide, DATA)
    close(pyro.param("loc").grad, torch.zeros(N))
    close(pyro.param("scale").grad, torch.zeros(N))


@pytest.mark.parametrize("gradient", [*PATHWISE, "score", "vimco", "rws"])
def test_parameters_of_a_change_of_variables_are_not_those_of_q(gradient):
    """u ~ N(0, 1), z = loc + scale u as a Delta: q(u) has no parameters, so every estimator gives reparam's."""

    def guide(x):
        loc, scale = pyro.param("loc", torch.zeros(len(x))), pyro.param("scale", torch.full((len(x),), 0.7))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(loc + scale * u, log_density=-scale.log().expand(u.shape)))

    def factored(x):  # the same by a factor
        loc, scale = pyro.param("loc", torch.zeros(len(x))), pyro.param("scale", torch.full((len(x),), 0.7))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(torch.zeros(()), 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(loc + scale * u))
            pyro.factor("jacobian", -scale.log().expand(u.shape), has_rsample=True)

    def plain(x):
        loc, scale = pyro.param("loc", torch.zeros(len(x))), pyro.param("scale", torch.full((len(x),), 0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    x, found = torch.tensor([1.0, -2.0, 0.5]), []
    for g, estimator in ((guide, gradient), (factored, gradient), (plain, "reparam")):
        pyro.clear_param_store()
        torch.manual_seed(4)
        ObjectiveELBO(IWAE(k=5, gradient=estimator)).loss_and_grads(conjugate, g, x)
        found.append((pyro.param("loc").grad.clone(), pyro.param("scale").grad.clone()))
    close(found[0], found[2])
    close(found[1], found[2])


# Autoguides.


def positive(x):
    with pyro.plate("data", len(x)):
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()), 0.5))
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(rate + mix[..., 0], 0.5), obs=x)


def whole(x):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros(()), 0.5))
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(rate + mix[..., 0], 0.5), obs=x)


def flow(model):
    return auto.AutoNormalizingFlow(model, lambda dim: dist.transforms.affine_autoregressive(dim, hidden_dims=[16]))


@pytest.mark.parametrize("model", [positive, whole])
@pytest.mark.parametrize(
    "make",
    [auto.AutoNormal, auto.AutoDiagonalNormal, auto.AutoMultivariateNormal, auto.AutoLowRankMultivariateNormal, flow],
)
def test_autoguides_seed_for_seed_as_trace_elbo(model, make):
    same_as_trace_elbo(model, make(model), torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("make", [auto.AutoNormal, auto.AutoLowRankMultivariateNormal, flow])
def test_what_is_stopped_in_autoguides(make, gradient, k):
    """d/dphi of log p |J| - log q at samples of phi, q's parameters a copy's, weighted by w (STL) or w^2 (DReG)."""
    x = torch.tensor([0.5, 1.0, 2.0])
    with pyro.settings.context(module_local_params=True):
        guide, fixed = make(whole), make(whole)
        pair, reference = PyroModel(whole, guide), PyroModel(whole, fixed)
        guide(x), fixed(x)
        fixed.load_state_dict(guide.state_dict())
        torch.manual_seed(1)
        found = gradients(guide, -IWAE(k=k, gradient=gradient)(pair, x))
        torch.manual_seed(1)
        h = dict(pair.posterior(x).rsample(torch.Size((k,))))
        log_w = reference.log_joint(x, h) - reference.posterior(x).log_prob(h)
        weight = log_w.detach().softmax(0) ** (2 if gradient == "dreg" else 1)
        expected = gradients(guide, (weight * log_w).sum())
    assert found.keys() == expected.keys() and found
    for name in found:
        close(found[name], expected[name])


def test_autonormal_keeps_a_weight_for_each_data_point():
    guide, x = auto.AutoNormal(positive), torch.tensor([0.5, 1.0, 2.0])
    bound = IWAE(k=2000).bound(PyroModel(positive, guide), x)
    assert bound.shape == (3,)
    joint = IWAE(k=2000).bound(PyroModel(positive, guide, weights="joint"), x)
    assert joint.shape == (1,)
    with pytest.raises(ModelError, match=r"no weight for each data point.*AutoDiagonalNormal_latent: no plate"):
        IWAE(k=2).bound(PyroModel(positive, auto.AutoDiagonalNormal(positive)), x)


def test_autonormal_trains_to_the_evidence():
    x = torch.tensor([0.5, -1.0, 2.0])
    guide = auto.AutoNormal(conjugate)
    svi = SVI(conjugate, guide, pyro.optim.Adam({"lr": 0.05}), ObjectiveELBO(IWAE(k=10, gradient="dreg")))
    for _ in range(300):
        svi.step(x)
    close(guide.median()["z"], x / 2, 0.02)
    close(svi.evaluate_loss(x), -float((-0.25 * x**2 - 0.5 * math.log(4 * math.pi)).sum()), 0.01)


@pytest.mark.parametrize("first", ["loss", "bound"])
def test_a_guide_whose_support_moves_trains_by_plain_reparam_alone(first):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        width = pyro.param("width", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - width, x + width))

    pair, x = PyroModel(model, guide), torch.tensor([0.0, 3.0])
    if first == "bound":  # the programs are looked at once, here without a graph
        IWAE(k=3).bound(pair, x)
    IWAE(k=3)(pair, x).backward()
    for gradient in ("stl", "dreg", "score", "vimco"):
        with pytest.raises(ModelError, match=r"wrong for the guide of site\(s\) z, whose support moves"):
            IWAE(k=3, gradient=gradient)(pair, x)
        assert torch.isfinite(IWAE(k=3, gradient=gradient).bound(pair, x)).all()


def test_a_support_that_moves_with_other_samples_alone_is_none_that_moves():
    """b in (a - 1, a + 1) with a reparameterised: the support of (a, b) has no parameters."""

    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(loc * x, 1.0))
            pyro.sample("b", dist.Uniform(a - 1, a + 1))

    pair, x = PyroModel(model, guide), torch.tensor([0.5, -1.0])
    for gradient in ("reparam", "stl", "dreg", "score", "vimco"):
        assert torch.isfinite(IWAE(k=3, gradient=gradient)(pair, x))


def test_straight_through_sites_are_warned_of(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategoricalStraightThrough(logits=logits))

    monkeypatch.setattr("mcobjectives.messages.warned", set())
    with pytest.warns(UserWarning, match=r"h of the guide of site\(s\) z is discrete, and a gradient straight through"):
        IWAE(k=3)(PyroModel(model, guide), torch.tensor([0.0, 3.0]))


def test_a_planar_flow_needs_no_inverse_at_any_k():
    """Pyro's planar transform knows the density of its latest samples alone."""
    planar = dist.transforms.Planar(2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        pyro.module("planar", planar)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1), planar))

    pair, x = PyroModel(model, guide), torch.tensor([0.5, -1.0])
    found = []
    for size in (None, 7, 50):
        torch.manual_seed(0)
        loss = IWAE(k=120, chunk_size=size)(pair, x)
        found.append((loss.detach(), *torch.autograd.grad(loss, list(planar.parameters()))))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            close(one, two)
    assert math.isfinite(evaluate(pair, x, k=120, chunk_size=7).nll)
    for options in ({"gradient": "dreg"}, {"backward_samples": 5}):
        with pytest.raises(ModelError, match="a flow without an inverse knows that of its latest samples alone"):
            IWAE(k=60, **options)(pair, x).backward()


def extra_site(name, delta=False):
    """The exact guide of `conjugate` beside a random site that the model lacks."""

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample(name, dist.Normal(torch.zeros(()), 10.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            if delta:
                pyro.sample("twice", dist.Delta(2 * torch.ones(len(x))), infer={"is_auxiliary": True})

    return guide


@pytest.mark.parametrize("guide", [extra_site("a"), extra_site("a", delta=True), extra_site("x")])
def test_an_auxiliary_site_that_changes_no_variable_is_refused(guide):
    for objective in (IWAE(k=3), VAE()):
        with pytest.raises(ModelError, match=r"auxiliary site '[ax]' of the guide .* no Delta site of the model"):
            ObjectiveELBO(objective).loss(conjugate, guide, torch.zeros(3))


def test_an_auxiliary_site_of_the_model_too_is_a_latent_one():
    """r(a | z) in the model for q(a): a is integrated out, and the bound is log p(x) where both are one density."""

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(()), 10.0))
        conjugate(x)

    close(ObjectiveELBO(IWAE(k=3)).loss(model, extra_site("a"), DATA), -LOG_P.sum())


# Programs that change after the first look.


def moving_programs():
    """Uniform(-width, width), whose parameter may be frozen; behind it a Normal site that depends on it, or none."""
    width = torch.tensor(1.5, requires_grad=True)

    def model(x, depends):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if depends:
                z = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, depends):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-width.expand(len(x)), width))
            if depends:
                pyro.sample("y", dist.Normal((x + z) / 2, 0.5**0.5))

    return model, guide, width


@pytest.mark.parametrize("depends", [False, True])
@pytest.mark.parametrize("gradient", ["stl", "dreg", "score", "vimco"])
def test_a_support_that_moves_once_its_parameter_is_trained_is_refused(gradient, depends):
    model, guide, width = moving_programs()
    x, elbo = torch.tensor([0.0, 3.0]), ObjectiveELBO(IWAE(k=4, gradient=gradient))
    for _ in range(2):
        width.requires_grad_(False)
        assert math.isfinite(elbo.loss_and_grads(model, guide, x, depends))
        width.requires_grad_(True)
        with pytest.raises(ModelError, match=r"wrong for the guide of site\(s\) z, whose support moves"):
            elbo.loss_and_grads(model, guide, x, depends)
        assert math.isfinite(elbo.loss(model, guide, x, depends))
    ObjectiveELBO(IWAE(k=4)).loss_and_grads(model, guide, x, depends)
    assert width.grad is not None


def normal_prior(x, uniform):
    conjugate(x)


def sometimes_uniform(x, uniform):
    width = pyro.param("width", torch.tensor(0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Uniform(x - width, x + width) if uniform else dist.Normal(x, width))


def sometimes_discrete(x, discrete):
    chance = pyro.param("chance", torch.tensor(0.7))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(chance.expand(len(x))) if discrete else dist.Normal(x, chance))


def discrete_prior(x, discrete):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5) if discrete else dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_branch_to_another_distribution_is_judged_by_it():
    x, dreg = torch.tensor([0.5, -1.0]), ObjectiveELBO(IWAE(k=3, gradient="dreg"))
    for uniform in (False, True, False):
        if uniform:
            with pytest.raises(ModelError, match=r"wrong for the guide of site\(s\) z, whose support moves"):
                dreg.loss_and_grads(normal_prior, sometimes_uniform, x, uniform)
        else:
            dreg.loss_and_grads(normal_prior, sometimes_uniform, x, uniform)
    for discrete in (False, True, False):
        if discrete:
            with pytest.raises(ModelError, match=r"rsample, which the guide of site\(s\) z does not have"):
                dreg.loss_and_grads(discrete_prior, sometimes_discrete, x, discrete)
        else:
            dreg.loss_and_grads(discrete_prior, sometimes_discrete, x, discrete)


def test_local_latents_after_a_look_at_a_global_one_alone_are_not_joined():
    def model(x, local):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0)) if local else mean
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, local):
        spread = 1 + len(x) / 2 if local else 1 + len(x)
        loc = x.sum() / 2 / spread if local else x.sum() / spread
        mean = pyro.sample("mean", dist.Normal(loc, spread**-0.5))
        if local:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((mean + x) / 2, 0.5**0.5))

    x = torch.tensor([1.0, -0.5, 2.0])
    expected = {
        local: -dist.MultivariateNormal(torch.zeros(3), (1 + local) * torch.eye(3) + 1).log_prob(x)
        for local in (False, True)
    }
    iwae, vae = ObjectiveELBO(IWAE(k=5)), ObjectiveELBO(VAE(k=5))
    close(iwae.loss(model, guide, x, False), expected[False])
    with pytest.raises(ModelError, match="latent site 'z' is in the plate 'data', and at first no latent was in one"):
        iwae.loss(model, guide, x, True)
    joint = ObjectiveELBO(IWAE(k=5), weights="joint")
    for elbo in (joint, vae):
        for local in (False, True):
            close(elbo.loss(model, guide, x, local), expected[local])


def test_a_look_at_supports_without_ends_runs_no_guide():
    runs = []

    def guide(x):
        runs.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.sample("w", dist.Normal(z, 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    pair = PyroModel(model, guide)
    pair.posterior(DATA)
    posterior = pair.posterior(DATA)
    runs.clear()
    assert not posterior.moving_support and not runs
