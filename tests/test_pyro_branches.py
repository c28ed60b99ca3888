"""Programs that branch, on a label that may be missing or on a switch: their first run does not show the later ones.

And terms of log p that are the same for all samples, as they should be or not.
"""

import math

import pytest
import torch
from pyro_toys import LeavesTwice, clean, close, conjugate, exact_guide  # noqa: F401  the fixture is for every test

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from mcobjectives import IWAE, ModelError  # noqa: E402
from mcobjectives.pyro import Arguments, ObjectiveELBO, PyroModel  # noqa: E402

X = torch.tensor([0.5, -1.0, 2.0, 0.1, 4.0], dtype=torch.float64)
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


class Pair:
    """Two programs that branch on their label, or on a switch that their arguments do not show."""

    def __init__(self, switched):
        self.switched, self.label = switched, None

    def at(self, label):
        """The arguments for this label, or for none."""
        self.label = label
        return (X,) if self.switched or label is None else (X, label)


class Mixture(Pair):
    """c ~ Bernoulli(1/2), z ~ N(3c, 1), x ~ N(z, 1), and the exact posterior, with a parameter that is zero."""

    shift = 0.0

    def model(self, x, label=None):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5), obs=self.label)
            z = pyro.sample("z", dist.Normal(3 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x, label=None):
        shift = pyro.param("shift", torch.zeros(()))
        with pyro.plate("data", len(x)):
            c = self.label
            if c is None:
                c = pyro.sample("c", dist.Bernoulli(logits=3 * x / 2 - 9 / 4 + shift))
            pyro.sample("z", dist.Normal((x + 3 * c) / 2 + shift, 0.5**0.5))

    @staticmethod
    def log_p(label):
        each = Normal(torch.tensor([[0.0], [3.0]]), 2**0.5).log_prob(X) - math.log(2)
        return each.logsumexp(0) if label is None else torch.where(label == 0, each[0], each[1])


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("order", [(LABELS, None), (None, LABELS)], ids=["labelled first", "unlabelled first"])
def test_labels_may_be_missing_in_some_batches(order, switched):
    pair = Mixture(switched)
    by = {name: ObjectiveELBO(IWAE(k=4, gradient=name)) for name in ("reparam", "dreg", "vimco")}
    for label in (*order, *order):
        close(by["vimco"].loss_and_grads(pair.model, pair.guide, *pair.at(label)), -pair.log_p(label).sum())
        for name in ("reparam", "dreg"):
            if label is None:
                with pytest.raises(ModelError, match=r"needs rsample, which the guide of site\(s\) c does not have"):
                    by[name].loss_and_grads(pair.model, pair.guide, *pair.at(label))
                continue
            pyro.param("shift").grad = None
            close(by[name].loss_and_grads(pair.model, pair.guide, *pair.at(label)), -pair.log_p(label).sum())
            if name == "dreg":  # at the exact posterior
                close(pyro.param("shift").grad, torch.zeros(()))


def test_batches_that_take_turns_cost_no_further_run_of_the_guide():
    pair, runs = Mixture(switched=False), []

    def guide(x, label=None):
        runs.append(label)
        pair.guide(x, label)

    both, objective = PyroModel(pair.model, guide), {True: IWAE(k=4, gradient="vimco"), False: IWAE(k=4)}
    for turn in range(3):
        for label in (None, LABELS):
            runs.clear()
            objective[label is None](both, Arguments(*pair.at(label)))
            assert turn == 0 or len(runs) == 1 + (label is None)  # vimco scores the samples that it has drawn


class Ends(Pair):
    """w and z ~ N(0, 1), x ~ N(z + w, 1); given a label, the guide's z is a Normal, and else a Uniform that moves."""

    def model(self, x, label=None):
        with pyro.plate("data", len(x)):
            w, z = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in "wz")
            pyro.sample("x", dist.Normal(z + w, 1.0), obs=x)

    def guide(self, x, label=None):
        width = pyro.param("width", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(x / 3, 1.0))
            if self.label is None:
                pyro.sample("z", dist.Uniform(x - w - width, x - w + width))
            else:
                pyro.sample("z", dist.Normal((x - w) / 2, width))


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"backward_samples": 2}], ids=str)
@pytest.mark.parametrize("gradient", ["stl", "dreg", "score", "vimco"])
def test_a_support_that_moves_in_some_batches_is_refused_there(gradient, options, switched):
    pair, elbo = Ends(switched), ObjectiveELBO(IWAE(k=4, gradient=gradient, **options))
    for label in (LABELS, None, LABELS, None):
        if label is None:
            with pytest.raises(ModelError, match=r"wrong for the guide of site\(s\) z, whose support moves"):
                elbo.loss_and_grads(pair.model, pair.guide, *pair.at(label))
            continue
        found = []
        for each in (elbo, ObjectiveELBO(elbo.objective)):
            each.loss(pair.model, pair.guide, *pair.at(label))
            pyro.param("width").grad = None
            torch.manual_seed(1)
            found.append((each.loss_and_grads(pair.model, pair.guide, *pair.at(label)), pyro.param("width").grad))
        close(found[0], found[1])


