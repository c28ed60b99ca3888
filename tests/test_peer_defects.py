"""One test for each defect measured in a peer library that has a counterpart here: it stays out of this one."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from test_reductions import LargestResult
from toys import (
    F64,
    Discrete,
    Gaussian1D,
    LinearGaussian,
    TwoLayers,
    assert_same,
    exact_gradient,
    expected_gradient,
    gaussian_grid,
    gradients,
    loss_gradient,
    registered,
)

from mcobjectives import IWAE, MIWAE, VAE, LAlpha, ModelError, Power


def test_pyro_subsampling_scale_inside_the_logsumexp():
    """Pyro's RenyiELBO puts the plate's scale N/B inside the logsumexp: -1023 where log p = -1784."""
    model = LinearGaussian()
    x = model.data(100)
    whole = model.log_marginal(x).sum()
    for objective in registered(6):
        if not isinstance(objective, LAlpha):
            parts = [10 * objective.bound(model, part).sum() for part in x.split(10)]
            torch.testing.assert_close(sum(parts) / 10, whole, rtol=0, atol=1e-8)


def test_pyro_discrete_guide_without_a_gradient():
    """Pyro's RenyiELBO(alpha=0) with a Bernoulli guide gives the guide a gradient of exactly zero (pyro#3289)."""
    model = Discrete()
    x, probability = model.enumerate(3)
    with pytest.raises(ModelError, match="needs rsample"):
        IWAE(k=3)(model, x)
    for gradient in ("score", "vimco"):
        found = expected_gradient(IWAE(k=3, gradient=gradient), model, x, probability)
        assert_same(found, exact_gradient(IWAE(k=3), model, x, probability), 1e-12)
        assert found["q_logits"].abs().max() > 0.01


@pytest.mark.parametrize("gradient", ["rws", "dreg", "vimco"])
def test_pyro_one_weight_for_the_whole_batch(gradient):
    """Pyro's RWS weights the whole batch with one weight: a data point's gradient depends on its neighbours."""

    class OwnLocation(Gaussian1D):
        def __init__(self):
            super().__init__()
            self.own = torch.nn.Parameter(torch.zeros(2, dtype=F64))
            self.nodes = torch.tensor([[0.3, 0.3], [-1.0, -1.0], [0.8, 0.8]], dtype=F64)

        def posterior(self, x):
            q = super().posterior(x)
            q.loc = q.loc + self.own
            return q

    model, objective = OwnLocation(), IWAE(k=3, gradient=gradient)
    near, far = (torch.tensor([0.9, other], dtype=F64) for other in (1.0, 40.0))
    first = gradients(model, objective.surrogate(model, near).sum())["own"][0]
    assert first == gradients(model, objective.surrogate(model, far).sum())["own"][0] != 0


def test_pyro_alpha_one_raises():
    """Pyro's RenyiELBO raises at alpha = 1, the ELBO (here p -> 0): the limit is continuous, and VAE is its name."""
    model = LinearGaussian().off_posterior()
    expected, gradient = loss_gradient(VAE(k=5), model, model.data())
    for p in (1e-9, -1e-9, 1e-13):
        found, found_gradient = loss_gradient(Power(k=5, p=p), model, model.data())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
        assert_same(found_gradient, gradient, 1e-7)
    with pytest.raises(ValueError, match="p -> 0 is VAE"):
        Power(k=5, p=0)


def test_pyro_one_logsumexp_for_all_local_latents():
    """Renyi bounds of a batch taken over summed log-weights (pyro#3104, #2220): each data point has its own mean."""
    model = LinearGaussian().off_posterior()
    x = model.data()
    torch.manual_seed(0)
    h = model.posterior(x).rsample((5,))
    log_w = model.log_joint(x, h) - model.posterior(x).log_prob(h)
    torch.manual_seed(0)
    found = IWAE(k=5).bound(model, x)
    torch.testing.assert_close(found, (log_w.logsumexp(0) - math.log(5)))
    summed = log_w.sum(1).logsumexp(0) - math.log(5)
    assert abs(found.sum() - summed) > 0.1


@pytest.mark.parametrize("gradient", ["reparam", "dreg"])
def test_pyro_numpyro_out_of_memory_with_many_particles(gradient):
    """Memory in proportion to k (pyro#174, numpyro#1645): in chunks nothing larger than (k, batch) is ever made."""
    model = LinearGaussian(observed=64)
    x = model.data(2)
    objective = IWAE(k=2000, gradient=gradient, chunk_size=50)
    with LargestResult() as largest:
        objective(model, x).backward()
    assert largest.size <= max(2000 * 2, 50 * 2 * 64)


def test_tfp_dreg_squares_the_decoders_weights_too():
    """TFP's DReG weights the whole gradient, the decoder's included, by the squared weights."""
    model = LinearGaussian().off_posterior()
    _, iwae = loss_gradient(IWAE(k=6), model, model.data())
    _, dreg = loss_gradient(IWAE(k=6, gradient="dreg"), model, model.data())
    for name in ("weight", "bias"):
        torch.testing.assert_close(dreg[name], iwae[name], rtol=0, atol=1e-12)


def test_pythae_miwae_reduces_the_wrong_axis():
    """pythae's MIWAE takes the logarithm over the wrong axis, which k1 = k2 hides."""
    log_w = torch.log(torch.tensor([1.0, 3.0, 2.0, 6.0, 5.0, 7.0], dtype=F64)).unsqueeze(1)
    assert MIWAE(k1=2, k2=3).reduce(log_w).item() == pytest.approx((math.log(2) + math.log(4) + math.log(6)) / 3)
    assert MIWAE(k1=3, k2=2).reduce(log_w).item() == pytest.approx((math.log(2) + math.log(6)) / 2)


