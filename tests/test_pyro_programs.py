"""Programs as Pyro's users write them, each against a closed form: autoguides at their posterior, handlers, plates."""

import copy
import math

import pytest
import torch
from pyro_toys import LeavesTwice, clean, close, conjugate, exact_guide  # noqa: F401  the fixture is for every test

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import SVI, ReweightedWakeSleep  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from pyro.infer.reparam import LocScaleReparam  # noqa: E402
from pyro.nn import PyroModule, PyroSample  # noqa: E402
from torch.distributions import MultivariateNormal, Normal  # noqa: E402

from mcobjectives import IWAE, VAE, ModelError  # noqa: E402
from mcobjectives.evaluation import evaluate  # noqa: E402
from mcobjectives.pyro import Arguments, ObjectiveELBO, PyroModel  # noqa: E402

ALL_WAYS = [
    IWAE(k=6),
    IWAE(k=6, gradient="dreg"),
    IWAE(k=6, chunk_size=4),
    IWAE(k=6, backward_samples=2, gradient="dreg"),
    VAE(k=2),
]


def evidence(x):
    """log p(x) of the conjugate model, for each data point."""
    return -0.25 * x**2 - 0.5 * math.log(4 * math.pi)


X = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)


# Global latents: Bayesian linear regression, whose posterior is Gaussian.

NOISE = 0.5
FEATURES = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = FEATURES @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
LOG_P = MultivariateNormal(torch.zeros_like(TARGETS), FEATURES @ FEATURES.T + NOISE**2 * torch.eye(12)).log_prob(
    TARGETS
)
COVARIANCE = torch.linalg.inv(torch.eye(3) + FEATURES.T @ FEATURES / NOISE**2)
MEAN = COVARIANCE @ FEATURES.T @ TARGETS / NOISE**2


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def forward(self, features, targets):
        mean = (features * self.weight).sum(-1)
        with pyro.plate("data", len(features)):
            pyro.sample("y", dist.Normal(mean, NOISE), obs=targets)


def at_the_posterior(make):
    model = Regression()
    guide = make(model)
    guide(FEATURES, TARGETS)
    triangle = torch.linalg.cholesky(COVARIANCE)
    guide.loc = torch.nn.Parameter(MEAN.clone())
    guide.scale = triangle.diagonal().clone()
    guide.scale_tril = triangle / triangle.diagonal()[:, None]
    return model, guide


@pytest.mark.parametrize("objective", ALL_WAYS, ids=repr)
def test_automultivariatenormal_at_the_posterior_of_a_pyrosample(objective):
    with pyro.settings.context(module_local_params=True):
        model, guide = at_the_posterior(auto.AutoMultivariateNormal)
        loss = ObjectiveELBO(objective)(model, guide)(FEATURES, TARGETS)
        close(loss.detach(), -LOG_P)
        loss.backward()
        if objective.gradient == "dreg":
            close(guide.loc.grad, torch.zeros(3))
            close(guide.scale_unconstrained.grad, torch.zeros(3))


AUTOGUIDES = {
    "low rank": lambda model: auto.AutoLowRankMultivariateNormal(model, rank=2),
    "diagonal": auto.AutoDiagonalNormal,
    "multivariate": auto.AutoMultivariateNormal,
    "iaf": auto.AutoIAFNormal,
    "flow": lambda model: auto.AutoNormalizingFlow(
        model, lambda dim: dist.transforms.affine_autoregressive(dim, hidden_dims=[8])
    ),
}


def regression(features, targets):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    mean = (features * (weight if weight.dim() == 1 else weight.reshape(-1, 1, 3))).sum(-1)
    with pyro.plate("data", len(features)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=targets)


