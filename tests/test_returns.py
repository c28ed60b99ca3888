"""What a model returns is looked at: densities that are none, parts of h that broadcast, a log q of other samples."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal
from toys import F64, Toy

from mcobjectives import IWAE, VAE, ModelError, messages
from mcobjectives.evaluation import evaluate

X = torch.tensor([0.9, -0.4, 2.0, 0.1], dtype=F64)
MEANS = {"reparam": {}, "dreg": {"gradient": "dreg"}, "vimco": {"gradient": "vimco"}, "chunks": {"chunk_size": 2}}


@pytest.mark.parametrize("options", MEANS.values(), ids=list(MEANS))
@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda h: None, r"got NoneType \(is a `return` missing\?\)"),
        (lambda h: -1.0, "got float$"),
        (lambda h: (-(h**2),), "got tuple$"),
        (lambda h: (-(h**2)).detach().numpy(), "got ndarray$"),
        (lambda h: (-(h**2)).long(), "got torch.int64$"),
    ],
)
def test_a_density_that_is_no_tensor_of_floats_is_named(returned, said, options):
    expected = r"^log_joint\(x, h\) of Toy must be a \(k, batch\) tensor of floats, " + said
    model = Toy(log_joint=lambda x, h: returned(h))
    for use in (IWAE(k=4, **options), IWAE(k=4, **options).bound):
        with pytest.raises(ModelError, match=expected):
            use(model, X)
    with pytest.raises(ModelError, match=expected):
        evaluate(model, X, k=4)

    class Posterior(Normal):
        def log_prob(self, h):
            return returned(h)

    model = Toy(posterior=lambda x: Posterior(x, torch.ones_like(x)), log_joint=lambda x, h: -(h**2))
    with pytest.raises(
        ModelError, match=expected.replace("x, h", "h").replace("joint", "prob").replace("Toy", "Post.*")
    ):
        IWAE(k=4, **options)(model, X)


def test_what_encoders_return_is_not_a_posterior():
    expected = r"^posterior\(x\) must be a distribution, such as Independent\(Normal\(mean, std\), 1\), got tuple$"
    for gradient in ("reparam", "vimco"):
        with pytest.raises(ModelError, match=expected):
            IWAE(k=3, gradient=gradient)(Toy(posterior=lambda x: (x, x.exp())), X)


def test_numpy_is_told_what_to_do():
    for x in (X.numpy(), (X, np.zeros(4))):
        with pytest.raises(ValueError, match=r"got ndarray: .*; of an array use torch.from_numpy$"):
            evaluate(Toy(), x, k=3)


def test_a_density_without_a_batch_is_told_of_latents_that_all_data_points_share():
    loc = torch.zeros(3, requires_grad=True)
    model = Toy(posterior=lambda x: Independent(Normal(loc, 1.0), 1), log_joint=lambda x, h: -(h**2).sum(-1))
    with pytest.raises(ModelError, match=r"if all data points share h, its posterior's batch has size one, and both"):
        IWAE(k=5)(model, X)


class SharedAndOwn(nn.Module):
    """g ~ N(0, 1) of all data points, z_n ~ N(0, 1), x_n ~ N(g + z_n, 1); summed over them as it should be, or not."""

    def __init__(self, summed):
        super().__init__()
        self.g, self.z, self.summed = nn.Parameter(torch.tensor([0.3], dtype=F64)), nn.Parameter(0.2 * X), summed

    def posterior(self, x):
        own, shared, summed = Normal(self.z, 0.8), Normal(self.g, 0.5), self.summed

        class Both:
            def rsample(self, shape):
                return {"g": shared.rsample(shape), "z": own.rsample(shape)}

            def log_prob(self, h):
                of_z = own.log_prob(h["z"])
                return shared.log_prob(h["g"]) + (of_z.sum(-1, keepdim=True) if summed else of_z)

        return Both()

    def log_joint(self, x, h):
        standard = Normal(torch.zeros((), dtype=F64), 1.0)
        own = standard.log_prob(h["z"]) + Normal(h["g"] + h["z"], 1.0).log_prob(x)
        return standard.log_prob(h["g"]) + (own.sum(-1, keepdim=True) if self.summed else own)


def test_a_latent_of_all_data_points_beside_one_of_each_is_warned_of(monkeypatch):
    every = (VAE(k=4), IWAE(k=4, gradient="dreg"), IWAE(k=4, chunk_size=2), IWAE(k=4).bound)
    for use in (*every, lambda model, x: evaluate(model, x, k=4)):
        monkeypatch.setattr(messages, "warned", set())
        with pytest.warns(UserWarning, match=r"part\(s\) \[0\] of h \(2 in all\) are one for all data points"):
            use(SharedAndOwn(summed=False), X)


def test_it_is_right_when_both_are_summed_over_the_data_points():
    # The ELBO in closed form: -KL of each part, and E log N(x; g + z, 1).
    model = SharedAndOwn(summed=True)
    with torch.no_grad():
        kl_g = torch.distributions.kl_divergence(Normal(model.g, 0.5), Normal(torch.zeros_like(model.g), 1.0)).sum()
        kl_z = torch.distributions.kl_divergence(Normal(model.z, 0.8), Normal(torch.zeros_like(X), 1.0)).sum()
        residual = (X - model.g - model.z) ** 2 + 0.5**2 + 0.8**2
        exact = (-0.5 * residual - 0.5 * torch.log(torch.tensor(2 * torch.pi, dtype=F64))).sum() - kl_g - kl_z
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = VAE(k=200_000).bound(model, X)
    assert found.shape == (1,) and abs(float(found - exact)) < 0.02


class Flow:
    """Keeps the density of its latest samples, as an inverse autoregressive flow without an inverse does."""

    def __init__(self, mean):
        self.base = Normal(mean, torch.ones_like(mean))

    def rsample(self, shape):
        h = self.base.rsample(shape)
        self.log_q = self.base.log_prob(h)
        return h

    def log_prob(self, h):
        return self.log_q


class Flowing(nn.Module):
    def __init__(self, posterior):
        super().__init__()
        self.slope, self.make = nn.Parameter(torch.tensor(0.4, dtype=F64)), posterior

    def posterior(self, x):
        return self.make(self.slope * x)

    def log_joint(self, x, h):
        return -(h**2) / 2 - (x - h) ** 2 / 2


@pytest.mark.parametrize(
    "options",
    [{"gradient": "stl"}, {"gradient": "dreg"}, {"gradient": "score"}, {"gradient": "vimco"}, {"backward_samples": 2}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_a_log_q_of_the_latest_samples_is_refused_where_it_is_asked_for_others(options):
    with pytest.raises(ModelError, match=r"^log_prob\(h\) of Flow gives the density of its latest samples"):
        IWAE(k=4, **options)(Flowing(Flow), X)
    assert torch.isfinite(IWAE(k=4, **options).bound(Flowing(Flow), X)).all()

    class Sound(Flow):
        def log_prob(self, h):
            return self.base.log_prob(h)

    torch.manual_seed(0)
    found = IWAE(k=4, **options)(Flowing(Sound), X)
    torch.manual_seed(0)  # looking at it has used up no random numbers
    assert IWAE(k=4, **options)(Flowing(lambda mean: Normal(mean, torch.ones_like(mean))), X) == found


def test_it_will_do_where_only_the_latest_samples_are_asked_for():
    gradients = []
    for posterior in (Flow, lambda mean: Normal(mean, torch.ones_like(mean))):
        torch.manual_seed(0)
        model = Flowing(posterior)
        IWAE(k=4)(model, X).backward()
        gradients.append(model.slope.grad)
    torch.testing.assert_close(*gradients)


class Lazy:
    """Computes its mean when it is first asked for it, and keeps it with the graph that it has then."""

    def __init__(self, mean):
        self.make, self.own = (lambda: mean * 1.0), torch.Generator().manual_seed(3)

    @cached_property
    def mean(self):
        return self.make()

    def rsample(self, shape):
        assert shape[0] % 4 == 0  # as an antithetic sampler's must be
        noise = torch.randn(*shape, *self.mean.shape, dtype=F64, generator=self.own)
        return self.mean + noise

    def log_prob(self, h):
        return Normal(self.mean, 1.0).log_prob(h)


@pytest.mark.parametrize("options", [{"gradient": "dreg"}, {"gradient": "stl"}, {"gradient": "vimco"}], ids=str)
@pytest.mark.filterwarnings("ignore:gradient='stl' is biased")
def test_a_posterior_is_asked_for_nothing_but_what_the_loss_takes(options):
    found = []
    for _ in range(2):  # whether its class is looked at or known
        model = Flowing(Lazy if options["gradient"] != "vimco" else Eager)
        loss = IWAE(k=8, **options)(model, X)
        loss.backward()
        found.append((loss.detach(), model.slope.grad))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert found[0][1] is not None and found[0][1] != 0


class Eager(Lazy):
    """Has its mean before samples are drawn without a graph."""

    def __init__(self, mean):
        super().__init__(mean)
        self.mean  # noqa: B018


def test_one_use_that_could_not_look_does_not_vouch_for_others():
    class Kept(Flow):
        pass

    model = Flowing(Kept)
    names = dict(model.named_parameters())
    with suppress(RuntimeError):
        torch.func.grad(lambda p: torch.func.functional_call(IWAE(k=4, gradient="vimco").bind(model), p, (X,)))(
            {f"model.{name}": value.detach() for name, value in names.items()}
        )
    with pytest.raises(ModelError, match=r"^log_prob\(h\) of Kept gives the density of its latest samples"):
        IWAE(k=4, gradient="vimco")(model, X)


def test_a_shape_that_does_not_fit_is_named_by_dreg_too():
    model = Toy(log_joint=lambda x, h: -(h**2).sum(-1))
    with pytest.raises(ModelError, match=r"^log p\(x, h\) has shape \(5,\), expected \(k, batch\)"):
        IWAE(k=5, gradient="dreg")(model, X)


def test_one_compiled_graph_is_enough_for_all_sizes_of_a_batch_where_h_has_parts():
    class Halves:
        def __init__(self, mean):
            self.base = Independent(Normal(mean, 1.0), 1)

        def rsample(self, shape):
            return self.base.rsample(shape).split([2, 3], -1)

        def log_prob(self, h):
            return self.base.log_prob(torch.cat(h, -1))

    class Model(nn.Linear):
        def posterior(self, x):
            return Halves(self(x))

        def log_joint(self, x, h):
            return -(torch.cat(h, -1) - x).square().sum(-1)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    loss = torch.compile(IWAE(k=4).bind(Model(5, 5)), fullgraph=True, dynamic=True, backend=backend)
    for batch in (7, 9, 11, 13):
        assert loss(torch.randn(batch, 5)).isfinite()
    assert len(graphs) == 1