def test_pythae_iwae_loss_is_not_the_bound():
    """pythae's IWAE "loss" is -sum w~ log w, 6.19 where the bound is -8.45: no surrogate in the value."""
    model = LinearGaussian().off_posterior(0.5)
    x = model.data()
    torch.manual_seed(0)
    h = model.posterior(x).rsample((6,))
    log_w = model.log_joint(x, h) - model.posterior(x).log_prob(h)
    bound = (log_w.logsumexp(0) - math.log(6)).mean()
    assert abs((log_w.softmax(0) * log_w).sum(0).mean() - bound) > 0.1
    for gradient in ("reparam", "dreg", "score", "vimco", "rws"):
        torch.testing.assert_close(loss_gradient(IWAE(k=6, gradient=gradient), model, x)[0], -bound.detach())


def test_pythae_get_nll_has_the_wrong_sign():
    """pythae's get_nll returns +log p: here the bound is log p, and the loss minus that."""
    model = LinearGaussian()
    x = model.data()
    torch.testing.assert_close(IWAE(k=3).bound(model, x), model.log_marginal(x))
    torch.testing.assert_close(IWAE(k=3)(model, x).detach(), -model.log_marginal(x).mean())


def test_ovis_repeats_the_data_through_the_encoder():
    """OVIS sends k copies of x through the encoder: here it sees the batch once, chunks and resampling included."""
    rows = []

    class Counting(LinearGaussian):
        def posterior(self, x):
            rows.append(tuple(x.shape))
            return super().posterior(x)

    model = Counting()
    x = model.data(4)
    for extra in ({}, {"chunk_size": 7}, {"backward_samples": 5}, {"chunk_size": 7, "backward_samples": 5}):
        for gradient in ("reparam", "dreg", "vimco"):
            rows.clear()
            IWAE(k=30, gradient=gradient, **extra)(model, x).backward()
            assert rows == [(4, 3)]


def test_ovis_hierarchical_dreg_is_biased():
    """OVIS' DReG of two layers is .144 where .088 is right: it scales the sampling chain twice."""
    model, grid = TwoLayers(), gaussian_grid(2, 2, 12)
    x = model.on(grid)
    found = expected_gradient(IWAE(k=2, gradient="dreg"), model, x, grid.weight)
    assert_same(found, exact_gradient(IWAE(k=2), model, x, grid.weight), 1e-8)


@pytest.mark.parametrize("objective", [IWAE(k=600), Power(k=600, p=0.5), Power(k=600, p=-2.0)], ids=repr)
def test_ovis_vimco_takes_memory_quadratic_in_k(objective):
    """OVIS' VIMCO makes a (k, k, batch) array: here IWAE and the power means take O(k)."""
    log_w = torch.randn(600, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    vimco = replace(objective, gradient="vimco")
    with LargestResult() as largest:
        vimco.weights(log_w)
    assert largest.size <= 601 * 2


def test_mmvae_dreg_hook_never_fires():
    """mmvae's DReG hook sits on a copy of the samples: its gradient silently is STL's."""
    model, grid = Gaussian1D(), gaussian_grid(2, 1, 100)
    x = model.on(grid)
    dreg = expected_gradient(IWAE(k=2, gradient="dreg"), model, x, grid.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stl = expected_gradient(IWAE(k=2, gradient="stl"), model, x, grid.weight)
    assert_same(dreg, exact_gradient(IWAE(k=2), model, x, grid.weight))
    assert abs(dreg["q_m"] - stl["q_m"]) > 0.02


def test_sbi_importance_weighted_loss_is_never_called():
    """sbi defines an importance-weighted loss and never calls it: every objective's own reduce decides its loss."""
    model = LinearGaussian().off_posterior(0.5)
    losses = [round(loss_gradient(o, model, model.data())[0].item(), 9) for o in registered(6)]
    same = {repr(o): loss for o, loss in zip(registered(6), losses, strict=True)}
    assert same["VAE(k=6)"] == same["MIWAE(k1=1, k2=6)"] and same["IWAE(k=6)"] == same["MIWAE(k1=6, k2=1)"]
    assert len(set(losses)) == len(losses) - 2


@pytest.mark.parametrize("chunk_size", [3, 4, 7, 9, 11])
def test_scvi_divides_by_a_count_that_it_did_not_draw(chunk_size):
    """scvi-tools divides by the requested count while drawing whole chunks: biased where chunks do not divide k."""
    model = LinearGaussian().off_posterior()
    torch.manual_seed(0)
    expected = IWAE(k=10).bound(model, model.data())
    torch.manual_seed(0)
    torch.testing.assert_close(IWAE(k=10, chunk_size=chunk_size).bound(model, model.data()), expected)


def test_pytorch_vae_undetached_weights():
    """PyTorch-VAE#34: differentiating sum w~ log w with w~ attached is not IWAE's gradient, whose slopes are w~."""
    log_w = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_()
    (found,) = torch.autograd.grad(IWAE(k=5).reduce(log_w).sum(), log_w)
    (attached,) = torch.autograd.grad((log_w.softmax(0) * log_w).sum(), log_w)
    torch.testing.assert_close(found, log_w.softmax(0))
    assert (attached - found).abs().max() > 0.1


def test_pytorch_detaching_distribution_parameters_only():
    """pytorch#25783: STL and DReG need log q with its parameters detached, and its inputs not."""
    model = LinearGaussian()  # at the posterior, where only such a stop makes phi's gradient vanish
    for gradient in ("stl", "dreg"):
        _, found = loss_gradient(VAE(k=3, gradient=gradient), model, model.data())
        assert max(found[name].abs().max() for name in ("q_gain", "q_offset", "q_scale")) < 1e-12
