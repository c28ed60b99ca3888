"""Measure a gradient estimate: its bias, variance, signal-to-noise ratio and cost, for each parameter group."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcobjectives.arguments import require_count
from mcobjectives.context import generators_at
from mcobjectives.model import ModelError
from mcobjectives.objective import Objective
from mcobjectives.sampling import caches, check_differentiable, detached, has_rsample, is_discrete

Loss = Callable[[Any, Any], Tensor]
"""An objective, or any function (model, x) -> scalar loss."""

Groups = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class GradientStatistics:
    """Moments of the gradient of a loss over repeated draws of the samples, for one parameter group.

    Attributes:
        mean: the average gradient of each parameter in the group, `(p,)` float64.
        variance: the unbiased variance of a single gradient, `(p,)`.
        draws: the number of gradients drawn.
        ms: median time of one gradient of all groups together, in milliseconds.
    """

    mean: Tensor
    variance: Tensor
    draws: int
    ms: float

    @property
    def snr(self) -> Tensor:
        """|mean| / standard deviation of each parameter, `(p,)`; 0 / 0 is 0."""
        return torch.where(self.mean == 0, 0.0, self.mean.abs() / self.variance.sqrt())

    @property
    def total_variance(self) -> float:
        """The trace of the gradient's covariance."""
        return float(self.variance.sum())

    @property
    def squared_norm(self) -> float:
        """An unbiased estimate of the squared norm of the expected gradient; it may be negative for a small norm."""
        return float(self.mean.square().sum()) - self.total_variance / self.draws

    @property
    def group_snr(self) -> float:
        """Norm of the expected gradient / square root of the total variance: the SNR of the whole group."""
        signal = math.sqrt(max(0.0, self.squared_norm))
        noise = math.sqrt(self.total_variance)
        return signal / noise if noise else math.inf if signal else 0.0


