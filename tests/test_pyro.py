"""Pyro programs as models: exact numbers against closed forms, enumeration and hand-written models."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, config_enumerate  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from pyro.nn import PyroModule, PyroParam  # noqa: E402
from torch.distributions import Independent, Normal  # noqa: E402

from mcobjectives import (  # noqa: E402
    CIWAE,
    IWAE,
    MIWAE,
    VAE,
    LAlpha,
    Median,
    ModelError,
    Power,
    Split,
)
from mcobjectives.evaluation import evaluate  # noqa: E402
from mcobjectives.pyro import Arguments, ObjectiveELBO, PyroModel  # noqa: E402
from mcobjectives.testing import check_model  # noqa: E402
from mcobjectives.testing.models import model_findings  # noqa: E402

PATHWISE = ["reparam", "stl", "dreg"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is biased for.*", "ignore:.*Jitter.*")


@pytest.fixture(autouse=True)
def clean():
    """An empty parameter store, double precision, a fixed seed."""
    pyro.clear_param_store()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


def close(actual, expected, tolerance=1e-10):
    if not isinstance(actual, tuple):
        actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def run(python: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)


def test_the_library_does_not_load_pyro():
    assert run("import mcobjectives, sys; assert 'pyro' not in sys.modules").returncode == 0


def test_without_pyro_the_extra_is_named():
    blocked = "import sys; sys.modules['pyro'] = None; import mcobjectives; import mcobjectives.pyro"
    assert 'ImportError: mcobjectives.pyro needs Pyro: pip install "mcobjectives[pyro]"' in run(blocked).stderr


# Hand-written models and the same as programs.


class Gaussian(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.loc, self.log_scale = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, y: Tensor) -> Independent:
        return Independent(Normal(self.loc(y), (0.3 * self.log_scale(y)).exp()), 1)


class Sequence:
    """q(h1 | x) q(h2 | h1) by hand."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def rsample(self, shape):
        h1 = self.first.rsample(shape)
        return {"h1": h1, "h2": self.second(h1).rsample()}

    def log_prob(self, h):
        return self.first.log_prob(h["h1"]) + self.second(h["h1"]).log_prob(h["h2"])