@pytest.mark.parametrize("switched", [False, True])
def test_straight_through_sites_of_some_batches_are_warned_of(monkeypatch, switched):
    pair = Pair(switched)

    def model(x, label=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(2)), obs=pair.label)
            pyro.sample("x", dist.Normal(z + y[..., 0], 1.0), obs=x)

    def guide(x, label=None):
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", len(x)):
            y = pair.label
            if y is None:
                y = pyro.sample("y", dist.OneHotCategoricalStraightThrough(logits=logits))
            pyro.sample("z", dist.Normal((x - y[..., 0]) / 2, 0.5**0.5))

    known, loss, warned = torch.eye(2)[LABELS.long()], ObjectiveELBO(IWAE(k=3)), set()
    monkeypatch.setattr("mcobjectives.messages.warned", warned)
    for _ in range(2):
        loss.loss_and_grads(model, guide, *pair.at(known))
        assert not warned
        with pytest.warns(UserWarning, match=r"h of the guide of site\(s\) y is discrete, and a gradient straight"):
            loss.loss_and_grads(model, guide, *pair.at(None))
        warned.clear()


# Subsamples that the first run did not draw.

N, B = 40, 10
DATA = 2 * torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def steps(x, size):
    with pyro.plate("data", len(x), subsample_size=min(size or N, len(x))) as i:
        w = pyro.sample("w", dist.Normal(torch.zeros(()), 1.0))
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
    return i


def steps_back(x, size):
    slope = pyro.param("slope", torch.tensor(0.3))
    with pyro.plate("data", len(x), subsample_size=min(size or N, len(x))) as i:
        w = pyro.sample("w", dist.Normal(slope * x[i], 1.0))
        pyro.sample("z", dist.Normal(w / 2 + x[i] / 3, 0.7))


@pytest.mark.parametrize("k", [7, 120])
@pytest.mark.parametrize("first", [(DATA, None), (DATA, B), (DATA[:B], B)], ids=["whole", "subsampled", "small"])
def test_a_seed_gives_the_same_numbers_in_chunks_whatever_was_looked_at_first(first, k):
    found = []
    for size in (None, 3, 50, 70):
        pair, objective = PyroModel(steps, steps_back), IWAE(k=k, gradient="dreg", chunk_size=size)
        IWAE(k=2).bound(pair, Arguments(*first))
        pyro.param("slope").grad = None
        torch.manual_seed(3)
        loss = objective(pair, Arguments(DATA, B))
        loss.backward()
        found.append((loss.detach(), pyro.param("slope").grad))
    for other in found[1:]:
        close(other, found[0])


def test_densities_of_given_samples_draw_a_subsample_that_the_first_look_did_not_show():
    pair, drawn = PyroModel(steps, steps_back), []

    def model(x, size):
        drawn.append(steps(x, size))

    pair.model = model
    pair.log_joint(Arguments(DATA[:B], B), {name: torch.zeros(2, B) for name in "wz"})
    h = {name: torch.randn(2, B) for name in "wz"}
    found = pair.log_joint(Arguments(DATA, B), h)
    expected = Normal(0.0, 1.0).log_prob(h["w"]) + Normal(h["w"], 1.0).log_prob(h["z"])
    close(found, expected + Normal(h["z"], 1.0).log_prob(DATA[drawn[-1]]))


# Terms that are the same for all samples.


