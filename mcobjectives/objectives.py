"""The paper's seven objectives: a few lines of mathematics each.

`l_i` are the log-weights of one data point, LME is their log-mean-exp. The closed-form derivatives equal those of
autograd on `reduce`, and are cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mcobjectives.arguments import require_count, require_number
from mcobjectives.estimators import Weights
from mcobjectives.objective import Objective
from mcobjectives.reductions import (
    log_mean_exp,
    log_median,
    log_power_mean,
    logsumexp_of_others,
    mean_of_others,
    median_with,
    sum_of_others,
)


class _Mean(Objective):
    """F = (1/k) sum_i l_i."""

    linear = True

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)

    def slopes(self, log_w: Tensor) -> Tensor:
        return torch.full_like(log_w, 1 / log_w.shape[0])

    def curvatures(self, log_w: Tensor) -> Tensor:
        return torch.zeros_like(log_w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        return mean_of_others(log_w)


@dataclass(frozen=True)
class VAE(_Mean):
    """The evidence lower bound: F = (1/k) sum_i l_i (Kingma & Welling 2014).

    With `analytic_kl=True`, -KL(q(h | x) || p(h)) in closed form replaces log p(h) - log q(h | x). This needs one
    stochastic layer, and a prior N(0, I) or a `model.prior` that `torch.distributions.kl_divergence` knows.

    Args:
        k: samples for each data point.
        analytic_kl: use the closed form of KL(q(h | x) || p(h)) instead of the samples.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> VAE(k=2).reduce(torch.tensor([[-2.0], [-4.0]]))
        tensor([-3.])
    """

    k: int = 1
    analytic_kl: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.analytic_kl, bool):
            raise ValueError(f"analytic_kl must be True or False, got {self.analytic_kl!r}")
        if self.analytic_kl and self.gradient != "reparam":
            raise ValueError(
                f"analytic_kl=True replaces the samples' log q(h | x), which gradient={self.gradient!r} needs: "
                "use gradient='reparam' or analytic_kl=False"
            )


@dataclass(frozen=True)
class IWAE(Objective):
    """The importance-weighted bound: F = log (1/k) sum_i w_i (Burda, Grosse & Salakhutdinov 2016).

    In expectation it is a lower bound on log p(x), and it gets tighter as k grows. `k = 1` is the VAE.

    Args:
        k: samples for each data point.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> IWAE(k=2).reduce(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """

    k: int = 50

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def slopes(self, log_w: Tensor) -> Tensor:
        return log_w.softmax(0)

    def curvatures(self, log_w: Tensor) -> Tensor:
        w = log_w.softmax(0)
        return w * (1 - w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        return _power_leave_one_out(log_w, 1.0)


@dataclass(frozen=True)
class Power(Objective):
    """The power mean of the weights: F = (1/p) log (1/k) sum_i w_i^p (the VR bound of Li & Turner 2016, alpha = 1 - p).

    p -> 0 is the VAE, p = 1 is IWAE, p -> inf is the largest weight. Only for p <= 1 is it a lower bound on log p(x) in
    expectation. For p > 1 its expectation may exceed log p(x) by up to (1 - 1/p) log k: do not read it as a likelihood.

    Args:
        k: samples for each data point.
        p: the exponent, not 0.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> Power(k=2, p=2.0).reduce(torch.tensor([[1.0], [1.0]]))
        tensor([1.])
    """

    k: int = 50
    p: float = 2.0

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_power_mean(log_w, self.p)

    def slopes(self, log_w: Tensor) -> Tensor:
        return (self.p * log_w).softmax(0)

    def curvatures(self, log_w: Tensor) -> Tensor:
        w = self.slopes(log_w)
        return self.p * w * (1 - w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        if abs(self.p) < 1e-2:  # where dividing by p would lose the digits
            return super().leave_one_out(log_w)
        return _power_leave_one_out(log_w, self.p)

    def __post_init__(self) -> None:
        require_number("p", self.p, lambda p: p != 0, "a finite number other than 0 (p -> 0 is VAE)")
        super().__post_init__()


@dataclass(frozen=True)
class Median(Objective):
    """The median log-weight, the mean of the two middle ones for even k (Arnal, Lee & Pezzotti 2021). Not a bound.

    Its slopes jump where samples change places, so it refuses STL and DReG.

    Args:
        k: samples for each data point.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> Median(k=4).reduce(torch.tensor([[1.0], [9.0], [2.0], [4.0]]))
        tensor([3.])
    """

    k: int = 50

    smooth = False

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_median(log_w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        return median_with(log_w, mean_of_others(log_w))


@dataclass(frozen=True)
class LAlpha(_Mean):
    """L_alpha = E log p(x | h) - alpha KL(q(h | x) || p(h)) (Arnal, Lee & Pezzotti 2021; the beta-VAE's objective).

    It is the VAE on log-weights whose term log p(h) - log q(h | x) is weighted by alpha: `LAlpha(k, alpha)` gives the
    same numbers as `VAE(k=k, kl_weight=alpha)`. Its alpha is the beta of the beta-VAE; the beta of `CIWAE` is something
    else. The model must have `log_likelihood` and `log_prior`. alpha = 1 is the VAE, alpha > 1 a looser bound, and
    alpha < 1 not a bound.

    Args:
        k: samples for each data point.
        alpha: the weight of the KL, at least 0.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> LAlpha(k=2, alpha=0.5).tempering
        0.5
    """

    k: int = 50
    alpha: float = 0.5

    @property
    def tempering(self) -> float:
        return self.alpha * self.kl_weight

    def __post_init__(self) -> None:
        require_number("alpha", self.alpha, lambda alpha: alpha >= 0, "a finite number of at least 0")
        super().__post_init__()


@dataclass(frozen=True)
class CIWAE(Objective):
    """beta VAE + (1 - beta) IWAE on the same samples: F = beta mean(l) + (1 - beta) LME(l) (Rainforth et al. 2018).

    Args:
        k: samples for each data point.
        beta: the VAE's share, in [0, 1]; not the beta of the beta-VAE, which is `LAlpha`.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> CIWAE(k=2, beta=1.0).reduce(torch.tensor([[-2.0], [-4.0]]))
        tensor([-3.])
    """

    k: int = 50
    beta: float = 0.5

    def reduce(self, log_w: Tensor) -> Tensor:
        if self.beta == 0:  # 0 * -inf, where a weight is zero
            return log_mean_exp(log_w)
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

    def slopes(self, log_w: Tensor) -> Tensor:
        return self.beta / log_w.shape[0] + (1 - self.beta) * log_w.softmax(0)

    def curvatures(self, log_w: Tensor) -> Tensor:
        w = log_w.softmax(0)
        return (1 - self.beta) * w * (1 - w)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        of_iwae = _power_leave_one_out(log_w, 1.0)
        return of_iwae if self.beta == 0 else self.beta * mean_of_others(log_w) + (1 - self.beta) * of_iwae

    def __post_init__(self) -> None:
        require_number("beta", self.beta, lambda beta: 0 <= beta <= 1, "a number in [0, 1]")
        super().__post_init__()


@dataclass(frozen=True)
class MIWAE(Objective):
    """The mean of k2 IWAE bounds of k1 samples each: k = k1 k2 samples in all (Rainforth et al. 2018).

    (1, k) is the VAE and (k, 1) is IWAE. Sample i belongs to group i // k1.

    Args:
        k1: samples in each group.
        k2: number of groups.

    Every `Objective` also takes the options of the base class.

    Example:
        >>> import torch
        >>> MIWAE(k1=1, k2=2).reduce(torch.tensor([[-2.0], [-4.0]]))
        tensor([-3.])
    """

    k1: int = 5
    k2: int = 10

    exempt = frozenset({"permutation"})

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.k1 * self.k2

    def _grouped(self, log_w: Tensor) -> Tensor:
        if log_w.shape[0] != self.k:
            raise ValueError(f"{self!r} reduces k1 * k2 = {self.k} samples, got {log_w.shape[0]}")
        return log_w.reshape(self.k2, self.k1, *log_w.shape[1:])

    def reduce(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(self._grouped(log_w), dim=1).mean(0)

    def slopes(self, log_w: Tensor) -> Tensor:
        return (self._grouped(log_w).softmax(1) / self.k2).reshape(log_w.shape)

    def curvatures(self, log_w: Tensor) -> Tensor:
        w = self._grouped(log_w).softmax(1)
        return (w * (1 - w) / self.k2).reshape(log_w.shape)

    def leave_one_out(self, log_w: Tensor) -> Tensor:
        others = self._grouped(mean_of_others(log_w))  # of all samples, not of the group's alone
        in_group = logsumexp_of_others(self._grouped(log_w).transpose(0, 1)).transpose(0, 1)
        replaced = torch.logaddexp(in_group, others) - math.log(self.k1)
        of_other_groups = sum_of_others(log_mean_exp(self._grouped(log_w), dim=1)).unsqueeze(1)
        return ((replaced + of_other_groups) / self.k2).reshape(log_w.shape)

    def __post_init__(self) -> None:
        for name in ("k1", "k2"):
            require_count(name, getattr(self, name))
        super().__post_init__()


@dataclass(frozen=True)
class Split(Objective):
    """One objective for the generative network, another for the inference network, on the same samples.

    `Split(generative=IWAE(k=64), inference=MIWAE(8, 8))` is PIWAE (Rainforth et al. 2018). Its value is that of the
    generative objective. Each part has its own `gradient`. Both need the same number of samples and `kl_weight`.

    Args:
        generative: the objective for the parameters of log p(x, h).
        inference: the objective for the parameters of q.

    Example:
        >>> Split(generative=IWAE(k=6), inference=MIWAE(k1=3, k2=2)).k
        6
    """

    generative: Objective
    inference: Objective

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.generative.k

    @property
    def tempering(self) -> float:
        return self.generative.tempering

    def reduce(self, log_w: Tensor) -> Tensor:
        return self.generative.reduce(log_w)

    def weights(self, log_w: Tensor) -> Weights:
        return Weights(self.generative.weights(log_w).a, *self.inference.weights(log_w)[1:])

    def __post_init__(self) -> None:
        parts = {"generative": self.generative, "inference": self.inference}
        for name, part in parts.items():
            if not isinstance(part, Objective):
                raise ValueError(f"{name} must be an objective, got {part!r}")
            if part.chunk_size or part.backward_samples or part.analytic_kl:
                raise ValueError(f"{name}: chunk_size, backward_samples and analytic_kl do not go on a part of a Split")
        if self.generative.k != self.inference.k:
            raise ValueError(f"both parts need the same k, got {self.generative.k} and {self.inference.k}")
        if self.generative.tempering != self.inference.tempering or self.kl_weight != 1.0:
            raise ValueError("both parts of a Split need the same kl_weight, given on the parts and not on the Split")
        if self.gradient != "reparam":
            raise ValueError(f"give gradient={self.gradient!r} to the inference part, not to the Split")
        super().__post_init__()


def _power_leave_one_out(log_w: Tensor, p: float) -> Tensor:
    replaced = torch.logaddexp(logsumexp_of_others(p * log_w), p * mean_of_others(log_w))
    return (replaced - math.log(log_w.shape[0])) / p