class Vae(nn.Module):
    """One or two Gaussian layers over Bernoulli data; by hand, and as programs."""

    def __init__(self, layers: int, pixels: int = 6):
        super().__init__()
        self.layers, self.calls = layers, []
        self.encoder, self.upper = Gaussian(pixels, 3), Gaussian(3, 2)
        self.lower, self.decoder = Gaussian(2, 3), nn.Linear(3, pixels)

    def prior(self, size):
        return Independent(Normal(torch.zeros(size), torch.ones(size)), 1)

    def posterior(self, x):
        q = self.encoder(x)
        return q if self.layers == 1 else Sequence(q, self.upper)

    def log_prior(self, h):
        if self.layers == 1:
            return self.prior(3).log_prob(h)
        return self.prior(2).log_prob(h["h2"]) + self.lower(h["h2"]).log_prob(h["h1"])

    def log_likelihood(self, x, h):
        h1 = h if self.layers == 1 else h["h1"]
        return -nn.functional.binary_cross_entropy_with_logits(
            self.decoder(h1), x.expand(*h1.shape[:-1], -1), reduction="none"
        ).sum(-1)

    def log_joint(self, x, h):
        return self.log_prior(h) + self.log_likelihood(x, h)

    def program(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            if self.layers == 1:
                h1 = pyro.sample("h1", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            else:
                h2 = pyro.sample("h2", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                h1 = pyro.sample("h1", self.as_pyro(self.lower(h2)))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(h1)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            self.calls.append(x.shape)
            h1 = pyro.sample("h1", self.as_pyro(self.encoder(x)))
            if self.layers == 2:
                pyro.sample("h2", self.as_pyro(self.upper(h1)))

    @staticmethod
    def as_pyro(q):
        return dist.Normal(q.base_dist.loc, q.base_dist.scale).to_event(1)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


X = (torch.arange(24).reshape(4, 6) * 7 % 5 > 2).double()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "objective",
    [
        VAE(k=1),
        *(IWAE(k=k, gradient=g) for k in (1, 5) for g in ["reparam", "stl", "dreg", "score", "rws"]),
        IWAE(k=5, gradient="vimco"),
        IWAE(k=120, gradient="dreg"),
        IWAE(k=60, chunk_size=25),
        IWAE(k=60, chunk_size=25, gradient="dreg"),
        IWAE(k=20, backward_samples=4, gradient="dreg"),
        IWAE(k=20, backward_samples=4, chunk_size=7),
        LAlpha(k=3, alpha=0.5),
        CIWAE(k=4, beta=0.3, gradient="dreg"),
        MIWAE(k1=2, k2=3, kl_weight=0.7, gradient="dreg"),
        Power(k=4, p=0.5, kl_weight=0.7),
        Median(k=5),
    ],
    ids=repr,
)
def test_seed_for_seed_as_by_hand(layers, objective):
    vae = Vae(layers)
    torch.manual_seed(3)
    expected = objective(vae, X)
    expected_gradients = gradients(vae, expected)
    torch.manual_seed(3)
    loss = objective(PyroModel(vae.program, vae.guide), X)
    close(loss, expected.detach())
    found = gradients(vae, loss)
    assert found.keys() == expected_gradients.keys()
    for name in found:
        close(found[name], expected_gradients[name])
    torch.manual_seed(3)
    expected_bound = objective.bound(vae, X)
    torch.manual_seed(3)
    close(objective.bound(PyroModel(vae.program, vae.guide), X), expected_bound)


@pytest.mark.parametrize("options", [{}, {"gradient": "dreg"}, {"chunk_size": 10}, {"gradient": "score"}], ids=repr)
def test_the_guide_runs_once_on_batch_rows(options):
    vae = Vae(1)
    model = PyroModel(vae.program, vae.guide)
    IWAE(k=50)(model, X)
    vae.calls.clear()
    IWAE(k=50, **options)(model, X).backward()
    assert vae.calls == [(4, 6)]


def test_a_dependent_guide_runs_once_for_reparam():
    vae = Vae(2)
    model = PyroModel(vae.program, vae.guide)
    IWAE(k=50)(model, X)
    vae.calls.clear()
    IWAE(k=50)(model, X).backward()
    assert vae.calls == [(4, 6)]


def test_samples_remember_the_data_they_were_drawn_for():
    vae, other = Vae(2), 1 - X
    model, objective = PyroModel(vae.program, vae.guide), IWAE(k=6, chunk_size=2, gradient="dreg")
    torch.manual_seed(1)
    expected = gradients(vae, objective(vae, X) + objective(vae, other))
    torch.manual_seed(1)
    found = gradients(vae, objective(model, X) + objective(model, other))
    for name in expected:
        close(found[name], expected[name])


# Closed forms: z ~ N(0, 1), x ~ N(z, 1), so x ~ N(0, sqrt 2) and z | x ~ N(x / 2, sqrt 1/2).

N, B = 1000, 10
DATA = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2**0.5
LOG_P = -0.25 * DATA**2 - 0.5 * math.log(4 * math.pi)


def conjugate(x, index=None, spread=0.5**0.5):
    with pyro.plate("data", len(x), subsample=index) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def exact_guide(x, index=None, spread=0.5**0.5):
    with pyro.plate("data", len(x), subsample=index) as i:
        pyro.sample("z", dist.Normal(x[i] / 2, spread))


def test_samples_are_evaluated_at_the_x_that_is_given():
    pair = PyroModel(conjugate, exact_guide)
    drawn_for, x = torch.zeros(3, dtype=torch.float64), torch.full((3,), 5.0, dtype=torch.float64)
    h = pair.posterior(drawn_for).sample(torch.Size((2,)))
    z = h["z"]
    close(pair.log_joint(x, h), Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x))
    close(pair.posterior(x).log_prob(h), Normal(x / 2, 0.5**0.5).log_prob(z))
    close(pair.log_joint(drawn_for, h), Normal(0.0, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(drawn_for))


def test_samples_keep_their_subsample_whatever_x_is_called():
    def program(x):
        with pyro.plate("data", N, subsample_size=B) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", N, subsample_size=B) as i:
            pyro.sample("z", dist.Normal(x[i], 0.001))

    pair = PyroModel(program, guide)
    posterior = pair.posterior(DATA)
    h = posterior.sample(torch.Size((2,)))
    for again in (DATA, DATA[:], DATA.clone(), Arguments(x=DATA)):
        close(pair.log_joint(again, h), pair.log_joint(DATA, h))
        close(pair.posterior(again).log_prob(h), posterior.log_prob(h))


def test_a_subsample_is_kept_though_the_first_x_was_whole():
    def size(x):
        return {"size": len(x), "subsample_size": min(B, len(x))}

    def program(x):
        with pyro.plate("data", **size(x)) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", **size(x)) as i:
            pyro.sample("z", dist.Normal(x[i], 0.001))

    pair = PyroModel(program, guide)
    assert torch.isfinite(IWAE(k=2).bound(pair, DATA[:5])).all()  # as small as a subsample
    posterior = pair.posterior(DATA)
    h = posterior.sample(torch.Size((2,)))
    close(pair.posterior(DATA).log_prob(h), posterior.log_prob(h))
    close(pair.log_joint(DATA.clone(), h), pair.log_joint(DATA, h))
    with pytest.raises(ModelError, match=r"the samples are of data point .* which has 20: draw"):
        pair.log_joint(DATA[:20], h)


def test_samples_of_whole_plates_go_with_an_x_of_another_size():
    def program(x):
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("columns", x.shape[1], subsample_size=4, dim=-1) as i, pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, i])

    def guide(x):
        pyro.sample("w", dist.Normal(0.3 * torch.ones(()), 1.0))

    pair = PyroModel(program, guide, scaled=True)
    h = pair.posterior(torch.zeros(8, 6)).sample(torch.Size((2,)))
    pair.log_joint(torch.zeros(8, 6), h)
    w = h["w"].flatten()
    expected = Normal(0.0, 1.0).log_prob(w) + 5 * 6 * Normal(w, 1.0).log_prob(torch.zeros(()))
    close(pair.log_joint(torch.zeros(5, 6), h).flatten(), expected, 1e-4)


def test_densities_of_the_same_samples_follow_the_parameters():
    decoder = nn.Linear(1, 1).double()

    def program(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.7).to_event(1))

    pair, x = PyroModel(program, guide), torch.randn(4, 1, dtype=torch.float64)
    h = pair.posterior(x).sample(torch.Size((2,)))
    for _ in range(2):
        found = pair.log_joint(x, h)
        close(found, pair.log_likelihood(x, h) + pair.log_prior(h))
        close(found, Normal(decoder(h["z"]), 1.0).log_prob(x).sum(-1) + Normal(0.0, 1.0).log_prob(h["z"]).sum(-1))
        close(pair.posterior(x).log_prob(h), Normal(pyro.param("slope") * x, 0.7).log_prob(h["z"]).sum(-1))
        found.mean().backward()
        with torch.no_grad():
            decoder.weight += 1.0
            pyro.param("slope").unconstrained().add_(1.0)


