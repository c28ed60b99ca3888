"""Active units: exact covariances, and no unit that is active by its noise alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, Bernoulli, Categorical, Independent, Normal, TransformedDistribution

from mcobjectives.evaluation import active_units, layer_activity, mean_covariance, pca_active_units, posterior_means

F64 = torch.float64


def test_active_units_of_a_known_covariance():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, generator=g, dtype=F64)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(499)  # sample covariance: exactly I
    means = white[:, [0, 0, 1, 2]] * torch.tensor([1.0, 2.0, 0.11, 0.09], dtype=F64) + 5
    expected = torch.tensor([[1.0, 2, 0, 0], [2, 4, 0, 0], [0, 0, 0.0121, 0], [0, 0, 0, 0.0081]], dtype=F64)
    torch.testing.assert_close(mean_covariance(means), expected, rtol=1e-10, atol=1e-10)
    assert active_units(means) == 3  # units 0 and 1 are one direction
    assert pca_active_units(means) == 2
    assert active_units(means, threshold=0.008) == 4
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=F64)).Q
    assert active_units(means @ rotation) == 4
    assert pca_active_units(means @ rotation) == 2


def test_one_data_point_has_no_variance():
    with pytest.raises(ValueError, match="at least 2 data points, got 1"):
        active_units(torch.ones(1, 3))


def test_cross_covariance_is_unbiased():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(4000, 1, 2, generator=g, dtype=F64) * torch.tensor([0.3, 0.0], dtype=F64)
    a, b = (means + torch.randn(4000, 5, 2, generator=g, dtype=F64) for _ in range(2))
    covariance = mean_covariance(a.mean(1), b.mean(1))
    torch.testing.assert_close(covariance, covariance.T, rtol=0, atol=0)
    found = covariance.diagonal()
    torch.testing.assert_close(found, torch.tensor([0.09, 0.0], dtype=F64), rtol=0, atol=0.02)
    assert active_units(a.mean(1)) == 2  # the dead unit counts by its noise, 1 / 5
    assert active_units(a.mean(1), b.mean(1), threshold=0.03) == 1


class TwoLayers:
    """h1 ~ N(x, 0.1), h2 ~ N((h1_0, 0), 1): unit 0 of layer 2 follows x, unit 1 is dead but noisy."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    @property
    def mean(self) -> tuple[Tensor]:
        return (self.x,)

    def means_of_second(self, h1: Tensor) -> Tensor:
        return h1 * torch.tensor([1.0, 0.0])

    def sample(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        h1 = self.x + 0.1 * torch.randn(*shape, *self.x.shape)
        return h1, self.means_of_second(h1) + torch.randn_like(h1)

    def log_prob(self, h):
        raise NotImplementedError


class WithMeans(TwoLayers):
    def layer_means(self, h):
        return self.x.expand_as(h[0]), self.means_of_second(h[0])


class Encoder:
    def __init__(self, make):
        self.posterior = make


@pytest.mark.parametrize("make", [TwoLayers, WithMeans])
def test_a_dead_unit_of_a_deeper_layer_is_not_counted(make):
    torch.manual_seed(0)
    x = torch.randn(1000, 2)
    n = 40
    first, second = layer_activity(Encoder(make), x, n=n)
    assert first.units == [0, 1] and first.pca == 2
    torch.testing.assert_close(first.variance, x.double().var(0))  # exact: from the mean
    assert second.units == [0] and second.active == 1 and second.pca == 1
    assert float(second.variance[1].abs()) < 0.01
    averages = make(x).sample(torch.Size((n,)))[1].mean(0)
    assert float(averages.var(0)[1]) == pytest.approx(1 / n, rel=0.2)  # what samples alone would have said
    assert active_units(averages) == 2


def test_conditional_means_are_less_noisy_than_samples():
    x = torch.randn(300, 2)
    [_, (a, b)] = posterior_means(Encoder(WithMeans), x, n=4)
    assert float(a[:, 1].abs().max()) == float(b[:, 1].abs().max()) == 0


def test_means_of_posteriors_without_one():
    x = torch.randn(1000, 2)
    flow = Encoder(lambda x: Independent(TransformedDistribution(Normal(x, 0.5), [AffineTransform(0.0, 2.0)]), 1))
    [(a, b)] = posterior_means(flow, x, n=20)
    assert b is not None and a.shape == b.shape == (1000, 2)
    assert bool((a != b).all())
    assert layer_activity(flow, x)[0].units == [0, 1]
    [(exact, none)] = posterior_means(Encoder(lambda x: Independent(Bernoulli(x.sigmoid()), 1)), x)
    assert none is None
    torch.testing.assert_close(exact, x.sigmoid().double())


def test_event_shapes_are_flattened():
    [layer] = layer_activity(Encoder(lambda x: Independent(Normal(x, 1.0), 2)), torch.randn(50, 2, 3), batch_size=7)
    assert layer.variance.shape == (6,)
    with pytest.raises(ValueError, match="n must be an integer of at least 2"):
        layer_activity(Encoder(TwoLayers), torch.randn(3, 2), n=1)


def test_a_mean_that_torch_gives_as_nan_is_estimated():
    logits = 4 * torch.randn(100, 2, 3, generator=torch.Generator().manual_seed(0))
    [layer] = layer_activity(Encoder(lambda x: Independent(Categorical(logits=x), 1)), logits, n=2000)
    exact = logits.softmax(-1) @ torch.arange(3.0)
    assert layer.variance == pytest.approx(exact.var(0), rel=0.05) and layer.units == [0, 1]


def test_a_threshold_and_a_batch_size_are_heeded():
    rows = []
    encoder = Encoder(lambda x: rows.append(len(x)) or Independent(Normal(x, 1.0), 1))
    x = torch.tensor([[1.0, 0.3], [-1.0, -0.3]]).repeat(3, 1)  # variances 1.2 and 0.108, one direction of 1.308
    [layer] = layer_activity(encoder, x, threshold=0.5, batch_size=4)
    assert (layer.units, layer.pca, rows) == ([0], 1, [4, 2])
    [layer] = layer_activity(encoder, x, threshold=1.25)
    assert (layer.units, layer.pca) == ([], 1)
    assert [pca_active_units(x, threshold=t) for t in (1.3, 1.31)] == [1, 0]


def test_two_averages_take_n_samples_in_all():
    drawn = []

    class Counted(TwoLayers):
        def sample(self, shape):
            drawn.append(shape[0])
            return super().sample(shape)

    posterior_means(Encoder(Counted), torch.randn(5, 2), n=6)
    assert drawn == [3, 3]


def test_noise_is_no_direction_where_two_averages_are_given():
    signal, one, other = (torch.tensor(s, dtype=F64) for s in ([1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]))
    a, b = torch.stack([signal, one], 1), torch.stack([signal, other], 1)
    assert (pca_active_units(a), pca_active_units(a, b)) == (2, 1)


def test_a_mean_of_another_shape_is_not_taken():
    class Shared(Independent):
        mean = torch.zeros(2)  # not of each data point

    class Encoder:
        def posterior(self, x):
            return Shared(Normal(x, 1.0), 1)

    x = torch.randn(7, 2)
    [(a, b)] = posterior_means(Encoder(), x, n=4)
    assert b is not None and a.shape == b.shape == (7, 2)


def test_active_units_by_default():
    drawn = []

    class Counted(Independent):
        def rsample(self, shape=()):
            drawn.append(shape[0])
            return super().rsample(shape)

    class Encoder:
        def posterior(self, x):
            return Counted(Normal(x, 1.0), 1)

    x = torch.tensor([[1.0, 0.11, 0.09], [-1.0, -0.11, -0.09], [0.0, 0.0, 0.0]])  # variances 1, 0.0121, 0.0081
    [layer] = layer_activity(Encoder(), x)
    assert layer.units == [0, 1] and drawn == [50, 50]
