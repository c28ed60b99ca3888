"""Whether an estimator's expected gradient is the gradient of the expected objective: exactly, at small k."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mcobjectives import plugins
from mcobjectives.estimators import Weights
from mcobjectives.messages import one_line
from mcobjectives.objective import Objective
from mcobjectives.plugins import Estimator, PluginError
from mcobjectives.replay import require_no_parameters
from mcobjectives.testing.exact import NAMES, Discrete, Exact, Gaussian
from mcobjectives.testing.promises import extremes, zero_weight
from mcobjectives.testing.report import Broken, Finding, Unchecked, find, quietly, verdict
from mcobjectives.testing.sizes import first_possible, plainly, resized

OWN = "mcobjectives"
_NEED_SMOOTH = ("stl", "dreg")
_SIZES = (2, 3, 4)


def own_names(group: str) -> list[str]:
    """What the library itself registers in a group of entry points."""
    return [n for n, points in plugins.registered(group).items() if OWN in {plugins.distribution(p) for p in points}]


def check_estimator(estimator: str | Estimator, *, unbiased: bool = True) -> list[Finding]:
    """Check a gradient estimator on each of the library's objectives that it does not refuse.

    Its weights must be `(k, batch)`, the same in both dtypes, and finite at extreme log-weights, including -inf. This
    is checked for one sample (which the estimator may refuse) and for several. The expected gradient is compared with
    exact ones. There is one finding per objective, one for a `kl_weight` other than one, and one for eight samples.

    Args:
        estimator: a function (objective, log_weights) -> (a, c, s), or the name it is registered under.
        unbiased: False if the estimator's phi gradient (that of the inference network) is not the objective's. Then
            only the theta gradient must be right, and a phi gradient that is right for every objective is reported.

    Raises:
        ConformanceError: names each objective, the numbers, and the usual cause.
        PluginError: if the name is not that of an installed estimator.

    Example:
        >>> all(finding.passed is not False for finding in check_estimator("dreg"))
        True
    """
    if not callable(estimator):
        plugins.get_estimator(estimator)  # which says what is wrong with a name
    estimator = _by_name(estimator)
    with quietly(), torch.random.fork_rng():
        torch.manual_seed(0)
        findings = _findings(estimator, unbiased)
    return verdict(f"estimator {_named(estimator)!r}", findings)


def _findings(estimator: str | Estimator, unbiased: bool) -> list[Finding]:
    findings = [find("weights", _CAUSE_WEIGHTS, lambda: _whole(_accepted(estimator)))]
    if not findings[0].passed:
        return findings
    biased = False
    for key in own_names(plugins.OBJECTIVES):
        objective = plugins.get_objective(key)()
        findings.append(
            find(key, _CAUSE_ESTIMATOR, lambda o=objective: _unbiased(o, estimator, phi=unbiased))  # type: ignore[misc]
        )
        biased = biased or (not unbiased and _is_biased(objective, estimator))
    if all(finding.passed is not False for finding in findings):
        tempered = dataclasses.replace(_accepted(estimator), gradient="reparam", kl_weight=0.5)
        findings.append(find("kl_weight", _CAUSE_TEMPERING, lambda: _unbiased(tempered, estimator, phi=unbiased)))
        findings.append(find("k = 8", _CAUSE_SIZE, lambda: _unbiased_at_eight(estimator, phi=unbiased)))
    if not unbiased and not biased:
        words = "unbiased=False is declared, yet phi's gradient is right for every objective. Drop the declaration"
        findings.append(Finding("unbiased", False, words))
    return findings


def estimator_findings(objective: Objective) -> list[Finding]:
    """One finding for each of the library's estimators, and for the objective's own if that is another's.

    Of an objective with weights of its own: their form, theta's gradient, and phi's, which may follow something else.
    """
    if objective.weighs_itself:
        findings = [find("weights", _CAUSE_WEIGHTS, lambda: _whole(objective))]
        for label, check in (("weights: theta", _own_theta), ("weights: phi", _own_phi)):
            if all(finding.passed is not False for finding in findings):
                findings.append(find(label, _CAUSE_OBJECTIVE, lambda check=check: check(objective)))  # type: ignore[misc]
        return findings
    findings = []
    for name in sorted({*own_names(plugins.ESTIMATORS), _by_name(objective.gradient)}, key=_named):
        label = f"estimator {_named(name)}"
        findings.append(find(label, _CAUSE_OBJECTIVE, lambda name=name: _valid(objective, name)))  # type: ignore[misc]
    return findings


def _own_theta(objective: Objective) -> None:
    _unbiased(objective, objective.gradient, phi=False)


def _own_phi(objective: Objective) -> None:
    try:
        _unbiased(objective, objective.gradient, phi=True)
    except Broken as other:
        raise Unchecked(f"phi follows another target, or is biased: {other}") from None


def _by_name(estimator: str | Estimator) -> str | Estimator:
    """The name of one of the library's own that is given as a function: what is known of it goes by name."""
    own = (name for name in own_names(plugins.ESTIMATORS) if plugins.get_estimator(name) is estimator)
    return next(own, estimator)