@pytest.mark.parametrize("leaks", [(), ("model",), ("guide",)], ids=str)
def test_the_kit_finds_a_leak_between_data_points_of_a_program(leaks):
    def program(x):
        shift = x.mean() if "model" in leaks else 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 - (x.mean() if "guide" in leaks else 0.0), 0.7))

    findings = model_findings(PyroModel(program, guide), torch.randn(6))
    assert {f.property for f in findings if f.passed is False} == ({"leak", "sizes"} if leaks else set())


def test_the_kit_leaves_the_store_and_the_modules_as_they_were():
    class Generative(PyroModule):
        def __init__(self):
            super().__init__()
            self.weight = PyroParam(torch.tensor(0.5))
            self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.weight * z, self.noise), obs=x)

    class Inference(PyroModule):
        def __init__(self):
            super().__init__()
            self.slope = PyroParam(torch.tensor(0.5))
            self.width = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, self.width))

    def train(check):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pair, x = PyroModel(Generative(), Inference()), torch.randn(6)
        optimiser = torch.optim.SGD(pair.parameters(), 0.1)
        if check:
            assert all(f.passed is not False for f in check_model(pair, x))
            assert not list(pyro.get_param_store().keys())
        torch.manual_seed(1)
        for _ in range(3):
            optimiser.zero_grad()
            IWAE(k=5)(pair, x).backward()
            optimiser.step()
        return [p.detach().clone() for p in pair.parameters()]

    trained, checked_first = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(trained, checked_first, strict=True))
    assert all(float(p) not in (0.5, 0.0, math.log(0.7)) for p in trained)  # all of them moved


def test_at_the_exact_guide_every_bound_is_log_p():
    for objective in (VAE(k=3), IWAE(k=7), Power(k=5, p=2.0), Median(k=4), MIWAE(k1=2, k2=3)):
        close(objective.bound(PyroModel(conjugate, exact_guide), DATA), LOG_P)
        close(ObjectiveELBO(objective).loss(conjugate, exact_guide, DATA), -LOG_P.sum())


def test_subsampling_scales_outside_the_logarithm():
    batches = torch.randperm(N).reshape(-1, B)
    elbo = ObjectiveELBO(IWAE(k=50))
    losses = [elbo.loss(conjugate, exact_guide, DATA, i) for i in batches]
    for i, loss in zip(batches, losses, strict=True):
        close(loss, -(N / B) * LOG_P[i].sum())
    close(sum(losses) / len(losses), -LOG_P.sum())  # exactly unbiased over the choice of the subsample


def test_where_renyi_is_wrong_under_subsampling():
    wide = {"spread": 1.5}  # a guide that is not exact: log w varies
    batches = torch.randperm(N).reshape(-1, B)[:40]
    elbo, renyi = ObjectiveELBO(IWAE(k=50)), RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True)
    truth = sum(float(LOG_P[i].sum()) for i in batches) * N / B / len(batches)
    ours = -sum(elbo.loss(conjugate, exact_guide, DATA, i, **wide) for i in batches) / len(batches)
    theirs = -sum(renyi.loss(conjugate, exact_guide, DATA, i, **wide) for i in batches) / len(batches)
    assert abs(ours - truth) < 20 < 300 < abs(theirs - truth)
    with_whole_data = -elbo.loss(conjugate, exact_guide, DATA, **wide)
    assert -20 < with_whole_data - float(LOG_P.sum()) < 0


def test_random_subsamples_are_shared_by_guide_and_model():
    seen = []

    def model(x):
        with pyro.plate("data", N, subsample_size=B) as i:
            seen.append(i)
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        with pyro.plate("data", N, subsample_size=B) as i:
            seen.append(i)
            pyro.sample("z", dist.Normal(x[i] / 2, 0.5**0.5))

    for objective in (IWAE(k=60, chunk_size=20), IWAE(k=8, gradient="dreg"), IWAE(k=8, backward_samples=2)):
        elbo = ObjectiveELBO(objective)
        elbo.loss(model, guide, DATA)
        seen.clear()
        close(elbo.loss_and_grads(model, guide, DATA), -(N / B) * LOG_P[seen[0]].sum())
        assert all(torch.equal(i, seen[0]) for i in seen)
        before = seen[0]
        elbo.loss(model, guide, DATA)
        assert not torch.equal(before, seen[-1])


def test_chunks_share_the_subsample_of_a_dependent_guide():
    def model(x):
        with pyro.plate("data", N, subsample_size=B) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x[i])

    def guide(x):
        loc = pyro.param("loc", torch.linspace(-1, 1, N))
        with pyro.plate("data", N, subsample_size=B) as i:
            z = pyro.sample("z", dist.Normal(loc[i], 0.8))
            pyro.sample("y", dist.Normal(z / 2 + x[i] / 2, 0.7))

    found = []
    for options in ({}, {"chunk_size": 10}):
        elbo = ObjectiveELBO(IWAE(k=40, gradient="dreg", **options))
        pyro.clear_param_store()
        elbo.loss(model, guide, DATA)
        torch.manual_seed(5)
        loss = elbo.loss_and_grads(model, guide, DATA)
        found.append((loss, pyro.param("loc").grad.clone()))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])
    assert (found[0][1] != 0).sum() == B