@pytest.mark.parametrize("gradient", ["reparam", "dreg", "score", "vimco"])
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides_of_many_samples_by_their_own_density(name, gradient):
    guide, k, x = AUTOGUIDES[name](regression), 5, Arguments(FEATURES, TARGETS)
    pair = PyroModel(regression, guide)
    pair.structure(x)
    torch.manual_seed(1)
    weight = pair.sites(pair.posterior(x).rsample(torch.Size((k,))))["weight"].detach().reshape(k, 3)
    log_q = guide.get_posterior().log_prob(weight)
    log_p = Normal(0.0, 1.0).log_prob(weight).sum(-1) + Normal(weight @ FEATURES.T, NOISE).log_prob(TARGETS).sum(-1)
    torch.manual_seed(1)
    loss = ObjectiveELBO(IWAE(k=k, gradient=gradient)).loss_and_grads(regression, guide, FEATURES, TARGETS)
    close(loss, math.log(k) - (log_p - log_q).logsumexp(0).item())


def planar(model):
    return auto.AutoNormalizingFlow(model, dist.transforms.planar)


def test_a_flow_without_an_inverse():
    guide, x, k = planar(regression), Arguments(FEATURES, TARGETS), 4
    pair = PyroModel(regression, guide)
    pair.structure(x)
    posterior = pair.posterior(x)
    h = posterior.rsample(torch.Size((k,)))
    flow = guide.get_posterior()
    torch.manual_seed(1)
    posterior = pair.posterior(x)
    h = posterior.rsample(torch.Size((k,)))
    found = posterior.log_prob(h).flatten()
    torch.manual_seed(1)
    base = flow.base_dist.sample((k, 1)).reshape(k, 3)

    def through(u):
        for transform in flow.transforms:
            u = transform(u)
        return u

    jacobians = torch.stack([torch.autograd.functional.jacobian(through, u) for u in base])
    close(found, Normal(0.0, 1.0).log_prob(base).sum(-1) - torch.linalg.slogdet(jacobians).logabsdet)
    ObjectiveELBO(IWAE(k=k)).loss_and_grads(regression, guide, FEATURES, TARGETS)
    with pytest.raises(
        ModelError, match=r"'_AutoNormalizingFlow_latent' cannot be evaluated.*use gradient=\"reparam\""
    ):
        ObjectiveELBO(IWAE(k=k, gradient="dreg")).loss_and_grads(regression, guide, FEATURES, TARGETS)


# Local latents.


def test_autonormal_of_a_subsampled_plate():
    total, part, seen = 40, 10, []
    x = torch.randn(total)

    def model(x):
        with pyro.plate("data", total, subsample_size=part) as i:
            seen.append(i)
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(()), 1.0)), 1.0), obs=x[i])

    with pyro.settings.context(module_local_params=True):
        guide = auto.AutoNormal(model, create_plates=lambda x: pyro.plate("data", total, subsample_size=part))
        guide(x)
        guide.locs.z.data.copy_(x / 2)
        guide.scales.z = torch.full((total,), 0.5**0.5)
        elbo = ObjectiveELBO(IWAE(k=5))
        elbo.loss(model, guide, x)
        for _ in range(3):
            close(elbo.loss_and_grads(model, guide, x), -total / part * evidence(x)[seen[-1]].sum())
            assert set(guide.locs.z.grad.nonzero().flatten().tolist()) == set(seen[-1].tolist())
            guide.locs.z.grad = None
        assert not torch.equal(*(i.sort().values for i in seen[-2:]))


@pytest.mark.parametrize(
    ("make", "options", "tolerance"),
    [
        (pyro.optim.ClippedAdam, {"lr": 0.1, "clip_norm": 1.0, "lrd": 0.99}, 0.01),
        # A schedule that ends early: near the posterior, not at it.
        (pyro.optim.ExponentialLR, {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.99}, 0.2),
    ],
)
def test_pyro_optimisers_and_schedulers(make, options, tolerance):
    guide, optimiser = auto.AutoNormal(conjugate), make(options)
    svi = SVI(conjugate, guide, optimiser, ObjectiveELBO(IWAE(k=5, gradient="dreg")))
    start = svi.evaluate_loss(X)
    for _ in range(250):
        svi.step(X)
        if isinstance(optimiser, pyro.optim.PyroLRScheduler):
            optimiser.step()
    close(guide.median()["z"], X / 2, tolerance)
    assert svi.evaluate_loss(X) < -evidence(X).sum() + 0.1 < start


