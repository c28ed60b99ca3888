"""Pyro in both directions: programs as models, and objectives as losses for SVI.

`PyroModel(model, guide)` turns a pair of Pyro programs into a Model of this library. `ObjectiveELBO(objective)` is a
`pyro.infer.ELBO`. The k samples lie on a dimension left of all plates, so write programs as for
`vectorize_particles=True`: operations must broadcast over leading dimensions.

**Which sites share a weight.** Every objective is a function of log-weights `(k, batch)`.

- If all sites lie in one vectorised plate, each element of the plate (of the outermost one, if plates are nested) has
  one weight. Inner plates, time steps and several latent sites are summed into it.
- If no latent lies in a plate, the whole data set has one weight, `(k, 1)`.
- Anything else is refused, because data points have no weights of their own: a global latent beside local ones, plates
  one after another, an autoguide that joins all latents in one site. `weights="joint"` asks for one weight for the
  whole data set. That is still a bound, but a loose one: its variance grows with the number of data points.

**Scales** (`subsample_size`, `poutine.scale`) multiply the bound, outside the logarithm. They must therefore be the
same for all sites of a weight. A global latent beside a subsampled plate has scale 1 where the data have N / B. Inside
the logarithm that gives no bound, and outside there is no place for it, so it is refused.

Only an objective that declares itself `linear` in the log-weights accepts such programs, as VAE does. For IWAE and
others of one sample, which equal VAE, write `VAE`. `ObjectiveELBO(VAE())` takes every program that
`Trace_ELBO(vectorize_particles=True)` takes, if its guide draws random sites, all of them with `rsample`, and the
gradient needs no scores (`score`, `vimco`, `rws`).

**The guide** is a density q of its random sites. `Delta` sites and reparameterised factors in it, which autoguides
make, are a change of variables: they belong to the joint density, whatever parameters they have. So STL and DReG stop
the parameters of q and nothing else. Where q has none, as in `AutoStructured`, whose random sites are plain noise, they
are the same as reparam.
"""

try:
    import pyro as _pyro  # noqa: F401
except ImportError as error:
    raise ImportError('mcobjectives.pyro needs Pyro: pip install "mcobjectives[pyro]"') from error

from mcobjectives.pyro.elbo import ObjectiveELBO
from mcobjectives.pyro.model import Arguments, GuidePosterior, PyroModel, Sites

__all__ = ["Arguments", "GuidePosterior", "ObjectiveELBO", "PyroModel", "Sites"]
