"""Plates, subsamples, scales, masks and factors of Pyro programs: each against a closed form or `Trace_ELBO`."""

import copy
import math

import pytest
import torch
from pyro_toys import (  # noqa: F401  the fixture is for every test
    DATA,
    LOG_P,
    PATHWISE,
    B,
    N,
    Vae,
    X,
    clean,
    close,
    conjugate,
    exact_guide,
    gradients,
    same_as_trace_elbo,
)

pyro = pytest.importorskip("pyro")

import pyro.distributions as dist  # noqa: E402
from pyro import poutine  # noqa: E402
from pyro.infer import RenyiELBO, Trace_ELBO  # noqa: E402
from pyro.infer import autoguide as auto  # noqa: E402
from torch.distributions import Normal  # noqa: E402

from mcobjectives import IWAE, VAE, Median, ModelError  # noqa: E402
from mcobjectives.pyro import Arguments, ObjectiveELBO, PyroModel  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is biased for.*", "ignore:.*Jitter.*")


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


def test_a_scale_of_the_guide_alone_is_refused():
    guide = poutine.scale(exact_guide, scale=0.5)
    with pytest.raises(ModelError, match="different scales"):
        IWAE(k=3).bound(PyroModel(conjugate, guide), torch.zeros(2))


def test_scales_of_each_data_point_that_differ_between_sites_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=torch.tensor([1.0, 2.0])):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with poutine.scale(scale=torch.tensor([1.0, 3.0])):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = poutine.scale(exact_guide, scale=torch.tensor([1.0, 2.0]))
    with pytest.raises(ModelError, match="different scales"):
        IWAE(k=3).bound(PyroModel(model, guide), torch.zeros(2))


@pytest.mark.parametrize(
    "objective",
    [
        *(IWAE(k=5, gradient=g) for g in [*PATHWISE, "score", "vimco", "rws"]),
        IWAE(k=5, chunk_size=2),
        IWAE(k=60, chunk_size=25, gradient="dreg"),
        IWAE(k=8, backward_samples=3),
        VAE(k=5),
        Median(k=5),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_scale_has_its_gradient(objective, shape):
    """The loss is -scale * bound, so that its slope is -bound; of a function of a parameter here, which has a graph."""
    size = shape[0] if shape else 3
    x = DATA[:size]

    def scaled(program):
        def run(x):
            with poutine.scale(scale=pyro.param("root", torch.full(shape, 0.7)) ** 2):
                program(x, spread=1.0)

        return run

    elbo = ObjectiveELBO(objective)
    torch.manual_seed(1)
    plain = objective.bound(PyroModel(conjugate, lambda x: exact_guide(x, spread=1.0)), x)
    torch.manual_seed(1)
    loss = elbo.loss_and_grads(scaled(conjugate), scaled(exact_guide), x)
    close(loss, -0.49 * plain.sum())
    close(pyro.param("root").grad, -1.4 * (plain if shape else plain.sum()))


def test_a_scale_keeps_its_gradient_where_a_loss_looks_again_without_a_graph():
    """As `backward_samples` does where a program has moved the generator."""

    def noisy(x):
        torch.rand(())
        conjugate(x, spread=1.0)

    def scaled(program):
        def run(x):
            with poutine.scale(scale=pyro.param("root", torch.tensor(0.7)) ** 2):
                program(x)

        return run

    elbo = ObjectiveELBO(IWAE(k=5, backward_samples=2))
    programs = scaled(noisy), scaled(lambda x: exact_guide(x, spread=1.0))
    torch.manual_seed(1)
    loss = elbo.loss_and_grads(*programs, DATA[:3])
    close(pyro.param("root").grad, torch.tensor(2 * loss / 0.7))
    pyro.get_param_store()["root"] = torch.tensor(1.0)
    torch.manual_seed(1)
    close(elbo.loss(*programs, DATA[:3]), loss / 0.49)  # by the scale that it has now
    assert copy.deepcopy(elbo)._pair.scale == 1.0  # the graph of a scale cannot be copied


def test_the_gradient_of_a_scale_of_each_program_is_that_of_trace_elbo():
    def scaled(program):
        def run(x):
            with poutine.scale(scale=pyro.param("root", torch.tensor(0.7)) ** 2):
                program(x, spread=1.0)

        return run

    same_as_trace_elbo(scaled(conjugate), scaled(exact_guide), DATA[:3])


def test_a_scale_whose_gradient_one_program_stops_is_another():
    def scaled(program, stop):
        def run(x):
            root = pyro.param("root", torch.tensor(0.7))
            with poutine.scale(scale=(root.detach() if stop else root) ** 2):
                program(x)

        return run

    for stops in ((True, False), (False, True)):
        model, guide = (scaled(program, stop) for program, stop in zip((conjugate, exact_guide), stops, strict=True))
        elbo = ObjectiveELBO(IWAE(k=3))
        close(elbo.loss(model, guide, DATA[:2]), -0.49 * LOG_P[:2].sum())
        shown = " and ".join(f"0.49{'' if stop else ' with a gradient'}" for stop in reversed(stops))
        with pytest.raises(ModelError, match=rf"different scales \({shown}\)"):
            elbo.loss_and_grads(model, guide, DATA[:2])


def sized(size, shape, latent):
    """A plate of `size` drawn out of 100 around observations of `shape`, with the latent outside or inside."""

    def model(x):
        if not latent:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("one", 100, subsample_size=size):
            if latent:
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(shape))

    def guide(x):
        if not latent:
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        else:
            with pyro.plate("one", 100, subsample_size=size):
                pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    return model, guide


def test_a_plate_that_was_given_no_size_has_any():
    def program(guide):
        def run(x):
            with pyro.plate("data", dim=-1):
                z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5) if guide else dist.Normal(torch.zeros(len(x)), 1.0))
                if not guide:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return run

    close(
        ObjectiveELBO(IWAE(k=5)).loss(program(False), program(True), DATA), -dist.Normal(0, 2**0.5).log_prob(DATA).sum()
    )


@pytest.mark.parametrize("latent", [False, True])
def test_more_observations_than_their_plate_has_are_refused(latent):
    for objective in (VAE(k=2), IWAE(k=2)):
        with pytest.raises(ModelError, match="dimension -1 at site 'x' has size 6, and its plate 'one' has 1"):
            ObjectiveELBO(objective).loss(*sized(1, 6, latent), DATA)
    assert math.isfinite(ObjectiveELBO(VAE(k=2)).loss(*sized(6, 6, latent), DATA))
    with pytest.raises(ValueError, match="invalid log_prob shape"):
        Trace_ELBO(2, vectorize_particles=True, max_plate_nesting=1).loss(*sized(1, 6, latent), DATA)


def test_observations_that_outgrow_their_plate_later_are_refused():
    def model(x, more):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("one", 1):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[: 1 + more])

    def guide(x, more):
        pyro.sample("z", dist.Normal(x[0] / 2, 0.5**0.5))

    elbo = ObjectiveELBO(IWAE(k=2))
    close(elbo.loss(model, guide, DATA, 0), -LOG_P[0])
    with pytest.raises(ModelError, match="dimension -1 at site 'x' has size 6, and its plate 'one' has 1"):
        elbo.loss(model, guide, DATA, 5)