def test_several_arguments_and_keywords():
    """x and y are two looks at z: given both, z ~ N((x + y) / 3, sqrt 1/3)."""

    def model(x, y=None, *, noise=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(x, y=None, *, noise=1.0):
        looks = 1 if y is None else 2
        precision = 1 + looks / noise**2
        with pyro.plate("data", len(x)):
            loc = (x + (0.0 if y is None else y)) / noise**2 / precision
            pyro.sample("z", dist.Normal(loc, precision**-0.5))

    x, y = X, X.flip(0) + 1
    elbo = ObjectiveELBO(IWAE(k=4, gradient="dreg"))
    for noise in (1.0, 0.5):
        both = MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + noise**2 * torch.eye(2))
        expected = both.log_prob(torch.stack([x, y], -1))
        close(elbo.loss(model, guide, x, y, noise=noise), -expected.sum())
        close(elbo.loss_and_grads(model, guide, x=x, y=y, noise=noise), -expected.sum())
    close(elbo.loss(model, guide, x), -evidence(x).sum())
    result = evaluate(PyroModel(model, guide), Arguments(x, y=y), k=20, batch_size=2)
    close(
        result.log_likelihood,
        MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(torch.stack([x, y], -1)),
    )


@pytest.mark.parametrize("objective", [*ALL_WAYS, IWAE(k=1), IWAE(k=1, gradient="dreg")], ids=repr)
def test_minibatches_of_different_sizes(objective):
    elbo = ObjectiveELBO(objective)
    for size in (1, 3, 5, 2):
        close(elbo.loss_and_grads(conjugate, exact_guide, X[:size]), -evidence(X[:size]).sum())


@pytest.mark.parametrize(
    "objective",
    [IWAE(k=4, gradient=g) for g in ("score", "vimco", "rws")]
    + [IWAE(k=4, gradient="vimco", backward_samples=2), IWAE(k=4, gradient="vimco", backward_samples=2, chunk_size=3)],
    ids=repr,
)
def test_categorical_guide(objective):
    centres = torch.tensor([-2.0, 0.0, 2.0])

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(centres[c], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=Normal(centres, 1.0).log_prob(x[:, None])))

    expected = (Normal(centres[:, None], 1.0).log_prob(X) - math.log(3)).logsumexp(0)
    close(ObjectiveELBO(objective).loss_and_grads(model, guide, X), -expected.sum())


# Handlers around the programs.


def test_conditioned_and_reparameterised_programs():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z_decentered", dist.Normal(x / 2, 0.5**0.5))

    model = poutine.condition(model, data={"x": X})
    close(IWAE(k=3).bound(PyroModel(model, exact_guide), X), evidence(X))
    model = poutine.reparam(model, config={"z": LocScaleReparam(0.0)})
    close(IWAE(k=3, gradient="dreg").surrogate(PyroModel(model, guide), X).detach(), evidence(X))


def test_the_mask_of_observations_alone_leaves_the_prior():
    seen = torch.tensor([True, False, True, True, False])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)))

    for objective in ALL_WAYS:
        close(objective.surrogate(PyroModel(model, guide), X).detach(), torch.where(seen, evidence(X), 0.0))