def test_poutine_scale_applies_outside():
    scaled = ObjectiveELBO(IWAE(k=20))
    programs = [poutine.scale(p, scale=0.125) for p in (conjugate, exact_guide)]
    torch.manual_seed(0)
    plain = ObjectiveELBO(IWAE(k=20)).loss(conjugate, exact_guide, DATA, spread=1.0)
    torch.manual_seed(0)
    close(scaled.loss(*programs, DATA, spread=1.0), plain / 8)
    per_point = torch.linspace(0.5, 2, N)
    programs = [poutine.scale(p, scale=per_point) for p in (conjugate, exact_guide)]
    torch.manual_seed(0)
    bound = IWAE(k=20).bound(PyroModel(conjugate, lambda x: exact_guide(x, spread=1.0)), DATA)
    torch.manual_seed(0)
    close(ObjectiveELBO(IWAE(k=20)).loss(*programs, DATA, spread=1.0), -(per_point * bound).sum())


def test_different_scales_within_a_weight_are_refused_unless_linear():
    def annealed(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
            pyro.sample("z", dist.Normal(loc, 0.7))

    for objective in (IWAE(k=5), VAE(k=2, gradient="score")):
        with pytest.raises(ModelError, match=r"sites 'z' and 'x' have different scales \(0.5 and 1\)"):
            ObjectiveELBO(objective).loss(annealed, guide, DATA)
    for gradient in PATHWISE:
        same_as_trace_elbo(annealed, guide, DATA, gradient=gradient, exact=gradient == "reparam")
    # kl_weight is what tempering is for, with any objective.
    plain = poutine.block(annealed, expose_types=["sample", "param"])
    assert math.isfinite(ObjectiveELBO(VAE(k=2)).loss(plain, guide, DATA))


def same_as_trace_elbo(model, guide, *args, gradient="reparam", exact=True):
    """Value and gradient of VAE(k=1) seed for seed as Trace_ELBO; the gradient only where the estimator is the same."""
    found = []
    for elbo in (Trace_ELBO(), ObjectiveELBO(VAE(k=1, gradient=gradient))):
        elbo.loss(model, guide, *args)  # lazy initialisation
        with poutine.trace(param_only=True) as capture:
            torch.manual_seed(7)
            loss = elbo.loss_and_grads(model, guide, *args)
        parameters = {n: s["value"].unconstrained() for n, s in capture.trace.nodes.items()}
        found.append((loss, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}))
        for p in parameters.values():
            p.grad = None
    close(found[1][0], found[0][0])
    assert found[1][1].keys() == found[0][1].keys() and found[0][1]
    if exact:
        for name, value in found[0][1].items():
            close(found[1][1][name], value)


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


def norm(v: float) -> float:
    return math.exp(-v * v / 2) / math.sqrt(2 * math.pi)


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


# Plates, global latents, masks, factors.


def test_nested_plates_are_summed_into_the_outer_one():
    docs, words = 3, 4
    x = torch.randn(docs, words)

    def model(x):
        with pyro.plate("docs", docs, dim=-2):
            topic = pyro.sample("topic", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", words, dim=-1):
                z = pyro.sample("z", dist.Normal(topic, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.linspace(-1, 1, docs).unsqueeze(-1))
        scale = pyro.param("scale", torch.tensor(0.6))
        with pyro.plate("docs", docs, dim=-2):
            topic = pyro.sample("topic", dist.Normal(loc, scale))
            with pyro.plate("words", words, dim=-1):
                pyro.sample("z", dist.Normal((topic + x) / 2, scale))

    pair = PyroModel(model, guide)
    posterior = pair.posterior(x)
    h = posterior.rsample(torch.Size((5,)))
    assert {name: tuple(part.shape) for name, part in h.items()} == {"topic": (5, docs, 1), "z": (5, docs, words)}
    topic, z, loc, scale = h["topic"], h["z"], pyro.param("loc"), pyro.param("scale")
    log_q = Normal(loc, scale).log_prob(topic).sum(-1) + Normal((topic + x) / 2, scale).log_prob(z).sum(-1)
    log_p = Normal(0.0, 1.0).log_prob(topic).sum(-1) + (
        Normal(topic, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(x)
    ).sum(-1)
    close(posterior.log_prob(h), log_q)
    close(pair.log_joint(x, h), log_p)
    close(posterior.log_prob(dict(h)), log_q)  # scored again from numbers alone
    close(pair.log_likelihood(x, h) + pair.log_prior(h), log_p)
    for objective in (IWAE(k=4, gradient="dreg"), IWAE(k=4, chunk_size=2), IWAE(k=8, backward_samples=3)):
        assert objective.surrogate(pair, x).shape == (docs,)
    elbo = ObjectiveELBO(IWAE(k=3))
    torch.manual_seed(0)
    bounds = IWAE(k=3).bound(pair, x)
    torch.manual_seed(0)
    close(elbo.loss(model, guide, x), -bounds.sum())


def test_the_outer_plate_may_be_right_of_the_inner_one():
    x = torch.randn(4, 3)

    def model(x):
        with pyro.plate("docs", 3):  # dim -1
            topic = pyro.sample("topic", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("words", 4):  # dim -2
                pyro.sample("x", dist.Normal(topic, 1.0), obs=x)

    def guide(x):
        with pyro.plate("docs", 3):  # the posterior: precision 1 + 4
            pyro.sample("topic", dist.Normal(x.sum(0) / 5, 0.2**0.5))

    covariance = torch.eye(4) + torch.ones(4, 4)
    expected = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x.T)
    close(IWAE(k=6).bound(PyroModel(model, guide), x), expected)


def test_of_plates_that_hold_every_site_the_outermost_has_the_weights():
    x = DATA[:6].reshape(2, 3)

    def model(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(()), 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    close(IWAE(k=3).bound(PyroModel(model, guide), x), LOG_P[:6].reshape(2, 3).sum(-1))


def test_samples_drawn_without_a_graph_are_scored_with_one():
    vae = Vae(2)
    pair = PyroModel(vae.program, vae.guide)
    pair.structure(X)
    for _ in range(2):  # the second posterior knows that the guide's sites depend on one another
        posterior = pair.posterior(X)
        h = posterior.sample(torch.Size((3,)))
        found = gradients(vae, posterior.log_prob(h).sum())
        expected = gradients(vae, vae.posterior(X).log_prob(h).sum())
        assert found.keys() == expected.keys() and len(found) == 8
        for name in found:
            close(found[name], expected[name])


def test_a_global_latent_has_one_weight():
    x = torch.tensor([1.0, -0.5, 2.0])

    def model(x):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Normal(x.sum() / 4, torch.tensor(0.5)))

    expected = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + torch.ones(3, 3)).log_prob(x)
    close(IWAE(k=6).bound(PyroModel(model, guide), x), expected.reshape(1))
    close(ObjectiveELBO(Median(k=6)).loss(model, guide, x), -expected)


def mixed(x, index=None):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(x), subsample=index) as i:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def mixed_guide(x, index=None):
    """The exact posterior: x ~ N(mean, sqrt 2) given the mean; its precision is 1 + N / 2."""
    precision = 1 + len(x) / 2
    loc = pyro.param("loc", x.sum() / 2 / precision)
    mean = pyro.sample("mean", dist.Normal(loc, torch.tensor(precision**-0.5)))
    with pyro.plate("data", len(x), subsample=index) as i:
        pyro.sample("z", dist.Normal((mean + x[i]) / 2, 0.5**0.5))


def test_a_global_latent_beside_local_ones():
    x = torch.tensor([1.0, -0.5, 2.0])
    expected = dist.MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + torch.ones(3, 3)).log_prob(x)
    with pytest.raises(ModelError, match=r"no vectorised plate holds every site \(mean: no plate; z: data; x: data\)"):
        IWAE(k=5).bound(PyroModel(mixed, mixed_guide), x)
    with pytest.raises(ModelError, match='weights="joint"'):
        ObjectiveELBO(IWAE(k=5)).loss(mixed, mixed_guide, x)
    close(IWAE(k=5).bound(PyroModel(mixed, mixed_guide, weights="joint"), x), expected.reshape(1))
    close(ObjectiveELBO(IWAE(k=5, gradient="dreg"), weights="joint").loss_and_grads(mixed, mixed_guide, x), -expected)
    close(pyro.param("loc").grad, 0.0)
    close(ObjectiveELBO(VAE(k=2)).loss(mixed, mixed_guide, x), -expected)