def _named(estimator: str | Estimator) -> str:
    return estimator if isinstance(estimator, str) else getattr(estimator, "__name__", repr(estimator))


def _valid(objective: Objective, name: str | Estimator) -> None:
    if name in _NEED_SMOOTH and not objective.smooth:
        generic = first_possible(objective, (5, 6, 7)) or objective
        try:
            _with(generic, name)
        except ValueError:
            return
        raise Broken(f"smooth = False, yet gradient={_named(name)!r} is accepted")
    if name == "stl":
        _unbiased(objective, name, phi=_is_linear(objective))
    elif name == "rws":
        _unbiased(objective, name, phi=False)
        small = _small(objective, name)
        exact = Discrete(small.k)
        _, gradient = exact.expected(small)
        worst = float((gradient - exact.wake_phi(small))[exact.thetas :].abs().max())
        if worst > 1e-6:
            raise Broken(f"phi's expected gradient is off from E sum w~ grad log q by {worst:.4g}")
    else:
        _unbiased(objective, name, phi=True)


def _unbiased(objective: Objective, name: str | Estimator, *, phi: bool) -> None:
    small = _small(objective, name)
    for exact in _problems(small):
        _compare(exact, small, name, phi=phi)


def _unbiased_at_eight(name: str | Estimator, *, phi: bool) -> None:
    """By enumeration; of a pathwise estimator theta's gradient alone, which is exact with any few nodes."""
    try:
        eight = resized(_accepted(name), 8)
    except ValueError as refused:
        raise Unchecked(f"refused: {one_line(refused)}") from None
    if eight.plan.path:
        _compare(Gaussian(8), eight, name, phi=False)
    else:
        _compare(Discrete(8), eight, name, phi=phi)


def _compare(exact: Exact, objective: Objective, name: str | Estimator, *, phi: bool) -> None:
    error = _error(exact, objective, phi=phi)
    if error is not None:
        raise Broken(f"with k = {objective.k} and gradient={_named(name)!r}, {error}")


def _is_biased(objective: Objective, name: str | Estimator) -> bool:
    try:
        _unbiased(objective, name, phi=True)
    except Broken:
        return True
    except Unchecked:
        pass
    return False


def _problems(objective: Objective) -> list[Exact]:
    """Where this objective's estimator can be checked: pathwise ones need differentiable samples."""
    needs_path = objective.weights(torch.zeros(objective.k, 1, dtype=torch.float64)).c is not None
    if needs_path or objective.analytic_kl:
        return [Gaussian(objective.k)]
    # With kinks in F, quadrature over the density is too rough: differences of the sum take the pathwise route.
    return [Discrete(objective.k), Gaussian(objective.k)] if objective.smooth else [Discrete(objective.k)]


