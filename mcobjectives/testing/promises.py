"""What an objective promises, one function a property: of F, `(k, batch) -> (batch,)`, and of its derivatives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mcobjectives import derivatives
from mcobjectives.messages import one_line
from mcobjectives.objective import Objective, own_parameters
from mcobjectives.testing.exact import Gaussian
from mcobjectives.testing.report import Broken, Unchecked
from mcobjectives.testing.sizes import first_possible, plainly, resized

EXEMPTABLE = frozenset({"shift", "permutation", "one_sample", "bounds", "monotone"})
"""The properties that an objective may lack if it declares so: `exempt = frozenset({"permutation"})`."""

_STEPS = 512
"""Of each walk on which a jump is looked for: with so many even one of 1e-4 is found."""

# Inputs.


def log_weights(k: int, scales: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0), columns: int = 12) -> Tensor:
    """Standard normal log-weights at several scales, `(k, columns * len(scales))`, the same at each call."""
    generator = torch.Generator().manual_seed(k)
    draw = torch.randn(k, columns * len(scales), generator=generator, dtype=torch.float64)
    return draw * torch.tensor(scales, dtype=torch.float64).repeat_interleave(columns)


def extremes(k: int) -> Tensor:
    """Log-weights of +-1e4, `(k, 6)`: all high, all low, one high, one low, mixed, and one high amid ordinary ones."""
    log_w = torch.full((k, 6), -1e4, dtype=torch.float64)
    log_w[:, 0] = 1e4
    log_w[0, 2] = 1e4
    log_w[1:, 3] = 1e4
    log_w[::2, 4] = 1e4
    log_w[:, 5] = log_weights(k, (1.0,), 1)[:, 0]
    log_w[-1, 5] = 1e4
    return log_w


def zero_weight(k: int) -> Tensor:
    """Ordinary log-weights, of which one is -inf, `(k, 1)`: p's support may end inside q's."""
    log_w = log_weights(k, (1.0,), 1)
    log_w[0] = -torch.inf
    return log_w


def _same(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Raise `Broken` with the worst pair, unless all are equal up to rounding at their size."""
    if found.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error = (found - expected).abs() / (1 + expected.abs())
    if not bool((error <= tolerance).all()):  # also where it is NaN
        at = int(error.nan_to_num(torch.inf).argmax())
        raise Broken(f"{what}: got {found.flatten()[at]:.9g}, expected {expected.flatten()[at]:.9g}")


# Form: without these nothing else can be asked.


def declaration(objective: Objective) -> None:
    declared: Set[str] = getattr(objective, "exempt", frozenset())
    unknown = sorted(set(declared) - EXEMPTABLE)
    if isinstance(declared, str) or unknown:
        raise Broken(f"`exempt` declares {declared!r}")


def frozen_dataclass(objective: Objective) -> None:
    known = type(objective).__dataclass_fields__  # with its InitVars
    declared = {n: str(kind) for n, kind in vars(type(objective)).get("__annotations__", {}).items() if n not in known}
    lost = [n for n, kind in declared.items() if "ClassVar" not in kind and "KW_ONLY" not in kind]
    if lost:
        raise Broken(f"{type(objective).__name__} declares {', '.join(lost)}, which its constructor does not know")
    if dataclasses.replace(objective) != objective or hash(dataclasses.replace(objective)) != hash(objective):
        raise Broken("a copy with the same arguments is not equal to it, or has another hash")


def shape(objective: Objective) -> None:
    for batch in (5, 1):
        log_w = log_weights(objective.k, (1.0,), batch)
        found = objective.reduce(log_w)
        if not isinstance(found, Tensor) or found.shape != (batch,):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise Broken(f"reduce of (k, batch) = ({objective.k}, {batch}) gives {got} instead of ({batch},)")


# Purity: a pure function of each column.