def parameter_groups(model: Any) -> dict[str, list[Tensor]]:
    """The trainable parameters of each top-level child of a module. Each parameter of the module itself is a group.

    Example:
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 3), "decoder": torch.nn.Linear(3, 2)})
        >>> {name: len(group) for name, group in parameter_groups(model).items()}
        {'encoder': 2, 'decoder': 2}
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{type(model).__name__} is no nn.Module: pass groups, a dict of lists of parameters")
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(name.partition(".")[0], []).append(parameter)
    return groups


def gradient_statistics(
    loss: Loss, model: Any, x: Any, *, draws: int = 100, groups: Groups | None = None
) -> dict[str, GradientStatistics]:
    """Mean and variance of the gradient of `loss(model, x)`. An objective's loss is minus the mean bound of the batch.

    This does not change `p.grad`.

    Args:
        loss: an objective, or any function (model, x) -> scalar.
        model: see `mcobjectives.Model`.
        x: the batch, the same for all draws.
        draws: the number of gradients to draw, at least 2.
        groups: name -> parameters; by default one group for each top-level child of the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def noisy(model, x):  # the gradient is 1 plus noise of variance 1
        ...     return model.weight.sum() * (1 + torch.randn(()))
        >>> stats = gradient_statistics(noisy, model, None, draws=1000)["weight"]
        >>> bool((stats.snr - 1).abs() < 0.2)
        True
    """
    require_count("draws", draws, least=2)
    groups = parameter_groups(model) if groups is None else groups
    flat = [parameter for group in groups.values() for parameter in group]
    if not flat:
        raise ValueError("there are no parameters to take gradients of")
    frozen = [name for name, group in groups.items() if not all(p.requires_grad for p in group)]
    if frozen:
        raise ValueError(f"group(s) {', '.join(frozen)} have parameters that are frozen (requires_grad is False)")
    mean, squares, times = torch.zeros(()), torch.zeros(()), []
    for n in range(1, draws + 1):
        start = _now(flat[0])
        gradients = torch.autograd.grad(loss(model, x), flat, allow_unused=True)
        times.append(_now(flat[0]) - start)
        gradient = _flattened(gradients, flat)
        if n == 1:
            mean, squares = torch.zeros_like(gradient), torch.zeros_like(gradient)
        change = gradient - mean  # Welford's update
        mean = mean + change / n
        squares = squares + change * (gradient - mean)
    sizes = [sum(parameter.numel() for parameter in group) for group in groups.values()]
    ms = 1000 * sorted(times)[draws // 2]
    moments = zip(groups, mean.split(sizes), (squares / (draws - 1)).split(sizes), strict=True)
    return {name: GradientStatistics(m, v, draws, ms) for name, m, v in moments}


class Row(NamedTuple):
    """One objective with its estimator on one parameter group.

    `bias` is the norm of (expected gradient - reference) minus the part that noise explains: zero if noise explains all
    of it. `bias_error` is the norm of that noise: a smaller bias cannot be seen.
    """

    objective: Any
    group: str
    reference_norm: float
    bias: float
    bias_error: float
    variance: float
    snr: float
    ms: float


class Comparison(list[Row]):
    """Rows of a comparison, shown as a table."""

    def __repr__(self) -> str:
        head = ("objective", "group", "|gradient|", "bias", "+-", "variance", "SNR", "ms")
        cells = [[_label(row[0]), row[1], *(f"{number:.3g}" for number in row[2:])] for row in self]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = []
        for line in (head, *cells):
            aligned = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            lines.append("  ".join(aligned))
        return "\n".join(lines)


def compare_gradients(
    model: Any,
    x: Any,
    objectives: Iterable[Loss],
    *,
    draws: int = 100,
    reference: Loss | Mapping[str, Tensor] | None = None,
    reference_draws: int | None = None,
    groups: Groups | None = None,
) -> Comparison:
    """Bias, variance, SNR and cost of the gradients of several objectives or estimators on the same batch.

    Args:
        model: see `mcobjectives.Model`.
        x: the batch, the same for all.
        objectives: objectives, or any functions (model, x) -> scalar loss.
        draws: the number of gradients drawn for each.
        reference: what the expected gradient should be: an objective, averaged over a long run, or the exact gradients
            of the loss, group -> `(p,)`. The default is each objective's own gradient by "reparam", or by "vimco" or
            "score" if a pathwise gradient would be wrong for the posterior.
        reference_draws: length of the long run; by default ten times `draws`.
        groups: name -> parameters; by default one group for each top-level child of the model.

    Example:
        >>> from mcobjectives import IWAE
        >>> from torch.distributions import Independent, Normal
        >>> class Gaussian(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder, self.decoder = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        ...     def posterior(self, x):
        ...         return Independent(Normal(self.encoder(x), 1.0), 1)
        ...     def log_joint(self, x, h):
        ...         return (Normal(0.0, 1.0).log_prob(h) + Normal(self.decoder(h), 1.0).log_prob(x)).sum(-1)
        >>> pairs = [IWAE(k=5), IWAE(k=5, gradient="dreg")]
        >>> table = compare_gradients(Gaussian(), torch.randn(8, 1), pairs, draws=10)
        >>> [(str(row.objective), row.group) for row in table[1:3]]
        [('IWAE(k=5)', 'decoder'), ("IWAE(k=5, gradient='dreg')", 'encoder')]
    """
    groups = parameter_groups(model) if groups is None else groups
    reference_draws = 10 * draws if reference_draws is None else reference_draws
    known: list[tuple[Any, dict[str, GradientStatistics]]] = []
    rows = Comparison()
    for objective in objectives:
        statistics = gradient_statistics(objective, model, x, draws=draws, groups=groups)
        target: Any = reference
        if reference is None:
            target = _unbiased(objective, model, x)
        if isinstance(target, Mapping):
            expected = {name: _exact(target, name, statistics[name]) for name in groups}
        else:
            expected = next((found for one, found in known if _equal(one, target)), {})
            if not expected:
                expected = gradient_statistics(target, model, x, draws=reference_draws, groups=groups)
                known.append((target, expected))
        rows += [_row(objective, name, statistics[name], expected[name]) for name in groups]
    return rows


def _row(objective: Loss, name: str, found: GradientStatistics, expected: GradientStatistics) -> Row:
    noise = found.total_variance / found.draws + expected.total_variance / expected.draws
    distance = float((found.mean - expected.mean).square().sum())
    return Row(
        objective,
        name,
        reference_norm=math.sqrt(max(0.0, expected.squared_norm)),
        bias=math.sqrt(max(0.0, distance - noise)),
        bias_error=math.sqrt(noise),
        variance=found.total_variance,
        snr=found.group_snr,
        ms=found.ms,
    )


def _unbiased(objective: Any, model: Any, x: Any) -> Any:
    """The same objective with a gradient that is right by construction."""
    if not isinstance(objective, Objective):
        raise ValueError(f"{_label(objective)} is no Objective, so it tells no reference: pass reference=")
    if not objective.weighs_itself:
        gradient = "reparam" if _is_pathwise(model, x) else "vimco" if objective.k > 1 else "score"
        return replace(objective, gradient=gradient, backward_samples=None)
    # The weights are made of its parts': a Split.
    parts = {f.name: getattr(objective, f.name) for f in fields(objective)}
    inner = {name: _unbiased(part, model, x) for name, part in parts.items() if isinstance(part, Objective)}
    if not inner:
        raise ValueError(f"{_label(objective)} has weights of its own, which tell no reference: pass reference=")
    return replace(objective, backward_samples=None, **inner)


def _is_pathwise(model: Any, x: Any) -> bool:
    """Whether a pathwise gradient is right: all parts of h are differentiable, and none is discrete."""
    posterior = model.posterior(x)
    if not has_rsample(posterior) or is_discrete(posterior):
        return False
    with generators_at():
        h = posterior.rsample(torch.Size((1,)))
    try:
        check_differentiable(h, posterior.log_prob(h if caches(posterior) else detached(h)))
    except ModelError:
        return False
    return True


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except RuntimeError:  # of options that are tensors
        return False


def _exact(reference: Mapping[str, Tensor], name: str, found: GradientStatistics) -> GradientStatistics:
    if name not in reference or reference[name].numel() != found.mean.numel():
        raise ValueError(f"reference must hold the {found.mean.numel()} exact gradients of group {name!r}")
    mean = reference[name].detach().cpu().double().flatten()
    return GradientStatistics(mean, torch.zeros_like(mean), 1, 0.0)


def _flattened(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    parts = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(gradients, parameters, strict=True)]
    return torch.cat([part.detach().flatten().cpu().double() for part in parts])


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _label(objective: Any) -> str:
    return repr(objective) if isinstance(objective, Objective) else getattr(objective, "__name__", repr(objective))
