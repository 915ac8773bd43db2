"""Convergence without validation data: a test for stationary iterates, and their average.

At a constant learning rate the iterates of stochastic optimization become stationary. The test compares the last
windows by the largest R̂ over coordinates, and takes the best of several windows; later iterates are averaged until the
Monte Carlo error of the average is small (Dhaka et al. 2020, arXiv:2009.00666; Welandawe et al. 2022,
arXiv:2203.15945).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..engine.rows import spaced

STATIONARY = 1.1  # the largest R̂ of stationary iterates
ADRIFT = 1.2  # the R̂ of averaged iterates above which the average is restarted
ENOUGH = 50.0  # the smallest effective number of iterates in the average, in every coordinate
TOLERANCE = 0.02  # the largest Monte Carlo standard error, in units of max(1, |average|)
SHORTEST = 200  # iterates in the shortest window
WINDOWS = (0.2, 0.4, 0.6, 0.8, 0.95)  # the windows tried, as fractions of all iterates
KEPT = 1000  # the most iterates stored; beyond it every second one is dropped
WATCHED = 2000  # the most coordinates watched, spread evenly over all parameters


def split_rhat(iterates: Tensor) -> Tensor:
    """R̂ of each coordinate ``(C,)`` of ``(n, C)`` iterates: the first half against the second.

    A coordinate that never changes has R̂ 1; one that changes only between the halves has infinity.

    >>> still, drifting = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, 0.1, 1.0, 1.1])
    >>> [round(one, 3) for one in split_rhat(torch.stack([still, drifting], 1)).tolist()]
    [0.707, 10.025]
    """
    half = len(iterates) // 2
    halves = torch.stack([iterates[-2 * half : -half], iterates[-half:]]).double()
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    ratio = (half - 1) / half + between / within
    return torch.where((within == 0) & (between == 0), torch.ones_like(ratio), ratio).sqrt()


def effective_number(iterates: Tensor) -> Tensor:
    """The effective sample size of ``(n, C)`` autocorrelated iterates by coordinate: n / Σ autocorrelations.

    The sum ends where the sum of two neighbouring autocorrelations is not positive (Geyer 1992). A coordinate that
    never changes has n.

    >>> draws = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    >>> 3000 < effective_number(draws).item() <= 4000
    True
    """
    count = len(iterates)
    centred = iterates.double() - iterates.double().mean(0)
    size = 2 ** math.ceil(math.log2(2 * count))
    spectrum = torch.fft.rfft(centred, n=size, dim=0)
    covariance = torch.fft.irfft(spectrum.abs() ** 2, n=size, dim=0)[:count]
    still = covariance[0] <= 0
    correlation = covariance / covariance[0].clamp_min(torch.finfo(torch.float64).tiny)
    pairs = correlation[: count - count % 2].reshape(-1, 2, correlation.shape[1]).sum(1)
    positive = (pairs > 0).cummin(0).values
    time = (2 * (pairs * positive).sum(0) - 1).clamp_min(1 / count)
    return torch.where(still, torch.full_like(time, count), (count / time).clamp_max(count))


class Convergence:
    """Tests the iterates of a run for convergence; :meth:`state` has everything that it stores.

    Args:
        parameters: the trained parameters by name.

    Attributes: ``converged``; ``numbers`` of the last test: ``rhat``, and once iterates are averaged ``mcse`` (the
    largest of any coordinate) and ``ess`` (the smallest); ``said``, the message of the last test.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        self.parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        sizes = [p.numel() for p in self.parameters.values()]
        total = sum(sizes)
        watched = spaced(total, min(WATCHED, total)).unique()
        ends = torch.tensor([0, *sizes]).cumsum(0)
        self._places = [
            watched[(watched >= start) & (watched < end)] - start
            for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]
        self._names = [
            name for name, places in zip(self.parameters, self._places, strict=True) for _ in range(len(places))
        ]
        self.converged, self.numbers, self.said = False, {}, ""  # type: ignore[var-annotated]
        self.verdict = f"fewer than {SHORTEST} steps were watched"
        self._stride, self._steps, self._looked, self._step = 1, 0, 0, 0
        self._kept: list[Tensor] = []
        self._average: dict[str, Tensor] = {}
        self._averaged = 0

    def after_step(self) -> None:
        """Record the parameters after a step."""
        self._step += 1
        self._steps += 1
        with torch.no_grad():
            if self._average:
                self._averaged += 1
                for name, parameter in self.parameters.items():
                    self._average[name] += (parameter.double() - self._average[name]) / self._averaged
            if self._steps % self._stride:
                return
            flat = zip(self.parameters.values(), self._places, strict=True)
            self._kept.append(torch.cat([p.detach().flatten()[places.to(p.device)].cpu() for p, places in flat]))
        if len(self._kept) > KEPT:
            self._kept, self._stride = self._kept[1::2], 2 * self._stride

    def forget(self) -> None:
        """Drop all iterates: the objective was still changing."""
        self._kept, self._stride, self._steps, self._looked, self._average, self._averaged = [], 1, 0, 0, {}, 0

    def look(self) -> None:
        """Test for convergence, when there are a tenth more iterates than at the last test."""
        self.said = ""
        if self.converged or self._steps < max(SHORTEST, 1.1 * self._looked):
            return
        self._looked = self._steps
        iterates = torch.stack(self._kept)
        if self._average:
            self._look_at_the_average(iterates)
        else:
            self._look_for_a_window(iterates)
        self.verdict = self.said

    def _look_for_a_window(self, iterates: Tensor) -> None:
        shortest = max(4, SHORTEST // self._stride)
        sizes = sorted({max(shortest, int(part * len(iterates))) for part in WINDOWS})
        found = [(self._worst(split_rhat(iterates[-size:])), size) for size in sizes if size <= len(iterates)]
        (best, where), window = min(found)
        self.numbers = {"rhat": best}
        if best <= STATIONARY:
            self.said = (
                f"stationary at step {self._step}: largest R̂ {best:.3f} over the last {window * self._stride} steps; "
                "their average begins here"
            )
            self.forget()
            self._average = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.parameters.items()}
        else:
            self.said = f"not stationary at step {self._step}: largest R̂ {best:.3f}, of {where}"

    def _look_at_the_average(self, iterates: Tensor) -> None:
        rhat, where = self._worst(split_rhat(iterates))
        ess = effective_number(iterates)
        error = iterates.double().std(0) / ess.sqrt()
        relative = error / iterates.double().mean(0).abs().clamp_min(1.0)
        self.numbers = {"rhat": rhat, "mcse": relative.max().item(), "ess": ess.min().item()}
        numbers = (
            f"average of {self._averaged} steps, largest R̂ {rhat:.3f}, largest Monte Carlo standard error "
            f"{self.numbers['mcse']:.3g} of max(1, |average|), smallest effective number {self.numbers['ess']:.0f}"
        )
        if rhat > ADRIFT:
            self.said = f"adrift at step {self._step}: {numbers}, of {where}; the average restarts"
            self.forget()
        elif self.numbers["mcse"] <= TOLERANCE and self.numbers["ess"] >= ENOUGH:
            self.said, self.converged = f"converged at step {self._step}: {numbers}", True
        else:
            self.said = f"averaging at step {self._step}: {numbers}"

    def _worst(self, rhat: Tensor) -> tuple[float, str]:
        place = int(rhat.nan_to_num(math.inf).argmax())
        return rhat.nan_to_num(math.inf)[place].item(), repr(self._names[place])

    def take_average(self) -> None:
        """Set the parameters to the average of their iterates."""
        with torch.no_grad():
            for name, average in self._average.items():
                self.parameters[name].copy_(average)

    def state(self) -> dict[str, Any]:
        """The stored state, as tensors and plain values."""
        return {
            "kept": torch.stack(self._kept) if self._kept else None,
            "average": dict(self._average),
            "counts": [self._stride, self._steps, self._looked, self._step, self._averaged],
            "numbers": dict(self.numbers),
            "converged": self.converged,
            "verdict": self.verdict,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._kept = [] if state["kept"] is None else list(state["kept"].cpu())
        devices = {name: parameter.device for name, parameter in self.parameters.items()}
        self._average = {name: value.to(devices[name]).clone() for name, value in state["average"].items()}
        self._stride, self._steps, self._looked, self._step, self._averaged = state["counts"]
        self.numbers, self.converged, self.verdict = dict(state["numbers"]), state["converged"], state["verdict"]


__all__ = ["Convergence", "effective_number", "split_rhat"]
