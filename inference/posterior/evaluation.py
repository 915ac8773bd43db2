"""Evaluation of a model and guide: the ELBO, the evidence, rate and distortion, in nats per datum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ...changes import announce
from ...errors import BadInput, GumboWarning
from ...options import holds_to_annotations
from ...tables import html, wrapped
from ..engine.progress import bar
from ..engine.rows import ProcessGroup, Rows, pieces_of
from ..engine.scopes import private_seed
from .graphs import Compiler, provided_compiler
from .importance import joint_evidence, khat_limit, largest_of
from .parts import Weighing, exact_pair
from .runner import VaryingSites

if TYPE_CHECKING:
    from .information import Information

LABELS = {
    "elbo": "ELBO",
    "log_evidence": "log p(x)",
    "log_predictive": "log predictive",
    "rate": "rate",
    "distortion": "distortion",
}
_NOT_NUMBERS = ("values", "_marks", "_ask", "_together")
FEW, DOMINATED = 10, 0.05  # draws from which one with half the weight is remarkable, and the share of data to tell of
# Log-weights beyond which the progress is shown unless that is refused.
_QUIET = 2_000_000


@dataclass(frozen=True)
class Difference:
    """The difference of two evaluations in one number, on the same data, in nats per datum.

    ``se`` is the standard error over the data, of the mean of paired differences; ``mc_se`` that of the draws, the only
    error on fixed data. Where one weight covers all data, there are no pairs and ``se`` is NaN.
    """

    mean: float
    se: float
    mc_se: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.se:.3f} (± {self.mc_se:.2g})"


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`evaluate`: means over the data and their standard errors, in nats per datum.

    ``elbo`` is ``-(rate + distortion)``; ``rate`` is E[log q(z | x) - log p(z)] and ``distortion`` is -E[log p(x | z)]
    (Alemi et al. 2018, arXiv:1711.00464).

    ``log_evidence`` is log p(data) divided by the number of data. Without global latents it is the mean of each datum's
    importance-weighted estimate over ``num_samples`` draws, a lower bound in expectation that tightens with the number
    of draws (Burda et al. 2015, arXiv:1509.00519). With global latents it comes from ``num_samples`` weights of the
    global draws over all data, each with ``num_local_samples`` draws of the local latents, and ``khat`` is the Pareto
    k̂ of these weights. If k̂ shows that the weights are unreliable, ``log_evidence`` is NaN and ``reason`` says why;
    ``elbo`` remains a lower bound.

    ``dominated`` is the share of the data, where each has ten weights or more of its own, of which one draw has more
    than half the weight: for these the estimate is far from converged, and its error of the draws is too small.

    ``log_predictive`` is the mean log predictive density, log E_q[p(x_n | global latents)]. On the guide's training
    data it is in-sample and above the evidence; without global latents it equals the evidence.

    ``…_se`` is the standard error over the data, as a sample of a population; ``…_mc_se`` that of the draws, the error
    for these data. Where one weight covers all data, both are the latter.

    ``values`` holds each datum's own numbers ``(N,)``, where they exist; :meth:`compare` pairs them with those of
    another evaluation. ``kl``, ``active_units`` and ``mutual_information`` are computed on first access.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    log_evidence_se: float
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    num_data: int
    num_samples: int
    log_predictive: float = math.nan
    log_predictive_se: float = math.nan
    elbo_mc_se: float = math.nan
    log_evidence_mc_se: float = math.nan
    log_predictive_mc_se: float = math.nan
    rate_mc_se: float = math.nan
    distortion_mc_se: float = math.nan
    num_local_samples: int = 1
    khat: float = math.nan
    dominated: float = math.nan
    reason: str = ""
    values: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    _marks: tuple = field(default=(), compare=False, repr=False)
    _ask: Callable[[], Information] | None = field(default=None, compare=False, repr=False)
    _together: bool = field(default=False, compare=False, repr=False)  # one evidence of all data, by global latents

    def __getattribute__(self, name: str) -> Any:
        if name == "log_evidence" and object.__getattribute__(self, "_together"):
            announce(name, stacklevel=2)
        return object.__getattribute__(self, name)

    def __eq__(self, other: object) -> bool:
        return self._compared() == other._compared() if isinstance(other, Evaluation) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._compared())

    def __getstate__(self) -> dict[str, Any]:
        # A pickle leaves the programs and the data behind, and takes the information if it has been computed.
        return self.__dict__ | {"_ask": None}

    def __copy__(self) -> Evaluation:
        return self  # it does not change

    def __deepcopy__(self, memo: object) -> Evaluation:
        return self

    def _compared(self) -> tuple:
        # What is not known is equal to itself; since Python 3.13 dataclasses compare NaN with NaN.
        return tuple(None if value != value else value for value in self.as_dict().values())

    def as_dict(self) -> dict[str, Any]:
        """Means, errors, counts, k̂ and reason as plain values; ``values`` and `information` hold the rest."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _NOT_NUMBERS}

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """Label, mean and both errors of each quantity; the reason in place of a mean that cannot be given."""
        rows = []
        for name, label in LABELS.items():
            mean, error, drawn = (getattr(self, f"{name}{end}") for end in ("", "_se", "_mc_se"))
            if name == "log_evidence" and self.reason:
                rows.append((label, f"cannot say: {self.reason}", "", ""))
            elif name != "log_predictive" or not (math.isnan(mean) or mean == self.log_evidence):
                rows.append((label, f"{mean:.3f}", f"{error:.3f}", f"{drawn:.2g}"))
        return rows

    def _about_weights(self) -> str:
        if self.reason:
            return ""
        if self.dominated > DOMINATED:
            return (
                f"log p(x) is a loose lower bound: for {self.dominated:.0%} of the data one draw has more than half the"
                " weight; take more draws or a better guide"
            )
        if math.isnan(self.khat):
            return ""
        return f"k̂ of the weights behind log p(x) is {self.khat:.2f}, limit {khat_limit(self.num_samples):.2f}"

    def __str__(self) -> str:
        lines = [f"{self.num_data} data, {self._draws()}; nats per datum ± error over the data (± of the draws)"]
        for label, mean, error, drawn in self._rows():
            lines.append(f"  {label:14} " + (f"{mean:>9} ± {error} (± {drawn})" if error else mean))
        if about := self._about_weights():
            lines.append(f"  {about}")
        indents = ["  ", *[17 * " "] * (len(lines) - 1)]
        return "\n".join(map(wrapped, lines, indents))

    def _repr_html_(self) -> str:
        """The same table for notebooks."""
        heads = ["nats per datum", "mean", "± over the data", "± of the draws"]
        return html(
            heads, self._rows(), above=[f"{self.num_data} data, {self._draws()}"], below=[self._about_weights()]
        )

    def _draws(self) -> str:
        if self.num_local_samples == 1:
            return f"{self.num_samples} draws"
        return f"{self.num_samples} draws of the global latents, {self.num_local_samples} of the local ones for each"

    def compare(self, other: Evaluation) -> dict[str, Difference]:
        """The differences to ``other``: another guide or model on the same data in the same order.

        Data differ far more from each other than two guides do on one datum, so that the error of paired differences is
        much smaller than the difference of two errors.

        Returns:
            A `Difference` by name (``elbo``, ``log_evidence``, ``log_predictive``, ``rate``, ``distortion``).

        Raises:
            BadInput: the evaluations are of different data.
        """
        if not isinstance(other, Evaluation):
            raise BadInput(f"compare takes another Evaluation, got {type(other).__name__}")
        if self.num_data != other.num_data or self._marks != other._marks:
            raise BadInput("these evaluations are of different data: evaluate both guides on the same, in one order")
        found = {}
        for name in LABELS:
            error = math.nan
            if name in self.values and name in other.values:
                error = _mean_and_error(self.values[name] - other.values[name])[1]
            drawn = math.hypot(getattr(self, f"{name}_mc_se"), getattr(other, f"{name}_mc_se"))
            found[name] = Difference(getattr(self, name) - getattr(other, name), error, drawn)
        return found

    @cached_property
    def information(self) -> Information:
        """KL, activity and mutual information, see :func:`.information.information`.

        They take further runs on first access, with the current parameters.
        """
        if self._ask is None:
            raise BadInput(
                "this evaluation does not know its programs (a pickle leaves them behind): call "
                "gumbo.inference.posterior.information.information"
            )
        return self._ask()

    @property
    def kl(self) -> dict[str, torch.Tensor]:
        """KL of the guide to the prior, in nats, by latent site and dimension."""
        return self.information.kl

    @property
    def active_units(self) -> dict[str, torch.Tensor]:
        """Which latent dimensions vary with the data, by site."""
        return self.information.active_units

    @property
    def mutual_information(self) -> float | None:
        """Mutual information of data and local latents in nats; None if the guide's density is unknown."""
        return self.information.mutual_information


