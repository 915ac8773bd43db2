"""What to think of a guide: numbers about its fit to the posterior, and verdicts in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.rows import given_arguments


@dataclass(frozen=True)
class Verdict:
    """What one diagnostic says: ``fired`` is an alarm; ``text`` has the number, its threshold and the paper."""

    name: str
    fired: bool
    text: str
    value: float = math.nan
    threshold: float = math.nan


@dataclass(frozen=True)
class Report:
    """What :func:`diagnose` found. ``ok`` is False when any verdict fires, ``alarms`` names those that do.

    ``vi_stats`` is an ``xarray.Dataset`` of the numbers behind them, ``skipped`` says which diagnostics could not be
    had, and why; a diagnostic that was skipped says nothing for the guide.
    """

    verdicts: tuple[Verdict, ...]
    vi_stats: Any = field(repr=False)
    skipped: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def alarms(self) -> list[str]:
        return [verdict.name for verdict in self.verdicts if verdict.fired]

    @property
    def ok(self) -> bool:
        return not self.alarms

    def __getitem__(self, name: str) -> Verdict:
        return {verdict.name: verdict for verdict in self.verdicts}[name]

    def __str__(self) -> str:
        head = "no alarm" if self.ok else f"{len(self.alarms)} alarm(s): {', '.join(self.alarms)}"
        lines = [f"{'ALARM' if one.fired else 'ok   '} {one.name}: {one.text}" for one in self.verdicts]
        lines += [f"--    {name}: not done, {reason}" for name, reason in self.skipped.items()]
        return "\n".join([head, *lines])


def diagnose(
    model: Callable,
    guide: Callable | Sequence[Callable],
    *args: Any,
    num_samples: int = 2000,
    num_data: int = 200,
    num_simulations: int = 400,
    batch_size: int | None = None,
    data_plates: str | Sequence[str] | None = None,
    refine_steps: int = 200,
    num_refits: int | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
    **kwargs: Any,
) -> Report:
    """Whether ``guide`` can be trusted as the posterior of ``model`` on data, in words and numbers.

    The data are the programs' arguments and keywords, or one object in the form that ``fit`` takes: a tuple is the
    positional arguments, a mapping the keywords, anything else the one argument.

    Verdicts, each with its threshold in its text (a *unit* is a datum, or the global latents together):

    - ``khat``: units whose importance weights have a Pareto k̂ above 0.7 (Vehtari et al. 2024, arXiv:1507.02646);
    - ``ess``: units whose importance effective sample size is below a tenth of the draws;
    - ``gap``: log-evidence minus ELBO, in nats; its parts, what a better member of the family would gain for these
      data (*amortization*) and what the family lacks (*approximation*; Cremer et al. 2018, arXiv:1801.03558), come
      from ``refine_steps`` of optimisation per datum;
    - ``width``, ``shift``, ``correlation``: the guide's standard deviations, means and correlations against those of
      the draws weighted by importance;
    - ``collapsed``: the guide is the prior although the posterior is not (Bowman et al. 2016, arXiv:1511.06349);
    - ``point``: the guide is a point and no distribution;
    - ``calibration``: ranks of latents that the model drew, among the guide's draws given the data that it drew with
      them, leave the band that uniform ranks keep (Talts et al. 2018, arXiv:1804.06788; for latents, ranks of the
      log-density too, Modrák et al. 2023, arXiv:2211.02383). Discrete latents have randomised ranks;
    - ``missed-mass``: annealed importance sampling from the prior finds more evidence than the guide's own draws, as it
      does where the guide sits on one of several modes (Neal 2001; Del Moral et al. 2006);
    - ``refits``: with several guides, or ``num_refits``, R̂ above 1.05 between them (Vehtari et al. 2021,
      arXiv:1903.08008).

    ``num_data`` rows at most are looked at where the programs take a part of them and no latent is global. What cannot
    be had is in ``report.skipped`` with the reason; an exact guide raises no alarm but for ``calibration``, in one run
    of a thousand. Draws run many at a time where that gives the numbers of single ones, and else one by one, which is
    slow. Standard error says what is being done once it takes seconds (``progress`` True: at once; False: never).
    Networks run in evaluation mode; no global state is touched.

    Raises :class:`~gumbo.errors.BadInput` as :func:`~gumbo.inference.to_arviz` does.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def guide(x, sd=0.5**0.5):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, sd))
    >>> x = torch.tensor([0.3, -1.2, 0.8])
    >>> diagnose(model, lambda x: guide(x, 0.2), x, num_samples=500, num_simulations=40, refine_steps=3).ok
    False
    """
    from ..engine.progress import Stages
    from .checks import examine

    args, kwargs = given_arguments(args, kwargs)
    return examine(
        model,
        guide,
        args,
        kwargs,
        num_samples=num_samples,
        num_data=num_data,
        num_simulations=num_simulations,
        batch_size=batch_size,
        data_plates=data_plates,
        refine_steps=refine_steps,
        num_refits=num_refits,
        seed=seed,
        say=Stages("diagnose", progress),
    )