@pytest.mark.parametrize("objective", ALL_WAYS, ids=repr)
def test_ragged_sequences(objective):
    """A random walk seen with noise for 4, 2 and 3 steps, the rest masked; the guide is the exact smoother."""
    lengths, y = torch.tensor([4, 2, 3]), torch.randn(3, 4)
    means, triangles, expected = torch.zeros(3, 4), torch.eye(4).repeat(3, 1, 1), torch.zeros(3)
    for b, n in enumerate(lengths.tolist()):
        prior = torch.minimum(torch.arange(n)[:, None], torch.arange(n)).double() + 1
        covariance = torch.linalg.inv(torch.linalg.inv(prior) + torch.eye(n))
        means[b, :n], triangles[b, :n, :n] = covariance @ y[b, :n], torch.linalg.cholesky(covariance)
        expected[b] = MultivariateNormal(torch.zeros(n), prior + torch.eye(n)).log_prob(y[b, :n])

    def model(y, lengths):
        with pyro.plate("data", len(y)):
            z = torch.zeros(())
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                    pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[:, t])

    def guide(y, lengths):
        with pyro.plate("data", len(y)):
            noise = []
            for t in range(4):
                loc = means[:, t] + sum(triangles[:, t, s] * noise[s] for s in range(t))
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(loc, triangles[:, t, t]))
                noise.append((z - loc) / triangles[:, t, t])

    close(objective.surrogate(PyroModel(model, guide), Arguments(y, lengths)).detach(), expected)


# Plates.


def test_sequential_plates_within_a_vectorised_one():
    x = torch.randn(4, 3)

    def model(x):
        with pyro.plate("data", 4):
            for j in pyro.plate("columns", 3):
                z = pyro.sample(f"z{j}", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample(f"x{j}", dist.Normal(z, 1.0), obs=x[:, j])

    def guide(x):
        with pyro.plate("data", 4):
            for j in pyro.plate("columns", 3):
                pyro.sample(f"z{j}", dist.Normal(x[:, j] / 2, 0.5**0.5))

    for objective in ALL_WAYS:
        close(objective.surrogate(PyroModel(model, guide), x).detach(), evidence(x).sum(-1))


def test_a_subsampled_sequential_plate():
    def model(x, index):
        for i in pyro.plate("data", len(x), subsample=index):
            z = pyro.sample(f"z{i}", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x, index):
        for i in pyro.plate("data", len(x), subsample=index):
            pyro.sample(f"z{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    for objective in ALL_WAYS:
        elbo = ObjectiveELBO(objective, weights="joint")
        for index in ([0, 3], [4, 1]):
            close(elbo.loss(model, guide, X, index), -5 / 2 * evidence(X)[index].sum())


def test_subsampled_observations_of_one_data_point_have_another_scale():
    y = torch.randn(20, 3)

    def model(y):
        with pyro.plate("documents", 3):
            topic = pyro.sample("topic", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 20, subsample_size=5) as i:
                pyro.sample("y", dist.Normal(topic, 1.0), obs=y[i])

    def guide(y):
        with pyro.plate("documents", 3):
            pyro.sample("topic", dist.Normal(y.sum(0) / 21, 21**-0.5))

    with pytest.raises(ModelError, match=r"sites 'topic' and 'y' have different scales \(1 and 4\)"):
        ObjectiveELBO(IWAE(k=3)).loss(model, guide, y)
    assert math.isfinite(ObjectiveELBO(VAE(k=3)).loss(model, guide, y))


# What programs get wrong.


def test_plates_of_different_names_are_told_apart():
    def rows(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    reason = "z: rows in the guide, data in the model.*the same in both programs if its name and dim are"
    with pytest.raises(ModelError, match=reason):
        ObjectiveELBO(IWAE(k=2)).loss(conjugate, rows, X)


def test_a_term_outside_the_plate_is_refused():
    def model(x):
        pyro.factor("weight decay", torch.tensor(-1.0))
        conjugate(x)

    with pytest.raises(ModelError, match="weight decay: no plate"):
        ObjectiveELBO(IWAE(k=2)).loss(model, exact_guide, X)
    close(ObjectiveELBO(VAE(k=2)).loss(model, exact_guide, X), 1 - evidence(X).sum())


def branching(x, branch=None):
    """The conjugate model; the exact guide, and what it does where `branch` says so."""
    with pyro.plate("data", len(x)):
        if branch == "empty":
            return
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5), obs=x if branch == "observes" else None)
        if branch == "extra":
            pyro.sample("extra", dist.Normal(torch.zeros(()), 1.0))
        if branch == "deeper":
            with pyro.plate("inner", 2):
                pyro.sample("inner z", dist.Normal(torch.zeros(()), 1.0))


def branching_model(x, branch=None):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0), obs=x if branch == "known" else None)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        if branch == "another":
            pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        ("empty", "draws no random site"),
        ("extra", "'extra' of the guide is not a latent site of the model"),
        ("observes", "'z' of the guide is observed"),
        ("deeper", "plate 'inner' at site 'inner z' lies left of max_plate_nesting = 1"),
        ("known", "'z' of the guide is not a latent site of the model"),
        ("another", "'w' of the model is not in the guide"),
    ],
)
def test_what_the_first_run_did_not_show_is_found_later(branch, reason):
    elbo = ObjectiveELBO(IWAE(k=3))
    close(elbo.loss(branching_model, branching, X), -evidence(X).sum())
    with pytest.raises(ModelError, match=reason):
        elbo.loss(branching_model, branching, X, branch)
    close(elbo.loss(branching_model, branching, X), -evidence(X).sum())