def test_a_global_latent_with_subsampling_is_for_vae_alone():
    index = torch.tensor([5, 17, 23, 42])
    for weights, reason in (("auto", "no weight for each data point"), ("joint", r"different scales \(1 and 250\)")):
        with pytest.raises(ModelError, match=reason):
            ObjectiveELBO(IWAE(k=5), weights=weights).loss(mixed, mixed_guide, DATA, index)
    same_as_trace_elbo(mixed, mixed_guide, DATA, index)
    with pytest.raises(ModelError):
        ObjectiveELBO(VAE(k=5, gradient="score")).loss(mixed, mixed_guide, DATA, index)
    # Over a partition of the data, the same seed each time: the mean is the whole data set's ELBO for global z.
    pair = PyroModel(mixed, mixed_guide, weights="joint", scaled=True)
    parts = torch.arange(N).reshape(-1, 250)
    total = torch.zeros(())
    for part in parts:
        posterior = pair.posterior(Arguments(DATA, part))
        h = posterior.rsample(torch.Size((2,)))
        h["mean"].data.fill_(0.2)
        h["z"].data.copy_((DATA[part] / 3).expand(2, 1, -1))
        total = total + pair.log_joint(None, type(h)(dict(h), posterior)) / len(parts)
    z = DATA / 3
    whole = (
        Normal(0.0, 1.0).log_prob(torch.tensor(0.2))
        + (Normal(0.2, 1.0).log_prob(z) + Normal(z, 1.0).log_prob(DATA)).sum()
    )
    close(total, whole.expand(2, 1))


def map_beside_normal(model):
    guide = auto.AutoGuideList(model)
    guide.append(auto.AutoDelta(poutine.block(model, expose=["mean"])))
    guide.append(auto.AutoNormal(poutine.block(model, expose=["z"])))
    return guide


def structured(model):
    return auto.AutoStructured(
        model, conditionals={"mean": "normal", "z": "mvn"}, dependencies={"z": {"mean": "linear"}}
    )


@pytest.mark.parametrize("make", [auto.AutoNormal, auto.AutoDiagonalNormal, map_beside_normal, structured])
def test_vae_takes_global_beside_local_latents_as_trace_elbo_does(make):
    same_as_trace_elbo(mixed, make(mixed), torch.tensor([1.0, -0.5, 2.0]))


