"""A model that changes its x or h in place is refused: whatever is evaluated after it would see other values."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from mcobjectives import IWAE, VAE, ModelError, Split
from mcobjectives.evaluation import evaluate, layer_activity
from mcobjectives.model import tensors
from mcobjectives.testing import ConformanceError, check_model

X = torch.linspace(-1, 1, 12).reshape(4, 3)
OBJECTIVES = [
    IWAE(k=5),
    IWAE(k=5, gradient="dreg"),
    IWAE(k=5, gradient="vimco"),
    IWAE(k=5, gradient="stl"),
    IWAE(k=6, chunk_size=2),
    IWAE(k=6, backward_samples=2),
    Split(IWAE(k=5), IWAE(k=5, gradient="dreg")),
    VAE(k=2),
]


class Scaled:
    """A distribution that shifts what it is given in place."""

    def __init__(self, base):
        self.base = base

    def rsample(self, shape):
        return self.base.rsample(shape)

    def log_prob(self, h):
        h -= 0.5
        return self.base.log_prob(h)


class Model(nn.Module):
    """h ~ N(0, 1), x | h normal, a layer of which works in place: `where` says whose."""

    def __init__(self, where=""):
        super().__init__()
        self.where = where
        layer = nn.LeakyReLU(0.5, inplace=where == "log_likelihood")
        self.decoder = nn.Sequential(layer, nn.Linear(2, 3))
        self.encoder = nn.Sequential(nn.LeakyReLU(0.5, inplace=where == "posterior"), nn.Linear(3, 4))

    def posterior(self, x):
        loc, scale = self.encoder(x).chunk(2, -1)
        q = Independent(Normal(loc, scale.exp()), 1)
        return Scaled(q) if self.where == "log_prob" else q

    def log_likelihood(self, x, h):
        return Normal(self.decoder(h), 1.0).log_prob(x).sum(-1)

    def log_prior(self, h):
        if self.where == "log_prior":
            h.mul_(2)
        return Normal(0.0, 1.0).log_prob(h).sum(-1)


class Joint(nn.Module):
    """The same with log_joint alone."""

    def __init__(self):
        super().__init__()
        self.parts = Model("log_likelihood")
        self.posterior = self.parts.posterior

    def log_joint(self, x, h):
        return self.parts.log_prior(h) + self.parts.log_likelihood(x, h)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    ("model", "changed"),
    [
        (Model("log_likelihood"), r"log_likelihood\(x, h\) of Model changes h in place"),
        (Model("log_prior"), r"log_prior\(h\) of Model changes h in place"),
        (Model("log_prob"), r"log_prob\(h\) of Scaled changes h in place"),
        (Model("posterior"), r"posterior\(x\) of Model changes x in place"),
        (Joint(), r"log_joint\(x, h\) of Joint changes h in place"),
    ],
)
def test_a_change_in_place_is_named(objective, model, changed):
    with pytest.raises(ModelError, match=changed):
        objective(model, X.clone())
    with pytest.raises(ModelError, match=changed):
        objective.bound(model, X.clone())


@pytest.mark.parametrize("where", ["log_likelihood", "log_prior", "posterior"])
def test_a_closed_form_kl_hides_no_change(where):
    with pytest.raises(ModelError, match=f"{where}.* of Model changes . in place"):
        VAE(k=3, analytic_kl=True)(Model(where), X.clone())


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["log_likelihood", "log_prior", "log_prob", "posterior"])
def test_an_evaluation_is_no_less_careful(where, mode):
    with mode(), pytest.raises(ModelError, match="in place"):
        evaluate(Model(where), X.clone(), k=30)


def test_the_data_of_active_units_stay_as_they_are():
    with pytest.raises(ModelError, match=r"posterior\(x\) of Model changes x in place"):
        layer_activity(Model("posterior"), X.clone())


def test_conditional_means_leave_the_samples_alone():
    class Layers:
        def rsample(self, shape):
            return torch.randn(*shape, 4, 2)

        def log_prob(self, h):
            return h.sum(-1)

        def layer_means(self, h):
            return (h.mul_(0),)

    class Layered:
        def posterior(self, x):
            return Layers()

    with pytest.raises(ModelError, match=r"layer_means\(h\) of Layers changes h in place"):
        layer_activity(Layered(), X)


class Missing(Model):
    """NaN stands for what is missing."""

    def posterior(self, x):
        return super().posterior(x.nan_to_num())

    def log_likelihood(self, x, h):
        return torch.where(x.isnan(), 0.0, Normal(self.decoder(h), 1.0).log_prob(x.nan_to_num())).sum(-1)


class Sparse(Model):
    def posterior(self, x):
        return super().posterior(x.to_dense())

    def log_likelihood(self, x, h):
        return super().log_likelihood(x.to_dense(), h)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    ("model", "x"), [(Missing(), torch.where(X > 0.5, torch.nan, X)), (Sparse(), X.to_sparse())], ids=["nan", "sparse"]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_data_that_cannot_be_compared_are_no_fault(objective, model, x, mode):
    with mode():
        assert objective.bound(model, x.clone()).isfinite().all()


def test_what_is_no_tensor_is_not_walked_through():
    """Lists of sentences, say: it would cost more than the step."""
    assert tensors([[X], [X]]) == [] and tensors("text") == []
    assert tensors((X, 3)) == tensors({"x": X, "words": [X]}) == tensors(X) == [X]


def test_parts_of_h_and_of_x_are_looked_at_too():
    class Parts(Model):
        def posterior(self, x):
            return Pair(super().posterior(x["pixels"]))

        def log_likelihood(self, x, h):
            h[1].add_(1)
            return super().log_likelihood(x["pixels"], h[0])

        def log_prior(self, h):
            return super().log_prior(h[0]) + super().log_prior(h[1])

    class Pair:
        def __init__(self, q):
            self.q = q

        def rsample(self, shape):
            return self.q.rsample(shape), self.q.rsample(shape)

        def log_prob(self, h):
            return self.q.log_prob(h[0]) + self.q.log_prob(h[1])

    with pytest.raises(ModelError, match=r"log_likelihood\(x, h\) of Parts changes h in place"):
        IWAE(k=3)(Parts(), {"pixels": X})


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_work_in_place_on_values_of_ones_own_is_no_fault(objective):
    class Own(Model):
        def log_likelihood(self, x, h):
            return super().log_likelihood(x, torch.nn.functional.leaky_relu_(h * 1.0, 0.5))

    torch.manual_seed(0)
    model, plain = Own(), Model()
    plain.load_state_dict(model.state_dict())
    plain.decoder[0] = nn.Sequential(nn.LeakyReLU(0.5), nn.LeakyReLU(0.5))
    values = []
    for one in (model, plain):
        torch.manual_seed(1)
        values.append(objective(one, X))
    assert torch.equal(*values)


@pytest.mark.parametrize("where", ["log_likelihood", "log_prior", "log_prob", "posterior"])
def test_the_kit_finds_it(where):
    with pytest.raises(ConformanceError, match="in place, which is used again after it"):
        check_model(Model(where), X.clone())
