"""Pyro in both directions: programs as models, and objectives as losses for SVI.

`PyroModel(model, guide)` is a pair of Pyro programs as a Model of this library; `ObjectiveELBO(objective)` is a
`pyro.infer.ELBO`. The k samples lie on a dimension left of all plates, so programs must be written as for
`vectorize_particles=True`: operations broadcast over leading dimensions.

**Which sites share a weight.** Every objective is a function of log-weights `(k, batch)`.

- All sites lie in one vectorised plate: one weight for each element of it (of the outermost, where plates are nested);
  inner plates, time steps and several latent sites are summed into it.
- No latent lies in a plate: one weight for the whole data set, `(k, 1)`.
- Anything else (a global latent beside local ones, plates one after another, an autoguide that joins all latents in
  one site) has no weight for each data point and is refused. `weights="joint"` asks for one weight for the whole data
  set: a bound still, but a loose one, as its variance grows with the number of data points.

**Scales** (`subsample_size`, `poutine.scale`) multiply the bound, outside the logarithm. They must therefore be the
same for all sites of a weight. A global latent beside a subsampled plate has scale 1 where the data have N / B: inside
the logarithm that gives no bound, and outside there is no place for it, so it is refused. Only an objective that
declares itself `linear` in the log-weights does not care (VAE; write it for IWAE and others of one sample too):
`ObjectiveELBO(VAE())` takes every program that `Trace_ELBO(vectorize_particles=True)` takes and whose guide draws
random sites, all of them by `rsample`, unless the gradient needs scores (`score`, `vimco`, `rws`).

**The guide** is a density q of its random sites. `Delta` sites and reparameterised factors in it, as autoguides make
them, are a change of variables: they belong to the joint density, whatever parameters they have. So STL and DReG stop
the parameters of q and nothing else.
"""

try:
    import pyro as _pyro  # noqa: F401
except ImportError as error:
    raise ImportError('mcobjectives.pyro needs Pyro: pip install "mcobjectives[pyro]"') from error

from mcobjectives.pyro.elbo import ObjectiveELBO
from mcobjectives.pyro.model import Arguments, GuidePosterior, PyroModel, Sites

__all__ = ["Arguments", "GuidePosterior", "ObjectiveELBO", "PyroModel", "Sites"]