def _error(exact: Exact, objective: Objective, *, phi: bool) -> str | None:
    """What is wrong with the expected value or gradient, if anything; without `phi`, of theta's alone."""
    tolerance = 1e-5 if objective.smooth else 1e-3
    value, gradient = exact.expected(objective)
    true_value, true_gradient = exact.true(objective)
    if abs(value - true_value) > 1e-6:
        return f"the value of the loss is {value:.8g} in expectation, but E F = {true_value:.8g}"
    last = None if phi else exact.thetas
    off = (gradient - true_gradient)[:last].abs().nan_to_num(torch.inf)
    at, worst = int(off.argmax()), float(off.max())
    if worst <= tolerance:
        return None
    if isinstance(exact, Gaussian) and at >= exact.thetas and worst < torch.inf:  # theta's needs no fine quadrature
        for fineness in (0.85, 0.7, 0.55):
            coarse = Gaussian(objective.k, fineness=fineness)
            change = gradient - true_gradient - (coarse.expected(objective)[1] - coarse.true(objective)[1])
            if float(change[:last].abs().max()) > 0.2 * worst:
                raise Unchecked("F bends too sharply for quadrature: the expected gradient is not known well enough")
    return (
        f"the expected gradient of {NAMES[exact.kind][at]} is {gradient[at]:.8g}, but that of E F is "
        f"{true_gradient[at]:.8g} ({exact.kind} latent, {'quadrature' if exact.kind == 'gaussian' else 'enumeration'})"
    )


def _with(objective: Objective, name: str | Estimator) -> Objective:
    """The objective with this estimator; raises `ValueError` where that refuses it."""
    try:
        found = first_possible(objective, (objective.k,), gradient=name)
    except PluginError as error:
        raise Broken(one_line(error), _CAUSE_CRASH) from error
    assert found is not None
    return found


def _small(objective: Objective, name: str | Estimator) -> Objective:
    """The objective with this estimator and few enough samples; with several groups, and so many that slopes jump."""
    sizes = (4, 2, 3) if hasattr(objective, "k1") else _SIZES if objective.smooth else (3, 4, 2)
    plain = first_possible(objective, sizes, **plainly(objective))
    if plain is None:
        raise Unchecked(f"the objective cannot be made with k = 2, 3 or 4, and k = {objective.k} is too large")
    try:
        small = plain if plain.gradient == name else _with(plain, name)
        if not small.plan.plain:
            require_no_parameters(small.reduce(torch.zeros(small.k, 1, dtype=torch.float64)))
    except ValueError as refused:
        raise Unchecked(f"refused: {one_line(refused)}") from None
    return small


def _is_linear(objective: Objective) -> bool:
    return not _small(objective, "reparam").slopes_vary


def _accepted(estimator: str | Estimator) -> Objective:
    """The first of the library's objectives, with four samples, that the estimator does not refuse."""
    refusals = []
    iwae_first = sorted(own_names(plugins.OBJECTIVES), key=lambda key: key != "iwae")  # finite at a zero weight
    for key in iwae_first:
        try:
            return _with(resized(plugins.get_objective(key)(), 4), estimator)
        except ValueError as refused:
            refusals.append(f"{key}: {one_line(refused)}")
    raise Broken(
        f"it refuses each of the library's objectives, such as {refusals[0]}",
        "a refusal that is too wide, or weights a, c, s that are not (k, batch) or None",
    )


def _whole(objective: Objective) -> None:
    """Raise unless the weights are arrays like the log-weights, finite, and of each data point alone, at any k."""
    _sound(objective)
    for k in (1, 8):
        try:
            other = resized(objective, k)
        except PluginError as error:
            raise Broken(f"with k = {k}, {one_line(error)}", _CAUSE_CRASH) from error
        except (ValueError, TypeError):  # refused
            continue
        _sound(other)