def test_evaluation_refuses_what_has_no_row_for_each_data_point():
    def model(x):
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(()), 1.0)), 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("z", dist.Normal(x[i] / 2, 0.5**0.5))

    with pytest.raises(ModelError, match="log-weights for 2 data points, expected 5"):
        evaluate(PyroModel(model, guide), X, k=10)
    with pytest.raises(ModelError, match="log-weights for 1 data points, expected 5"):
        evaluate(PyroModel(conjugate, exact_guide, weights="joint"), X, k=10)


# Sites that depend on one another in ways that one sample alone does not show.

SHIFTED = -0.5 * X**2 / 2.09 - 0.5 * math.log(2 * math.pi * 2.09)
"""log p(x) where z ~ N(0, 1), w ~ N(z, 0.3) and x ~ N(w, 1)."""


def walk(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(z.sum(-1), 0.3))
        pyro.sample("x", dist.Normal(w, 1.0), obs=x)


def walk_back(shrink):
    """The posterior of `walk`, in which w depends on z without its event dimension."""

    def guide(x):
        loc = pyro.param("loc", x / 2.09)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc[:, None], (1.09 / 2.09) ** 0.5).to_event(1))
            pyro.sample("w", dist.Normal((shrink(z) + 0.09 * x) / 1.09, (0.09 / 1.09) ** 0.5))

    return guide


@pytest.mark.parametrize("k", [1, 2, 60])
@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg", "score", "rws"])
def test_a_squeezed_sample_is_that_of_each(gradient, k):
    elbo = ObjectiveELBO(IWAE(k=k, gradient=gradient))
    for _ in range(2):
        close(elbo.loss_and_grads(walk, walk_back(torch.squeeze), X), -SHIFTED.sum())
    if gradient in ("stl", "dreg"):
        close(pyro.param("loc").grad, torch.zeros(len(X)))


@pytest.mark.parametrize("gradient", ["reparam", "stl", "dreg", "score"])
def test_a_guide_for_one_sample_alone_is_refused_more(gradient):
    guide = walk_back(lambda z: z.reshape(len(X), 1).sum(-1))
    close(ObjectiveELBO(IWAE(k=1, gradient=gradient)).loss_and_grads(walk, guide, X), -SHIFTED.sum())
    if gradient == "stl":
        close(pyro.param("loc").grad, torch.zeros(len(X)))
    with pytest.raises(RuntimeError, match=r"shape '\[5, 1\]' is invalid for input of size 20"):
        ObjectiveELBO(IWAE(k=4, gradient=gradient)).loss_and_grads(walk, guide, X)