@holds_to_annotations()
def evaluate(
    model: Callable,
    guide: Callable,
    data: object,
    *,
    num_samples: int = 100,
    num_local_samples: int | None = None,
    batch_size: int | None = None,
    seed: int | None = 0,
    plate: str | None = None,
    processes: ProcessGroup | None = None,
    progress: bool | None = None,
    compile: bool = False,
) -> Evaluation:
    """The ELBO and the importance-weighted evidence of a model and guide on ``data``, in nats per datum.

    Serves any Pyro pair whose guide draws all latents. The *data plate* encloses all observed sites, and has as many
    elements as the first tensor has rows, or else a later one; if no tensor fits, it is the plate that holds latents.
    ``plate`` names it where several fit. Its size is the number of data; a subsampled one is visited in full. Each
    datum's log-weight is summed over all other dimensions, without the plate's subsampling scale. A relaxed pair with a
    discrete form is evaluated in that form.

    Latents outside that plate are global (the weights of a regression): their KL is divided equally among the data (for
    a batch under a larger plate, among all data of the plate) and is part of the ELBO and the rate. The evidence is
    then that of all data together divided by their number, ``∫ p(g) ∏ p(x_n | g) dg``, by importance weights of the
    draws of g; it is reported if their Pareto k̂ is below min(1 − 1/log₁₀ S, 0.7) (Vehtari et al. 2024,
    arXiv:1507.02646). It is NaN with a reason otherwise, for a batch of a larger plate, and for a guide that is a
    point. ``log_predictive`` is the predictive density of each datum. All rows are passed at once.

    Where the guide draws the latents of all data jointly, or no plate encloses the data, there is one weight for all
    data: ``log_evidence`` is that of all data over N under the same rule, and its error (without a plate, every error)
    is that of the draws.

    Networks run in evaluation mode without gradients; parameters, param store, seeds and training flags do not change,
    and the same ``seed`` gives the same numbers.

    Args:
        model: the Pyro model.
        guide: the Pyro guide; it draws every latent of the model.
        data: the arguments of both programs: a tuple holds the positional arguments, a mapping the keywords, anything
            else is the single argument; tensors with as many rows as the data plate are cut into batches, others are
            passed whole.
        num_samples: draws of the latents of each datum; with global latents, of these.
        num_local_samples: draws of the local latents per draw of the global ones, if there are both. None: 64, or 1
            where draws cannot be vectorized.
        batch_size: rows per batch, where the programs accept batches; the draws depend on it. None: 64 to 1,024,
            more for fewer draws.
        seed: of the draws; None draws from the current random state.
        plate: the name of the data plate.
        processes: several processes, which must all make this call, share the batches; all return the numbers of a
            single process.
        progress: True shows progress on standard error, False does not; None shows it above two million log-weights.
        compile: compile the runs over full batches to one graph, as ``fit(compile=True)`` compiles its step. It takes
            some seconds and pays for many draws. Programs that no graph stands for run uncompiled, with a warning that
            says why.

    Returns:
        An `Evaluation`: numbers in nats per datum, both kinds of standard errors, and each datum's own values.

    Raises:
        BadInput: empty data, NaN, a latent that only one program draws, a draw outside a prior's support.

    >>> import pyro, pyro.distributions as dist
    >>> def model(x):
    ...     with pyro.plate("data", len(x)):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    >>> def exact_posterior(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> x = torch.tensor([0.3, -1.2])
    >>> truth = dist.Normal(0.0, 2**0.5).log_prob(x).mean()
    >>> found = evaluate(model, exact_posterior, x, num_samples=5)
    >>> bool(torch.isclose(torch.tensor(found.log_evidence), truth)), abs(found.elbo - found.log_evidence) < 1e-5
    (True, True)
    """
    evaluator = Evaluator(
        model,
        guide,
        data,
        num_samples=num_samples,
        num_local_samples=num_local_samples,
        batch_size=batch_size,
        plate=plate,
        compiler=provided_compiler() if compile else None,
    )
    evaluator.warn_of_weights(stacklevel=3)
    found = evaluator(seed, processes, progress)
    if evaluator.uncompiled:
        warnings.warn(f"evaluate runs uncompiled: {evaluator.uncompiled}", GumboWarning, stacklevel=3)
    return found


