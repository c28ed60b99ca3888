"""check_objective: every promise of an objective, with the usual cause where it is broken."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch

from mcobjectives.objective import Objective
from mcobjectives.testing import promises
from mcobjectives.testing.estimators import estimator_findings
from mcobjectives.testing.promises import EXEMPTABLE
from mcobjectives.testing.report import Finding, find, quietly, verdict
from mcobjectives.testing.sizes import first_possible


def check_objective(objective: Objective) -> list[Finding]:
    """Check all that an objective promises. Returns the findings, or raises `ConformanceError` with every failure.

    If an objective does not have a property, it declares so as a class attribute, `exempt = frozenset({"monotone"})`. A
    declared property that holds is reported too. `smooth = False` declares slopes that jump. The library's gradient
    estimators are checked at small k against quadrature or enumeration, if the objective allows them.

    Args:
        objective: an instance; `reduce` is checked at its `k` (use a few samples, such as 8).

    Raises:
        ConformanceError: names each broken property, the numbers, and the usual cause.

    Example:
        >>> from mcobjectives import IWAE
        >>> findings = check_objective(IWAE(k=8))
        >>> all(finding.passed for finding in findings)
        True
    """
    if not isinstance(objective, Objective):
        name = getattr(objective, "__name__", "IWAE")
        raise TypeError(f"check_objective checks an instance, such as {name}(k=8), got {objective!r}")
    return verdict(repr(objective), objective_findings(objective))


def objective_findings(objective: Objective) -> list[Finding]:
    """The finding for each property, good and bad. What rests on a broken property is not checked."""
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        return _findings(objective)


def _findings(objective: Objective) -> list[Finding]:
    findings: list[Finding] = []
    for stage in (_FORM, _PURE, _SEPARATE, _PROMISES):
        exempt: Set[str] = getattr(objective, "exempt", frozenset())
        for name, (check, cause) in stage.items():
            findings.append(_find(objective, name, check, cause, name in exempt and name in EXEMPTABLE))
        broken = [f.property for f in findings if f.passed is False]
        if broken and stage is not _PROMISES:
            return findings
    if not any(f.passed is False and f.property in _DERIVATIVES for f in findings):
        return findings + estimator_findings(objective)
    return findings


def _find(objective: Objective, name: str, check: Callable[[Any], None], cause: str, exempt: bool) -> Finding:
    finding = find(name, cause, lambda: check(objective))
    if not exempt:
        if finding.passed is False and name in EXEMPTABLE:
            mend = f"; if it is meant so, declare exempt = frozenset({{{name!r}}}) on the class"
            return finding._replace(message=finding.message + mend)
        return finding
    # A declaration is for the class: a size at which it happens to be needless does not disprove it.
    generic = first_possible(objective, (6, 7, 8))
    if finding.passed is False or (generic is not None and find(name, cause, lambda: check(generic)).passed is False):
        return Finding(name, True, "exempt, as declared")
    return Finding(name, False, f"is declared in `exempt`, yet it holds. Take {name!r} out of the declaration")


_AXIS = "a reduction over the wrong axis: samples are axis 0, data points axis 1"

_SINGLE = "where seven digits agree, a float32 constant: torch.tensor(...) without dtype, for math.log(k)"

_Stage = dict[str, tuple[Callable[[Any], None], str]]

_FORM: _Stage = {
    "exempt": (promises.declaration, f"not a set of names out of {', '.join(sorted(EXEMPTABLE))}"),
    "dataclass": (promises.frozen_dataclass, "no @dataclass(frozen=True) on the class"),
    "shape": (promises.shape, _AXIS),
}
_PURE: _Stage = {
    "pure": (promises.pure, "an in-place operation (clamp_, -=, out=) or random numbers in reduce"),
}
_SEPARATE: _Stage = {
    "columns": (promises.columns, f"{_AXIS}; or a statistic of the whole batch"),
}
_PROMISES: _Stage = {
    "shift": (promises.shift, "a constant, a clamp or a function other than exp applied to log-weights"),
    "permutation": (promises.permutation, "samples used by their position (the first, halves, groups)"),
    "one_sample": (promises.one_sample, f"a missing -log k, or k - 1 in a denominator; {_SINGLE}"),
    "bounds": (promises.bounds, f"a missing -log k, a sum for a mean, or a term that extrapolates; {_SINGLE}"),
    "monotone": (promises.monotone, "a wrong sign, or a term that is subtracted"),
    "extreme": (promises.extreme, "exp before log: stay in log space (torch.logsumexp, mcobjectives.reductions)"),
    "dtype": (promises.dtype, ".double(), .float(), or torch.tensor(...) without dtype=log_w.dtype"),
    "device": (promises.device, "a tensor made on the CPU: give it device=log_w.device, or use log_w.new_zeros"),
    "gradcheck": (promises.gradcheck, "detach, .item() or torch.no_grad in reduce, or a wrong custom backward"),
    "continuous": (promises.continuous, "torch.where or a threshold: pathwise gradients miss what F jumps"),
    "smooth": (promises.smooth, "the wrong `smooth`: False goes with slopes that jump (a median, a maximum)"),
    "slopes": (promises.slopes, "a wrong formula for g_i = dF/dl_i; without the override autograd gives it"),
    "curvatures": (promises.curvatures, "a wrong formula for H_ii = d2F/dl_i2; without the override autograd gives it"),
    "leave_one_out": (promises.leave_one_out, "a wrong formula for F with l_i replaced by the mean of the others"),
    "loss": (promises.loss, "an override of __call__ or bound: the loss is -surrogate.mean(), the bound its value"),
}
_DERIVATIVES = frozenset({"gradcheck", "continuous", "smooth", "slopes", "curvatures", "leave_one_out"})
