"""Pyro programs as models: the same numbers as hand-written ones, and samples that go with their data."""

import math
import subprocess
import sys

import pytest
import torch
from pyro_toys import DATA, LOG_P, B, N, Vae, X, clean, close, conjugate, exact_guide, gradients  # noqa: F401  the fixture is for every test
from torch import nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from pyro.nn import PyroModule, PyroParam  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from mcobjectives import CIWAE, IWAE, MIWAE, VAE, LAlpha, Median, ModelError, Power  # noqa: E402
from mcobjectives.pyro import Arguments, ObjectiveELBO, PyroModel  # noqa: E402
from mcobjectives.testing import check_model  # noqa: E402
from mcobjectives.testing.models import model_findings  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is biased for.*", "ignore:.*Jitter.*")


def run(python: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", python], capture_output=True, text=True)


def test_the_library_does_not_load_pyro():
    assert run("import mcobjectives, sys; assert 'pyro' not in sys.modules").returncode == 0


def test_without_pyro_the_extra_is_named():
    blocked = "import sys; sys.modules['pyro'] = None; import mcobjectives; import mcobjectives.pyro"
    assert 'ImportError: mcobjectives.pyro needs Pyro: pip install "mcobjectives[pyro]"' in run(blocked).stderr


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


def test_a_leading_one_of_a_guides_parameters_is_no_sample():
    def guide(shape):
        def program(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(shape), 1.0))

        return program

    x = torch.tensor([0.5, -1.0, 2.0])
    bounds = []
    for shape in ((3,), (1, 3)):
        torch.manual_seed(0)
        bounds.append(IWAE(k=5).bound(PyroModel(conjugate, guide(shape), max_plate_nesting=1), x))
    torch.testing.assert_close(bounds[1], bounds[0])


def test_parts_of_a_program_with_a_change_of_variables_add_up():
    def model(x):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    x = torch.tensor([0.5, 1.5])
    guide = auto.AutoNormal(model)
    guide(x)
    pair = PyroModel(model, guide)
    h = pair.posterior(x).rsample(torch.Size((3,)))
    torch.testing.assert_close(pair.log_likelihood(x, h) + pair.log_prior(h), pair.log_joint(x, h))