def test_a_guide_that_branches_on_a_sample_has_one():
    x, chance = torch.tensor(0.7), torch.tensor(0.4)
    joint = torch.stack([1 - chance, chance]).log() + Normal(torch.tensor([0.0, 3.0]), 2**0.5).log_prob(x)

    def model(x):
        c = pyro.sample("c", dist.Bernoulli(chance))
        z = pyro.sample("z", dist.Normal(3 * c, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        c = pyro.sample("c", dist.Bernoulli(joint.softmax(0)[1]))
        pyro.sample("z", dist.Normal((x + 3.0 if c else x) / 2, 0.5**0.5))

    for _ in range(4):
        close(ObjectiveELBO(VAE(k=1, gradient="score")).loss(model, guide, x), -joint.logsumexp(0))
    with pytest.raises(RuntimeError, match="Boolean value of Tensor with more than one value is ambiguous"):
        ObjectiveELBO(VAE(k=2, gradient="score")).loss(model, guide, x)


@pytest.mark.parametrize(
    "objective",
    [*ALL_WAYS, IWAE(k=1), IWAE(k=120), IWAE(k=120, chunk_size=50, gradient="dreg"), IWAE(k=6, gradient="vimco")],
    ids=repr,
)
def test_what_a_guide_leaves_for_the_model_is_of_the_same_samples(objective):
    guide = LeavesTwice()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(guide.twice / 2, 1.0), obs=x)

    elbo = ObjectiveELBO(objective)
    for _ in range(2):
        close(elbo.loss_and_grads(model, guide, X), -evidence(X).sum())
    if objective.gradient == "dreg":
        close(pyro.param("loc").grad, torch.zeros(len(X)))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"gradient": "rws"}], ids=str)
def test_what_a_discrete_guide_leaves_is_of_the_same_samples_too(options):
    """Its second samples are often its first again."""

    class Guide:
        def __call__(self, x):
            with pyro.plate("data", len(x)):
                self.on = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.9)))

    guide = Guide()

    def model(x, on=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Normal(2 * (z if on else guide.on), 1.0), obs=x)

    objective = IWAE(k=8, **{"gradient": "vimco", **options})
    for seed in range(5):
        torch.manual_seed(seed)
        found = objective.bound(PyroModel(model, guide), X)
        torch.manual_seed(seed)
        close(found, objective.bound(PyroModel(lambda x: model(x, on=True), guide), X))


@pytest.mark.parametrize("objective", [IWAE(k=5, gradient="dreg"), IWAE(k=60)], ids=repr)
def test_a_model_that_changes_with_every_run_says_nothing_of_its_guide(objective):
    """An annealing counter, or spectral norm, beside a guide whose network has dropout."""
    network = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(1, 2)).double()
    runs = []

    def guide(x):
        runs.append("guide")
        loc, scale = network(x[:, None]).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()))

    def model(x):
        runs.append("model")
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 2 - min(1, len(runs) / 1000)), obs=x)

    pair = PyroModel(model, guide)
    assert objective(pair, X).isfinite()
    runs.clear()
    objective(pair, X)
    assert runs.count("guide") == 1


# Where Pyro's own losses go wrong.


def test_where_reweighted_wake_sleep_has_one_weight_for_the_batch():
    """With each data point its own weights, the gradient of one does not depend on another's x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)))
            pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    def first_gradient(elbo, second):
        pyro.clear_param_store()
        x = torch.tensor([1.0, second])
        elbo.loss(model, guide, x) if isinstance(elbo, ObjectiveELBO) else guide(x)
        torch.manual_seed(3)
        elbo.loss_and_grads(model, guide, x)
        return pyro.param("logit").grad[0].clone()

    ours = ObjectiveELBO(IWAE(k=20, gradient="rws"))
    theirs = ReweightedWakeSleep(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    close(first_gradient(ours, 0.0), first_gradient(ours, 3.0))
    assert abs(first_gradient(theirs, 0.0) - first_gradient(theirs, 3.0)) > 0.01


def test_a_copied_elbo_has_parameters_of_its_own():
    with pyro.settings.context(module_local_params=True):
        model, guide = at_the_posterior(auto.AutoMultivariateNormal)
        elbo = ObjectiveELBO(IWAE(k=3))(model, guide)
        elbo(FEATURES, TARGETS)
        other = copy.deepcopy(elbo)
        assert list(other.state_dict()) == list(elbo.state_dict())
        other(FEATURES, TARGETS).backward()
        assert other.guide.loc.grad is not None and elbo.guide.loc.grad is None
