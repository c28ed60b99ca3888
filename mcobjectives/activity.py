"""Which latent units carry information on x: the active units of each stochastic layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mcobjectives.arguments import require_count
from mcobjectives.context import cast_anew
from mcobjectives.data import batches, in_float64, rows_and_device
from mcobjectives.model import called, has_methods
from mcobjectives.sampling import Samples


class Activity(NamedTuple):
    """Which units of a stochastic layer carry information on x.

    `variance` is Var_x E_q[h_u] of each unit, and `units` has the indices of the active ones. `pca` is the number of
    active directions: eigenvalues of the covariance of E_q[h] above the threshold.
    """

    variance: Tensor
    units: list[int]
    pca: int

    @property
    def active(self) -> int:
        return len(self.units)


def mean_covariance(means: Tensor, independent: Tensor | None = None) -> Tensor:
    """Cov_x E_q[h], `(d, d)` float64, without bias, from the exact means `(n, d)` or two estimates of them.

    The noise of an average over samples adds to its variance. Two averages over independent samples have independent
    noise, which cancels in their cross-covariance in expectation.
    """
    a = in_float64(means)
    b = a if independent is None else in_float64(independent)
    if len(a) < 2:
        raise ValueError(f"active units need the means of at least 2 data points, got {len(a)}")
    cross = (a - a.mean(0)).T @ (b - b.mean(0)) / (len(a) - 1)
    return (cross + cross.T) / 2


def active_units(means: Tensor, independent: Tensor | None = None, *, threshold: float = 1e-2) -> int:
    """The number of units u with Var_x E_q[h_u] above the threshold (Burda, Grosse & Salakhutdinov 2016).

    Args:
        means: E_q[h] of each data point, `(n, d)`, or an average over samples of q.
        independent: if the means are not exact, the average over other samples.
        threshold: the least variance of an active unit.

    Example:
        >>> import torch
        >>> active_units(torch.tensor([[1.0, 0.01], [-1.0, -0.01]]))
        1
    """
    return activity(means, independent, threshold=threshold).active


def pca_active_units(means: Tensor, independent: Tensor | None = None, *, threshold: float = 1e-2) -> int:
    """The number of directions of h in which E_q[h] varies: eigenvalues of its covariance above the threshold.

    Example:
        >>> import torch
        >>> pca_active_units(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        1
    """
    return activity(means, independent, threshold=threshold).pca


def activity(means: Tensor, independent: Tensor | None = None, *, threshold: float = 1e-2) -> Activity:
    """`active_units` and `pca_active_units` from one covariance, with the indices of the active units."""
    covariance = mean_covariance(means, independent)
    variance = covariance.diagonal().cpu()
    units = (variance > threshold).nonzero().flatten().tolist()
    return Activity(variance, units, int((torch.linalg.eigvalsh(covariance) > threshold).sum()))


def layer_activity(
    model: Any, x: Any, *, n: int = 100, threshold: float = 1e-2, batch_size: int = 100
) -> list[Activity]:
    """The activity of each stochastic layer, in the order of the parts of h.

    Args:
        model: see `mcobjectives.Model`.
        x: the data, one row per data point.
        n: samples of q per data point, for layers whose E_q[h] is not known exactly.
        threshold: the least variance of an active unit.
        batch_size: data points at a time.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> class Half:  # the second unit ignores x
        ...     def posterior(self, x):
        ...         return Independent(Normal(x * torch.tensor([1.0, 0.0]), 1.0), 1)
        >>> [layer] = layer_activity(Half(), torch.randn(100, 2))
        >>> layer.units, layer.pca
        ([0], 1)
    """
    return [activity(a, b, threshold=threshold) for a, b in posterior_means(model, x, n=n, batch_size=batch_size)]


@torch.no_grad()
def posterior_means(model: Any, x: Any, *, n: int = 100, batch_size: int = 100) -> list[tuple[Tensor, Tensor | None]]:
    """E_q[h] of each layer and data point, `(points, d)`: (exact, None), or two averages over n // 2 samples each.

    The mean of layer 1 is exact if `posterior.mean` is a tensor, or a tuple that starts with layer 1's mean. Otherwise
    the averages are over the conditional means `posterior.layer_means(h)`, each `(k, batch, d)` given the layers
    before, or over the samples if the posterior has no such method.
    """
    require_count("n", n, least=2)
    require_count("batch_size", batch_size)
    rows_and_device(x)
    parts_of = [_batch_means(called(model, "posterior", x=batch), n // 2) for batch in batches(x, batch_size)]
    layers = []
    for parts in zip(*parts_of, strict=True):
        first, second = zip(*parts, strict=True)
        layers.append((torch.cat(first), None if second[0] is None else torch.cat(second)))
    return layers


def _batch_means(posterior: Any, half: int) -> list[tuple[Tensor, Tensor | None]]:
    halves = []
    for _ in range(2):
        h = Samples(posterior, half, pathwise=False).draw()
        conditional = has_methods(posterior, "layer_means")
        layers = called(posterior, "layer_means", h=h) if conditional else pytree.tree_leaves(h)
        halves.append([in_float64(layer).mean(0) for layer in layers])
    cast_anew()
    means: list[tuple[Tensor, Tensor | None]] = [(_rows(a), _rows(b)) for a, b in zip(*halves, strict=True)]
    exact = _exact_mean(posterior)
    if exact is not None and exact.shape == halves[0][0].shape and bool(exact.isfinite().all()):
        means[0] = _rows(in_float64(exact)), None
    return means


def _exact_mean(posterior: Any) -> Tensor | None:
    try:
        leaves = pytree.tree_leaves(getattr(posterior, "mean", None))
    except NotImplementedError:  # of torch distributions that know none
        return None
    return leaves[0] if leaves and isinstance(leaves[0], Tensor) else None


def _rows(means: Tensor) -> Tensor:
    return means.reshape(len(means), -1)