def pure(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    before = log_w.clone()
    first = objective.reduce(log_w)
    if not torch.equal(log_w, before):
        raise Broken(f"reduce changed its input, at {int((log_w != before).sum())} of {log_w.numel()} log-weights")
    again = objective.reduce(log_w)
    changed = (first != again) & ~(first.isnan() & again.isnan())
    if bool(changed.any()):
        at = int(changed.nonzero()[0])
        raise Broken(f"reduce of the same log-weights gave {first[at]:.17g}, then {again[at]:.17g}, at data point {at}")
    if bool(first.isnan().any()):
        at, count = int(first.isnan().nonzero()[0]), int(first.isnan().sum())
        raise Broken(
            f"reduce gives NaN at {count} of {len(first)} data points, one with log-weights between "
            f"{log_w[:, at].min():.4g} and {log_w[:, at].max():.4g}",
            "a logarithm, root or power of a negative number, or inf - inf after exp",
        )


def columns(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    whole = objective.reduce(log_w)
    for j in range(0, log_w.shape[1], 7):
        _same(objective.reduce(log_w[:, j : j + 1])[0], whole[j], f"data point {j} by itself and in its batch differ")


# Promises about F.


def shift(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    near = log_weights(3, (30.0,), log_w.shape[1])[0]
    for t in (near, torch.full_like(near, -1e4), torch.full_like(near, 1e4)):
        found, expected = objective.reduce(log_w + t), objective.reduce(log_w) + t
        judged = torch.ones_like(found, dtype=torch.bool) if t is near else found.isfinite()  # others by `extreme`
        _same(found[judged], expected[judged], "F(l + t) is not F(l) + t")


def permutation(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    expected = objective.reduce(log_w)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        order = torch.randperm(objective.k, generator=generator)
        _same(objective.reduce(log_w[order]), expected, "F changes when the samples are shuffled")
    _same(objective.reduce(log_w.flip(0)), expected, "F changes when the samples are taken in reverse")


def one_sample(objective: Objective) -> None:
    single = resized(objective, 1, gradient="reparam")  # of F, whatever the estimator: VIMCO refuses k = 1
    log_w = log_weights(1)
    _same(single.reduce(log_w), log_w[0], "with k = 1, F is not the one log-weight")


def bounds(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    log_w = torch.cat([log_w, log_w[:1].expand_as(log_w)], 1)  # constant weights too
    found = objective.reduce(log_w)
    low, high = log_w.amin(0), log_w.amax(0)
    slack = 1e-9 * (1 + log_w.abs().amax(0))
    outside = torch.maximum(low - slack - found, found - high - slack)
    if not bool((outside <= 0).all()):
        at = int(outside.nan_to_num(torch.inf).argmax())
        raise Broken(f"F = {found[at]:.9g} for log-weights between {low[at]:.9g} and {high[at]:.9g}")


def monotone(objective: Objective) -> None:
    log_w = log_weights(objective.k)
    before = objective.reduce(log_w)
    generator = torch.Generator().manual_seed(1)
    for i in range(min(objective.k, 16)):
        raised = log_w.clone()
        raised[i] += 3 * torch.rand(log_w.shape[1], generator=generator, dtype=log_w.dtype)
        change = objective.reduce(raised) - before
        if not bool((change >= -1e-9 * (1 + before.abs())).all()):
            at = int((-change).nan_to_num(torch.inf).argmax())
            by = raised[i, at] - log_w[i, at]
            raise Broken(f"raising log-weight {i} by {by:.4g} lowers F by {-change[at]:.4g}")


def extreme(objective: Objective) -> None:
    for dtype in (torch.float64, torch.float32):
        for name, (function, k) in _functions(objective).items():
            found = function(extremes(k).to(dtype))
            bad = int((~torch.isfinite(found)).sum())
            if bad:
                raise Broken(f"{name} is NaN or infinite at {bad} of {found.numel()} places for log-weights of +-1e4")
        if objective.k > 1 and bool(objective.reduce(zero_weight(objective.k).to(dtype)).isnan().any()):
            raise Broken("F is NaN where one log-weight is -inf", "-inf - (-inf), or a weight of 0 times -inf")


def _functions(objective: Objective) -> dict[str, tuple[derivatives.Reduction, int]]:
    """F and its derivatives, each with the k to ask it at: those that take k passes at few samples."""
    small = first_possible(objective, (8, 7, 6)) or objective
    found: dict[str, tuple[derivatives.Reduction, int]]
    found = {"F": (objective.reduce, objective.k), "slopes": (objective.slopes, objective.k)}
    found |= {"curvatures": (small.curvatures, small.k)} if small.k <= 8 else {}
    return found | ({"leave_one_out": (small.leave_one_out, small.k)} if 1 < small.k <= 8 else {})


def dtype(objective: Objective) -> None:
    for name, (function, k) in _functions(objective).items():
        log_w = log_weights(k, (0.1, 1.0, 10.0)).float()
        single, double = function(log_w), function(log_w.double())
        for found, kind in ((single, torch.float32), (double, torch.float64)):
            if found.dtype != kind:
                raise Broken(f"{name} of {kind} log-weights gives {found.dtype}")
        if name in ("F", "slopes"):  # curvatures may magnify rounding: those of a power mean by p squared
            _same(single.double(), double, f"{name} in float32 is not that in float64", 1e-3)


class _Factories(TorchFunctionMode):
    """Notes the tensors, numbers apart, that are made without a device: they are on the CPU wherever log_w is."""

    WATCHED = (
        *(
            torch.arange,
            torch.as_tensor,
            torch.empty,
            torch.eye,
            torch.full,
            torch.linspace,
            torch.logspace,
            torch.ones,
        ),
        *(torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros),
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        from_tensor = func is torch.as_tensor and isinstance(args[0], Tensor)
        if func in self.WATCHED and not from_tensor and (kwargs or {}).get("device") is None and result.ndim:
            self.found.add(f"torch.{func.__name__}")
        return result


def device(objective: Objective) -> None:
    try:
        _on_meta(_moved(objective, "meta"))
    except Broken:
        raise
    except Exception:  # it asks for numbers, and there are none on that device
        _by_factories(objective)
    if torch.cuda.is_available():
        on_gpu, log_w = _moved(objective, "cuda"), log_weights(objective.k).cuda()
        found = [on_gpu.reduce(log_w), on_gpu.slopes(log_w)]
        if not all(part.is_cuda for part in found):
            raise Broken(f"log-weights on the GPU give results on {found[0].device} and {found[1].device}")


def _moved(objective: Objective, device: str) -> Objective:
    """The objective with parameters of its own, which move with a model's, on another device."""
    moved: dict[str, Any] = {name: value.to(device) for name, value in own_parameters(objective).items()}
    return dataclasses.replace(objective, **plainly(objective), **moved) if moved else objective


def _on_meta(objective: Objective) -> None:
    """Each function on tensors without numbers, which no tensor on the CPU mixes with: as on a GPU, but anywhere."""
    for name, (function, k) in _functions(objective).items():
        try:
            found = function(log_weights(k).to("meta"))
        except RuntimeError as error:
            if "expected device" in str(error):
                raise Broken(f"{name} of log-weights on another device fails: {one_line(error)}") from error
            raise
        if not found.is_meta:
            raise Broken(f"{name} of log-weights on another device is on the {found.device.type}")


def _by_factories(objective: Objective) -> None:
    calls = [(function, log_weights(k)) for function, k in _functions(objective).values()]
    with _Factories() as made:
        for function, log_w in calls:
            function(log_w)
    if made.found:
        raise Broken(f"{', '.join(sorted(made.found))} is called without device=log_w.device")


# Promises about its use.


def loss(objective: Objective) -> None:
    small = first_possible(objective, (2, 3, 4), **plainly(objective))
    if small is None:
        raise Unchecked(f"the objective cannot be made with k = 2, 3 or 4, and k = {objective.k} is too large")
    exact = Gaussian(small.k, fineness=0.25)
    model, x = exact.model(torch.tensor(exact.start, dtype=torch.float64, requires_grad=True)), exact.h[0]
    expected = small.surrogate(model, x).detach()
    _same(small(model, x).detach(), -expected.mean(), "objective(model, x) is not minus the mean of the surrogate")
    _same(small.bound(model, x), expected, "bound(model, x) is not the value of the surrogate")
    try:
        whole, half = (dataclasses.replace(objective, kl_weight=t).tempering for t in (1.0, 0.5))
    except ValueError:  # refused, as a Split does
        return
    if not math.isclose(half, whole / 2):
        raise Broken(
            f"tempering is {half:.9g} with kl_weight = 0.5, but {whole:.9g} with kl_weight = 1",
            "a tempering of its own that leaves out self.kl_weight as a factor",
        )


# Promises about its derivatives.


def gradcheck(objective: Objective) -> None:
    small = first_possible(objective, (8, 7, 6)) or objective
    log_w = log_weights(small.k, (1.0,), 3).requires_grad_()
    fast = small.k > 8
    try:
        torch.autograd.gradcheck(small.reduce, log_w, fast_mode=fast)
        if objective.smooth:
            torch.autograd.gradgradcheck(small.reduce, log_w, fast_mode=fast)
    except RuntimeError as error:
        raise Broken(f"autograd and finite differences of reduce disagree: {one_line(error)[:300]}") from error


def continuous(objective: Objective) -> None:
    generic = first_possible(objective, (5, 6, 7)) or objective
    jump = derivatives.largest_jump(lambda log_w: generic.reduce(log_w).detach().unsqueeze(0), generic.k, _STEPS)
    if jump > 1e-6:
        raise Broken(f"F jumps by {jump:.4g} between neighbouring log-weights")


def smooth(objective: Objective) -> None:
    generic = first_possible(objective, (5, 6, 7)) or objective
    if generic.linear and generic.slopes_vary:
        raise Broken("linear = True is declared, but the slopes dF/dlog w depend on the log-weights")
    jump = derivatives.largest_jump(generic.slopes, generic.k, _STEPS)
    if objective.smooth and jump > 1e-6:
        raise Broken(f"the slopes dF/dlog w jump by {jump:.4g} between neighbouring log-weights, but smooth is True")
    if not objective.smooth and jump <= 1e-6:
        raise Broken("smooth = False is declared, but no jump of the slopes dF/dlog w is found")


def slopes(objective: Objective) -> None:
    _compare(objective, objective.slopes, derivatives.slopes, "slopes")


def curvatures(objective: Objective) -> None:
    small = first_possible(objective, (8, 7, 6)) or objective
    _compare(small, small.curvatures, derivatives.curvatures, "curvatures")


def leave_one_out(objective: Objective) -> None:
    if objective.k < 2:
        raise Unchecked("needs k of at least 2")
    _compare(objective, objective.leave_one_out, derivatives.leave_one_out, "leave_one_out")


def _compare(objective: Objective, own: derivatives.Reduction, automatic: Callable[..., Tensor], what: str) -> None:
    log_w = log_weights(objective.k, (0.1, 1.0, 10.0))
    with torch.no_grad():
        _same(own(log_w), automatic(objective.reduce, log_w), f"the override of {what} is not what reduce gives", 1e-8)