def _sound(objective: Objective) -> None:
    k = objective.k
    for log_w, what in (
        (_ordinary(k, seed=0), "ordinary log-weights"),
        (extremes(k).float(), "log-weights of +-1e4"),
        (zero_weight(k).float(), "log-weights of which one is -inf"),
    ):
        if not bool(objective.reduce(log_w).isfinite().all()):  # nor is there a bound to differentiate
            continue
        before, zero = log_w.clone(), bool(log_w.isinf().any())
        for letter, weight in _arrays(objective.weights(log_w)).items():
            if weight.shape != log_w.shape or weight.dtype != log_w.dtype:
                raise Broken(
                    f"{letter} is {tuple(weight.shape)} {weight.dtype} for log-weights {tuple(log_w.shape)} float32"
                )
            # What phi follows by an objective's own weights may be -inf at a zero weight, where its F is finite.
            infinite = weight.isnan() if letter != "a" and objective.weighs_itself and zero else ~weight.isfinite()
            if bool(infinite.any()):
                raise Broken(f"{letter} is NaN or infinite for {what}, with k = {k}")
        if not torch.equal(log_w, before):
            raise Broken("the log-weights that it is given are changed", "an in-place operation (clamp_, -=, out=)")
    log_w = _ordinary(k, seed=1)
    again, whole = _arrays(objective.weights(log_w)), _arrays(objective.weights(log_w))
    if any(not torch.equal(weight, again[letter]) for letter, weight in whole.items() if letter in again):
        return  # a baseline that learns, or chance
    double = _arrays(objective.weights(log_w.double()))
    alone = [_arrays(objective.weights(log_w[:, j : j + 1])) for j in range(log_w.shape[1])]
    for letter, weight in whole.items():
        found = double.get(letter, torch.zeros_like(weight).double())
        off = (weight - found).abs() / (1 + found.abs())
        if found.dtype != torch.float64 or bool(off.max() > 1e-3):
            at = int(off.argmax())
            raise Broken(
                f"{letter} is {weight.flatten()[at]:.6g} for log-weights in float32, and {found.flatten()[at]:.6g} in "
                f"{found.dtype} for the same in float64, with k = {k}",
                "a constant of one dtype, .float() or .double(), or a branch on the dtype",
            )
        for j, arrays in enumerate(alone):
            if letter in arrays and not torch.allclose(weight[:, j : j + 1], arrays[letter], rtol=1e-4, atol=1e-5):
                raise Broken(f"{letter} of a data point depends on the others in its batch", _CAUSE_BATCH)


def _ordinary(k: int, seed: int) -> Tensor:
    return torch.randn(k, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _arrays(weights: Weights) -> dict[str, Tensor]:
    """Those of a, c and s that are there."""
    return {letter: weight for letter, weight in zip("acs", weights, strict=True) if weight is not None}


_CAUSE_WEIGHTS = "weights a, c, s that are not (k, batch) or None, exp of log-weights, or a division by k - 1"
_CAUSE_BATCH = "a mean over the batch as a baseline: a data point's own values then weight its own score"
_CAUSE_CRASH = (
    "an error in its own code: what refuses an objective, or a k, raises ValueError and says what to use instead"
)
_CAUSE_SIZE = "a constant that is right at one k alone, or a branch on k"
_CAUSE_OBJECTIVE = (
    "an override (weights, slopes, tempering, surrogate, analytic_kl) that does not match reduce, or a "
    "baseline that looks at its own sample"
)
_CAUSE_TEMPERING = "tempering left out where q is weighted: tempering * g in s, g - tempering * H in c"
_CAUSE_ESTIMATOR = (
    "a baseline that depends on the sample it is subtracted from, a missing g in s (tempering * g - ...), "
    "or slopes that jump and are not refused (require_smooth); if the bias is meant, check_estimator(unbiased=False)"
)