class Evaluator:
    """`evaluate` for a pair of programs and data any number of times, with the parameters that the pair then has.

    The arguments are those of `evaluate`. The structure of the programs is found once, and again where a
    later call meets other sites or plates, as of a model that grows while it is trained. ``compiler`` makes fast
    functions of the runs over full batches; `uncompiled` says why there are none.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        data: object,
        *,
        num_samples: int = 100,
        num_local_samples: int | None = None,
        batch_size: int | None = None,
        plate: str | None = None,
        compiler: Compiler | None = None,
    ):
        if num_local_samples is not None and num_local_samples < 1:
            raise BadInput(f"num_local_samples is {num_local_samples}: expected at least 1")
        self.model, self.guide, self.data, self.plate = model, guide, data, plate
        self._weigh = lambda: Weighing(model, guide, data, num_samples, batch_size, plate, num_local_samples, compiler)
        self._weighing = self._weigh()
        self._used = False

    @property
    def uncompiled(self) -> str:
        """Why the runs are not compiled although that was asked for; empty otherwise."""
        return self._weighing.uncompiled

    def warn_of_weights(self, stacklevel: int) -> None:
        """Warn of sites of the guide whose draws have no right importance weight."""
        self._weighing.sweep.warn_of_weights(stacklevel + 1)

    def __call__(
        self, seed: int | None = 0, processes: ProcessGroup | None = None, progress: bool | None = None
    ) -> Evaluation:
        """The evaluation at the current parameters."""
        if processes is not None and seed is None:
            raise BadInput("several processes need a seed to draw what one process would: pass seed=")
        known, self._used = self._used, True
        if known and self._weighing.relaxed:
            self._weighing = self._weigh()  # the discrete form may hold copies of parameters
        try:
            return self._evaluation(seed, processes, progress)
        except VaryingSites:
            if not known:
                raise
            self._weighing = self._weigh()  # the programs have other sites or plates than in an earlier call
            return self._evaluation(seed, processes, progress)

    def _evaluation(self, seed: int | None, processes: ProcessGroup | None, progress: bool | None) -> Evaluation:
        weighing = self._weighing
        draws = weighing.num_samples
        if progress is None:
            progress = draws * len(weighing.rows) > _QUIET
        loud = progress and (processes is None or processes.rank == 0)
        independent = weighing.one_weight == ""
        with bar(loud, "evaluate", weighing.num_runs) as shown:
            pieces = weighing.pieces(seed, processes, _summary if independent else dict, shown)
        if independent:
            numbers, values = _of_independent(weighing, pieces)
        else:
            numbers, values = _of_dependent(weighing, weighing.together(pieces))
        rows, (model, guide, plate) = weighing.rows, (self.model, self.guide, self.plate)

        def ask() -> Information:
            from .information import information

            with private_seed(None, model, guide):
                pair = exact_pair(model, guide)
            return information(*pair, self.data, seed=seed, plate=plate)

        return Evaluation(
            **numbers,
            num_samples=draws,
            num_local_samples=weighing.num_local_samples,
            values=values,
            _marks=_marks_of(rows),
            _ask=ask,
            _together=weighing.one_weight == "globals",
        )


Numbers = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _terms(parts: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The log-weights and the quantities whose means are reported, each ``(S, N)``."""
    log_weight = parts["log_prior"] + parts["log_likelihood"] - parts["log_q"]
    return log_weight, {
        "elbo": log_weight + parts["log_global"],
        "rate": parts["log_q"] - parts["log_prior"] - parts["log_global"],
        "distortion": -parts["log_likelihood"],
    }