def test_plates_one_after_another():
    def model(x):
        for name, size in (("a", 2), ("b", 3)):
            with pyro.plate(name, size):
                z = pyro.sample(f"z_{name}", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample(f"x_{name}", dist.Normal(z, 1.0), obs=x[name])

    def guide(x):
        for name, size in (("a", 2), ("b", 3)):
            with pyro.plate(name, size):
                pyro.sample(f"z_{name}", dist.Normal(x[name] / 2, 0.5**0.5))

    x = {"a": DATA[:2], "b": DATA[2:5]}
    with pytest.raises(ModelError, match="z_a: a; z_b: b"):
        IWAE(k=4).bound(PyroModel(model, guide), x)
    close(IWAE(k=4).bound(PyroModel(model, guide, weights="joint"), x), LOG_P[:5].sum().reshape(1))


def test_sequential_plate():
    def model(x):
        for i in pyro.plate("data", 3):
            z = pyro.sample(f"z_{i}", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", 3):
            pyro.sample(f"z_{i}", dist.Normal(x[i] / 2, 0.5**0.5))

    with pytest.raises(ModelError, match="no weight for each data point"):
        IWAE(k=4).bound(PyroModel(model, guide), DATA)
    close(IWAE(k=4).bound(PyroModel(model, guide, weights="joint"), DATA), LOG_P[:3].sum().reshape(1))


def test_mask_leaves_data_points_out():
    keep = torch.arange(N) % 3 > 0
    model, guide = (poutine.mask(p, mask=keep) for p in (conjugate, exact_guide))
    bound = IWAE(k=5).bound(PyroModel(model, guide), DATA)
    close(bound, torch.where(keep, LOG_P, 0.0))


def test_obs_mask_imputes():
    seen = torch.tensor([True, False, True, False])
    x = DATA[:4]

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)))
            with poutine.mask(mask=~seen):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    for objective in (IWAE(k=5), IWAE(k=5, chunk_size=2, gradient="dreg")):
        close(objective.surrogate(PyroModel(model, guide), x).detach(), torch.where(seen, LOG_P[:4], 0.0))
    with pytest.raises(ModelError, match="'x_unobserved' of the model is not in the guide"):
        IWAE(k=5).bound(PyroModel(model, exact_guide), x)


def test_factor_is_an_observation():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("x", Normal(z, 1.0).log_prob(x))
            pyro.deterministic("twice", 2 * z)

    pair = PyroModel(model, exact_guide)
    close(IWAE(k=5).bound(pair, DATA), LOG_P)
    h = pair.posterior(DATA).rsample(torch.Size((2,)))
    close(pair.log_likelihood(DATA, h), Normal(h["z"], 1.0).log_prob(DATA))


def test_independent_sites_and_a_site_without_parameters():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a.sum(-1) + b, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))  # its prior
            pyro.sample("b", dist.Normal(loc, 0.5))

    x = torch.tensor([1.0, 2.0])
    for gradient in PATHWISE:
        pair = PyroModel(model, guide)
        IWAE(k=3, gradient=gradient)(pair, x).backward()
        assert pair._independent
    torch.manual_seed(0)
    h = pair.posterior(x).rsample(torch.Size((3,)))
    close(pair.posterior(x).log_prob(h), Normal(0.0, 1.0).log_prob(h["a"]).sum(-1) + Normal(0.0, 0.5).log_prob(h["b"]))
    assert {name: tuple(part.shape) for name, part in h.items()} == {"a": (3, 2, 2), "b": (3, 2)}


# As a loss.


def test_svi_takes_the_same_steps_as_the_native_loop():
    vae, native = Vae(1), Vae(1)
    native.load_state_dict(vae.state_dict())
    objective = IWAE(k=5, gradient="dreg")
    torch.manual_seed(0)
    svi = SVI(vae.program, vae.guide, pyro.optim.Adam({"lr": 1e-2}), ObjectiveELBO(objective))
    losses = [svi.step(X) for _ in range(20)]
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([*native.encoder.parameters(), *native.decoder.parameters()], lr=1e-2)
    for i in range(20):
        optimizer.zero_grad()
        loss = objective(native, X) * len(X)
        loss.backward()
        optimizer.step()
        close(losses[i], loss.detach(), 1e-9)
    for name, value in native.encoder.state_dict().items():
        close(vae.encoder.state_dict()[name], value, 1e-8)


