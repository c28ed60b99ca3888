"""Monte Carlo objectives for latent-variable models: `loss = IWAE(k=50)(model, x)`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcobjectives.estimators import Weights
    from mcobjectives.model import Model, ModelError, Posterior
    from mcobjectives.objective import BoundObjective, Objective
    from mcobjectives.objectives import CIWAE, IWAE, MIWAE, VAE, LAlpha, Median, Power, Split
    from mcobjectives.plugins import PluginError, estimator_names, get_estimator, get_objective, objective_names
    from mcobjectives.sampling import parameterless

__version__ = "0.1.0"

__all__ = [
    "CIWAE",
    "IWAE",
    "MIWAE",
    "VAE",
    "BoundObjective",
    "LAlpha",
    "Median",
    "Model",
    "ModelError",
    "Objective",
    "PluginError",
    "Posterior",
    "Power",
    "Split",
    "Weights",
    "estimator_names",
    "get_estimator",
    "get_objective",
    "objective_names",
    "parameterless",
]

_HOME = {
    "estimators": ("Weights",),
    "model": ("Model", "ModelError", "Posterior"),
    "objective": ("BoundObjective", "Objective"),
    "objectives": ("CIWAE", "IWAE", "MIWAE", "VAE", "LAlpha", "Median", "Power", "Split"),
    "sampling": ("parameterless",),
    "plugins": ("PluginError", "estimator_names", "get_estimator", "get_objective", "objective_names"),
}
_MODULE_OF = {name: f"mcobjectives.{module}" for module, names in _HOME.items() for name in names}


if not TYPE_CHECKING:  # for a type checker any name would exist

    def __getattr__(name: str) -> Any:
        # Loaded at first use, so that `mcobj --help` and plugin discovery need no torch.
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'mcobjectives' has no attribute {name!r}")
        value = getattr(import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