def with_term(term, whole=False):
    """`conjugate` and a further term, for each data point or for the whole data set."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            if not whole:
                term(z, x)
        if whole:
            term(z, x)

    return model


MIXED = {
    "sum of all": with_term(lambda z, x: pyro.factor("f", -(z**2).sum()), whole=True),
    "mean over samples": with_term(lambda z, x: pyro.sample("f", dist.Normal(z.mean(0), 1.0), obs=x)),
    "first sample": with_term(lambda z, x: pyro.factor("f", z[0].expand(len(x)))),
    "last sample": with_term(lambda z, x: pyro.factor("f", z[-1].expand(len(x)))),
}


@pytest.mark.parametrize("options", [{}, {"gradient": "dreg"}, {"gradient": "rws"}, {"chunk_size": 2}], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_a_term_that_mixes_the_samples_is_refused(name, options):
    pair = PyroModel(MIXED[name], exact_guide, weights="joint" if name == "sum of all" else "auto")
    for k in (4, 120):
        with pytest.raises(ModelError, match=r"log-density at site 'f' is one for all .* though it depends on them"):
            IWAE(k=k, **options)(pair, X)


def test_a_term_that_mixes_the_samples_of_a_later_batch_is_refused():
    def model(x, mixes=None):
        (MIXED["mean over samples"] if mixes else with_term(lambda z, x: pyro.factor("f", torch.zeros(len(x)))))(x)

    def guide(x, mixes=None):
        exact_guide(x)

    elbo, log_p = ObjectiveELBO(IWAE(k=4)), Normal(0.0, 2**0.5).log_prob(X).sum()
    for _ in range(2):
        close(elbo.loss(model, guide, X), -log_p)
        with pytest.raises(ModelError, match="log-density at site 'f' is one for all 4 samples"):
            elbo.loss(model, guide, X, True)


def test_a_factor_of_the_guide_that_mixes_the_samples_is_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
            pyro.factor("f", z.mean(0), has_rsample=True)

    pair = PyroModel(conjugate, guide)
    with pytest.raises(ModelError, match="log-density at site 'f' is one for all 4 samples"):
        IWAE(k=4)(pair, X)
    h = pair.posterior(X).sample(torch.Size((1,)))  # the one sample's own
    close(pair.log_joint(X, h), Normal(0.0, 1.0).log_prob(h["z"]) + Normal(h["z"], 1.0).log_prob(X) - h["z"])


@pytest.mark.parametrize("k", [1, 4, 120])
@pytest.mark.parametrize("options", [{}, {"gradient": "dreg"}, {"gradient": "rws"}, {"chunk_size": 3}], ids=str)
def test_a_term_without_samples_is_that_of_each(options, k):
    """A penalty on a parameter, and observations that no latent explains: log p(x) has both, whatever the samples."""

    def term(z, x):
        torch.rand(z.shape)  # a dropout, say
        pyro.factor("penalty", -(pyro.param("theta", torch.tensor(0.3)) ** 2).expand(len(x)))
        pyro.sample("f", dist.Normal(1.0, 2.0), obs=x)

    elbo = ObjectiveELBO(IWAE(k=k, **options))
    log_p = Normal(0.0, 2**0.5).log_prob(X) + Normal(1.0, 2.0).log_prob(X) - 0.3**2
    for _ in range(2):
        pyro.clear_param_store()
        close(elbo.loss_and_grads(with_term(term), exact_guide, X), -log_p.sum())
        close(pyro.param("theta").grad, torch.tensor(len(X) * 2 * 0.3))


def test_a_look_at_terms_without_samples_runs_no_guide_with_a_dropout():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)
            pyro.factor("f", torch.ones(len(x)))

    def guide(x):
        torch.rand(3)
        with pyro.plate("data", len(x)):
            w = pyro.sample("w", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z", dist.Normal(w / 2, 0.5**0.5))

    pair = PyroModel(model, guide)
    for _ in range(2):
        close(IWAE(k=4)(pair, X).detach(), -1 - Normal(0.0, 3**0.5).log_prob(X).mean())


@pytest.mark.parametrize("k", [2, 4])
def test_a_look_at_terms_without_samples_leaves_what_the_guide_left(k):
    guide = LeavesTwice()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(guide.twice / 2, 1.0), obs=x)
            pyro.factor("f", torch.ones(len(x)))

    for gradient in ("reparam", "dreg", "rws"):
        pair, log_p = PyroModel(model, guide), Normal(0.0, 2**0.5).log_prob(X) + 1
        for _ in range(2):
            loss = IWAE(k=k, gradient=gradient)(pair, X)
            loss.backward()
            close(loss.detach(), -log_p.mean())
        h = pair.posterior(X).sample(torch.Size((k,)))
        fresh = PyroModel(model, guide)
        fresh.structure(X)
        h = fresh.posterior(X).sample(torch.Size((k,)))
        joint = Normal(0.0, 1.0).log_prob(h["z"]) + Normal(h["z"], 1.0).log_prob(X) + 1
        close(fresh.log_likelihood(X, h) + fresh.log_prior(h), joint)
        close(fresh.log_likelihood(X, h) + fresh.log_prior(h), joint)