def test_svi_and_native_training_reach_the_same_nll():
    """A small VAE on 8 x 8 digits, with different random numbers: the same held-out NLL within its noise."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy((digits.data > 7).astype("float32")).double()
    train, test = x[:1200], x[1200:]

    def nll(vae):
        torch.manual_seed(99)
        return float(-IWAE(k=100).bound(vae, test).mean())

    torch.manual_seed(0)
    first, second = Vae(1, 64), Vae(1, 64)
    second.load_state_dict(first.state_dict())
    start, objective = nll(first), IWAE(k=5)
    svi = SVI(first.program, first.guide, pyro.optim.Adam({"lr": 5e-3}), ObjectiveELBO(objective))
    optimizer = torch.optim.Adam(second.parameters(), lr=5e-3)
    for _ in range(15):
        for batch in train.split(100):
            svi.step(batch)
    for _ in range(15):
        for batch in train.split(100):
            optimizer.zero_grad()
            objective(second, batch).backward()
            optimizer.step()
    ends = nll(first), nll(second)
    assert max(ends) < start - 15 and abs(ends[0] - ends[1]) < 0.3


class ModuleModel(PyroModule):
    def __init__(self):
        super().__init__()
        self.shift = PyroParam(torch.tensor(0.5))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class ModuleGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](1, 1)
        self.scale = PyroParam(torch.tensor(0.9), dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x.unsqueeze(-1)).squeeze(-1), self.scale))


@pytest.mark.parametrize("local", [True, False])
def test_pyro_modules_with_a_torch_optimiser(local):
    x = DATA[:200] + 1
    with pyro.settings.context(module_local_params=local):
        model, guide = ModuleModel(), ModuleGuide()
        elbo = ObjectiveELBO(IWAE(k=5, gradient="dreg"))(model, guide)
        elbo(x)
        assert len(list(elbo.parameters())) == 4
        optimizer = torch.optim.Adam(elbo.parameters(), lr=0.03)
        for _ in range(200):
            optimizer.zero_grad()
            elbo(x).backward()
            optimizer.step()
        evidence = Normal(x.mean(), 2**0.5).log_prob(x).sum()  # at the most likely shift
        close(elbo(x).detach(), -evidence, 2e-3)
        close(model.shift.detach(), x.mean(), 0.03)
        bound = IWAE(k=5).bind(PyroModel(model, guide))
        assert len(list(bound.parameters())) == 4
        close(bound(x).detach() * len(x), -evidence, 2e-3)


def test_losses_agree():
    vae, elbo, found = Vae(2), ObjectiveELBO(IWAE(k=5, gradient="dreg")), []
    for compute in (elbo.loss, elbo.differentiable_loss, elbo.loss_and_grads):
        torch.manual_seed(0)
        found.append(compute(vae.program, vae.guide, X))
    assert isinstance(found[0], float) and isinstance(found[2], float) and found[1].requires_grad
    close(found[1].detach(), found[0])
    close(found[2], found[0])
    svi = SVI(vae.program, vae.guide, pyro.optim.Adam({"lr": 0.0}), elbo)
    torch.manual_seed(0)
    close(svi.evaluate_loss(X), found[0])


# Refusals.


def one_plate_guide(sample):
    def guide(x):
        with pyro.plate("data", len(x)):
            sample(x)

    return guide


def z(*args, **kwargs):
    return lambda x: pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0), *args, **kwargs)


def with_factor(x):
    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.factor("f", torch.zeros(len(x)), has_rsample=False)


def with_extra(x):
    pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
    pyro.sample("extra", dist.Normal(torch.zeros(()), 1.0))


def undeclared(x):
    pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


REFUSED = {
    "enumerated guide": (one_plate_guide(z(infer={"enumerate": "parallel"})), "'z' of the guide asks for enumeration"),
    "empty guide": (lambda x: None, "latent site 'z' of the model is not in the guide"),
    "MAP guide": (auto.AutoDelta(conjugate), "draws no random site"),
    "guide in the model": (auto.AutoNormalMessenger(conjugate), "AutoNormalMessenger runs inside the model"),
    "score factor": (one_plate_guide(with_factor), "site 'f' of the guide is observed"),
    "observed": (one_plate_guide(z(obs=torch.zeros(3))), "site 'z' of the guide is observed"),
    "extra site": (one_plate_guide(with_extra), "site 'extra' of the guide is not a latent site of the model"),
    "undeclared": (undeclared, "dimension -1 of size 3 at site 'z' is in no plate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name):
    guide, reason = REFUSED[name]
    for objective in (IWAE(k=3), VAE(k=3)):
        with pytest.raises(ModelError, match=reason):
            ObjectiveELBO(objective).loss(conjugate, guide, DATA[:3])


def test_enumerated_model_site_is_refused():
    @config_enumerate
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"'c' of the model asks for enumeration.*TraceEnum_ELBO"):
        ObjectiveELBO(IWAE(k=3)).loss(model, exact_guide, DATA)


def test_jit_is_refused():
    vae = Vae(1)
    pair = PyroModel(vae.program, vae.guide)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace"):
        torch.jit.trace(lambda x: IWAE(k=2)(pair, x), X)
    with pytest.raises(TypeError):
        ObjectiveELBO(IWAE(k=2), jit_options={})


def test_random_numbers_outside_sites_are_found():
    vae = Vae(2)

    def guide(x):
        vae.guide(nn.functional.dropout(x))

    pair = PyroModel(vae.program, guide)
    assert IWAE(k=3)(pair, X).isfinite()  # one execution serves both
    with pytest.raises(ModelError, match="random numbers outside its sample sites"):
        IWAE(k=3, gradient="dreg")(pair, X).backward()


def test_arguments_are_checked():
    vae = Vae(1)
    with pytest.raises(ValueError, match="weights must be"):
        PyroModel(vae.program, vae.guide, weights="each")
    with pytest.raises(ValueError, match=r"objective must be an Objective such as IWAE\(k=50\), got 'iwae'"):
        ObjectiveELBO("iwae")
    with pytest.raises(ModelError, match="max_plate_nesting must be at least 1 here, got 0"):
        IWAE(k=2)(PyroModel(vae.program, vae.guide, max_plate_nesting=0), X)
    with pytest.raises(ModelError, match="analytic_kl=True needs a torch Distribution"):
        VAE(analytic_kl=True)(PyroModel(vae.program, vae.guide), X)


@pytest.mark.parametrize("layers", [1, 2])
def test_more_plate_dimensions_than_needed_change_nothing(layers):
    vae, found = Vae(layers), []
    for nesting in (1, 3):
        torch.manual_seed(0)
        pair = PyroModel(vae.program, vae.guide, max_plate_nesting=nesting)
        loss = IWAE(k=4, gradient="dreg")(pair, X)
        found.append((loss.detach(), *gradients(vae, loss).values()))
    close(found[1], found[0])


@pytest.mark.parametrize("ran", [False, True])
def test_the_kit_leaves_an_automatic_guide_its_model(ran):

    x = torch.randn(4, 1)

    def program(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x[:, 0])

    pyro.clear_param_store()
    guide = auto.AutoNormal(program)
    if ran:
        guide(x)
    before = guide.model
    found = {f.property: f for f in model_findings(PyroModel(program, guide), x, k=3)}
    assert guide.model is before and found["methods"].passed, found
    svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), loss=pyro.infer.Trace_ELBO())
    assert math.isfinite(svi.step(x))


def test_another_guide_is_another_loss():
    def off(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + 1.0, 0.5**0.5))

    x, elbo = torch.tensor([0.3, -1.0]), ObjectiveELBO(VAE())
    at_posterior = elbo.loss(conjugate, exact_guide, x)
    assert elbo.loss(conjugate, off, x) != pytest.approx(at_posterior)
    close(elbo.loss(conjugate, exact_guide, x), at_posterior)


def test_retain_graph_is_passed_on():
    weight = torch.tensor(0.7, requires_grad=True)
    x = weight.exp() * torch.ones(3)  # one graph for both steps
    elbo = ObjectiveELBO(VAE(), retain_graph=True)
    elbo.loss_and_grads(conjugate, exact_guide, x)
    once = weight.grad.clone()
    elbo.loss_and_grads(conjugate, exact_guide, x)
    close(weight.grad, 2 * once)  # at the posterior every sample gives log p(x)


def test_max_plate_nesting_of_a_loss_is_heeded():
    with pytest.raises(ModelError, match="max_plate_nesting must be at least 1 here, got 0"):
        ObjectiveELBO(IWAE(k=3), max_plate_nesting=0).loss(conjugate, exact_guide, torch.zeros(3))


def test_a_split_is_not_linear_though_its_value_is():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 10, subsample_size=5):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    def guide(x):
        pyro.sample("shift", dist.Normal(torch.zeros(()), 0.3))

    x = torch.arange(5.0)
    assert math.isfinite(ObjectiveELBO(VAE(k=4)).loss(model, guide, x))
    with pytest.raises(ModelError, match="have different scales"):
        ObjectiveELBO(Split(generative=VAE(k=4), inference=IWAE(k=4))).loss(model, guide, x)


def test_a_scale_that_varies_within_the_one_weight_of_the_data_set_is_refused():
    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=torch.tensor([1.0, 2.0, 3.0])):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x)

    with pytest.raises(ModelError, match=r"the scale of site 'x', \(3,\), varies within one weight"):
        IWAE(k=3).bound(
            PyroModel(model, lambda x: pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))), torch.zeros(3)
        )


@pytest.mark.parametrize("scale", [1.01, 0.95])
def test_scales_that_differ_by_little_are_refused_too(scale):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=scale):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ModelError, match="have different scales"):
        IWAE(k=3).bound(PyroModel(model, exact_guide), torch.zeros(3))


def test_samples_of_a_data_point_just_past_the_end_are_refused():
    def program(observed):
        def run(x):
            with pyro.plate("data", len(x), subsample_size=1):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                if observed:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(1))

        return run

    pair = PyroModel(program(True), program(False))
    h = pair.posterior(torch.zeros(3)).sample(torch.Size((2,)))
    h.posterior.subsamples["data"] = torch.tensor([2])
    with pytest.raises(ModelError, match="of data point 2 of plate 'data', which has 2"):
        pair.log_joint(torch.zeros(2), h)


def test_parts_asked_for_without_a_graph_and_with_one_are_not_mixed_up():
    loc = torch.tensor(0.4, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc.exp(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pair, x = PyroModel(model, exact_guide), torch.zeros(3)
    h = pair.posterior(x).sample(torch.Size((2,)))
    with torch.no_grad():
        pair.log_likelihood(x, h)
    (slope,) = torch.autograd.grad(pair.log_prior(h).sum(), loc)
    close(slope, (loc.exp() * (h["z"] - loc.exp())).sum().detach())


def test_a_plate_around_the_models_site_alone_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0).to_event(1))

    with pytest.raises(ModelError, match="there is no weight for each data point"):
        IWAE(k=3).bound(PyroModel(model, guide), torch.zeros(3))


def test_a_mask_that_depends_on_samples_is_that_of_each():
    def latents():
        a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
        with poutine.mask(mask=a > 0):
            return a, pyro.sample("b", dist.Normal(torch.zeros(()), 2.0))

    def guide(x):
        with pyro.plate("data", len(x)):
            latents()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(latents()[0], 1.0), obs=x)

    posterior = PyroModel(model, guide).posterior(torch.zeros(3))
    h = posterior.rsample(torch.Size((40,)))
    log_q = Normal(0.0, 1.0).log_prob(h["a"]) + torch.where(h["a"] > 0, Normal(0.0, 2.0).log_prob(h["b"]), 0.0)
    close(posterior.log_prob(h), log_q)


def test_a_change_of_variables_is_scaled_as_all_else():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x, found = torch.ones(3), []
    guide = auto.AutoNormal(model)
    guide(x)
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        found.append(ObjectiveELBO(VAE(k=2)).loss(poutine.scale(model, scale), poutine.scale(guide, scale), x))
    close(found[1], 3 * found[0])


def test_a_subsample_that_the_model_drew_goes_with_the_samples():
    x = torch.arange(100.0)

    def model(x):
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", 100, subsample_size=3) as i, poutine.scale(scale=0.03):
            pyro.sample("x", dist.Normal(shift, 1.0), obs=x[i])

    pair = PyroModel(model, lambda x: pyro.sample("shift", dist.Normal(torch.zeros(()), 1.0)))
    h = pair.posterior(x).sample(torch.Size((2,)))
    first = pair.log_joint(x, h)
    close(pair.log_joint(x.clone(), h), first)


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


def test_a_first_look_in_inference_mode_is_not_the_last():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        w = pyro.param("w", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - w.exp(), x + w.exp()))

    pair, x = PyroModel(model, guide), torch.tensor([0.5, -1.0])
    guide(x)  # which makes the parameter
    with torch.inference_mode():
        IWAE(k=3).bound(pair, x)
    with pytest.raises(ModelError, match="whose support moves"):
        IWAE(k=3, gradient="score")(pair, x)


def test_straight_through_sites_are_warned_of(monkeypatch):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(logits=torch.zeros(3)))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.OneHotCategoricalStraightThrough(logits=logits))

    monkeypatch.setattr("mcobjectives.estimators._warned", set())
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
