"""Objectives as losses of `SVI`, and what is refused of a program with the reason."""

import math

import pytest
import torch
from pyro_toys import DATA, Vae, X, clean, close, conjugate, exact_guide  # noqa: F401  the fixture is for every test
from torch import nn

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro.infer import SVI, config_enumerate  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from pyro.nn import PyroModule, PyroParam  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from mcobjectives import IWAE, VAE, ModelError, Split  # noqa: E402
from mcobjectives.pyro import ObjectiveELBO, PyroModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is biased for.*", "ignore:.*Jitter.*")


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


def test_another_model_is_another_loss():
    def off(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)

    x, elbo = torch.tensor([0.3, -1.0]), ObjectiveELBO(VAE())
    at_posterior = elbo.loss(conjugate, exact_guide, x)
    assert elbo.loss(off, exact_guide, x) != pytest.approx(at_posterior)
    close(elbo.loss(conjugate, exact_guide, x), at_posterior)