def _summary(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is needed of a batch of independent data: each datum's means over draws and their variances, ``(B,)``."""
    log_weight, terms = _terms(parts)
    draws = len(log_weight)
    found = {name: value.mean(0) for name, value in terms.items()}
    found["log_predictive"] = torch.logsumexp(log_weight, 0) - math.log(draws)
    if draws > 1:
        if draws >= FEW:
            found["dominated"] = (log_weight.amax(0) - found["log_predictive"] > math.log(draws / 2)).double()
        terms["log_predictive"] = log_weight.sub_(found["log_predictive"]).exp_()
        found |= {f"{name} variance": value.var(0) for name, value in terms.items()}
    return found


def _of_independent(weighing: Weighing, pieces: list[dict[str, torch.Tensor]]) -> Numbers:
    """The numbers where each datum has a weight of its own, and each datum's values."""
    found = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    values = {name: value for name, value in found.items() if not name.endswith(" variance")}
    count = len(values["elbo"])
    numbers: dict[str, Any] = {"num_data": count, "reason": weighing.no_evidence(count, False)}
    if "dominated" in values:
        numbers["dominated"] = values.pop("dominated").mean().item()
    for name, value in values.items():
        numbers[name], numbers[f"{name}_se"] = _mean_and_error(value)
        variance = found.get(f"{name} variance")
        mc_se = math.nan if variance is None else math.sqrt(variance.sum().item() / weighing.num_samples) / count
        numbers[f"{name}_mc_se"] = mc_se
    if numbers["reason"]:
        return numbers | {"log_evidence": math.nan, "log_evidence_se": math.nan}, values
    values["log_evidence"] = values["log_predictive"]
    return numbers | {f"log_evidence{end}": numbers[f"log_predictive{end}"] for end in ("", "_se", "_mc_se")}, values


def _of_dependent(weighing: Weighing, parts: Mapping[str, torch.Tensor]) -> Numbers:
    """The numbers where data share draws, and each datum's values."""
    log_weight, terms = _terms(parts)
    count = log_weight.shape[1]
    told_apart = weighing.one_weight != "all"
    numbers: dict[str, Any] = {"num_data": count}
    values: dict[str, torch.Tensor] = {}
    for name, value in terms.items():
        # By datum over draws; where data have no weights of their own, by draw.
        numbers[name], numbers[f"{name}_se"] = _mean_and_error(value.mean(0 if told_apart else 1))
        numbers[f"{name}_mc_se"] = _error_of_draws(value)
        if told_apart:
            values[name] = value.mean(0)
    if weighing.one_weight == "globals":
        values["log_predictive"] = torch.logsumexp(log_weight, 0) - math.log(weighing.num_samples)
        numbers["log_predictive"], numbers["log_predictive_se"] = _mean_and_error(values["log_predictive"])
        numbers["log_predictive_mc_se"] = _error_of_draws((log_weight - values["log_predictive"]).exp())
    return numbers | _evidence_together(weighing, parts, terms["elbo"]), values


def _evidence_together(
    weighing: Weighing, parts: Mapping[str, torch.Tensor], log_weight: torch.Tensor
) -> dict[str, Any]:
    """The evidence of all data together divided by their number, from one weight per draw."""
    count = log_weight.shape[1]
    total = log_weight.sum(1)
    if "integrated" in parts:
        total = (parts["integrated"] + parts["log_global"]).sum(1)
    if reason := weighing.no_evidence(count, bool(parts["log_global"].any())):
        return {"log_evidence": math.nan, "log_evidence_se": math.nan, "reason": reason}
    found = joint_evidence(total.numpy(), weighing.rounding(largest_of(total.numpy())))
    more = ""
    if found.reason:
        more = "; the ELBO is a lower bound"
        if weighing.one_weight == "globals" and weighing.num_local_samples > 1:
            more = f", with {weighing.num_local_samples} draws of the local latents for each" + more
    error = found.mc_se / count
    return {
        "log_evidence": found.value / count,
        "log_evidence_se": error,
        "log_evidence_mc_se": error,
        "khat": found.khat,
        "reason": found.reason + more,
    }


def _marks_of(rows: Rows) -> tuple:
    """A fingerprint of the data and their order: two sums of each tensor."""
    found = []
    for tensor in rows.tensors():
        if tensor.dim():
            pieces = (piece.reshape(len(piece), -1).sum(1) for piece in pieces_of(tensor.detach()))
            by_row = torch.cat(list(pieces)).cpu().double().nan_to_num()
            found.append((tuple(tensor.shape), by_row.sum().item(), (by_row * torch.arange(len(by_row))).sum().item()))
    return tuple(found)


def _mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return values.mean().item(), error


def _error_of_draws(values: torch.Tensor) -> float:
    """The standard error of the mean of ``(S, N)`` over draws that the data share."""
    draws = len(values)
    return math.nan if draws < 2 else values.mean(1).std().item() / math.sqrt(draws)
