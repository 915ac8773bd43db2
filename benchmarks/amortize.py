"""`amortize` beside AutoNormal and AutoStructured on twelve programs that are not the collection's.

    python benchmarks/amortize.py [--only "state space"] [--steps 400] [--out RESULTS.json] [--page]

The programs are those of tests/helpers/own_programs.py. Each guide is fitted by the same steps of Adam, of the same
number of particles, to all data at once; sites that a model marks are summed out by TraceEnum_ELBO for every guide.
The reference is a closed form or a quadrature where a program has one. Elsewhere the marginals are those of a long run
of NUTS, and log p comes from importance sampling with a Student t distribution that has the run's mean and covariance
in unconstrained space; its standard error stands beside it.

For each guide: the bound with its standard error, beside log p; the largest error of a posterior mean, in posterior
standard deviations, and the root mean square; the same of the logarithm of the standard deviations; and whether
`diagnose` alarms (under ``--diagnose``), beside whether the reference says that it should: a mean off by half a
standard deviation or a standard deviation off by a third. Results come program by program into the JSON file;
``--page`` writes its table into docs/your-own-program.md. The status is 1 where the bound of an amortized guide under
"faithful" lies more than two standard errors below AutoNormal's.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal, AutoStructured
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam.strategies import AutoReparam

from gumbo.guides import amortize
from gumbo.inference import diagnose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from own_programs import PROGRAMS, Own  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "amortize.json"
REFERENCES = ROOT / "benchmarks" / "results" / "amortize_references.json"
PAGE = ROOT / "docs" / "your-own-program.md"
WORDS = ("mean-field", "faithful", "full")
GUIDES = ("AutoNormal", "AutoStructured", *WORDS)
PARTICLES, FINAL = 8, 1000
PARAMETERS_FASTER = 4  # networks fail at the learning rate that suits autoguides, which have none
MEAN_OFF, SCALE_OFF = 0.5, math.log(1.5)


def latents(own: Own) -> dict[str, torch.Tensor]:
    """Every latent site that is drawn, with one value of it."""
    trace = poutine.trace(own.model).get_trace(*own.args)
    return {
        name: site["value"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
        and not site["infer"].get("enumerate")
    }


# ---- the reference


CHAINS, QUANTILES = 4, (0.05, 0.5, 0.95)


def reference(name: str, own: Own) -> dict:
    """log p, its standard error, and mean and standard deviation of every number of every site."""
    if own.exact is not None:
        evidence, moments = own.exact()
        return {"kind": "exact", "log_p": evidence, "se": 0.0, "moments": moments}
    kept = json.loads(REFERENCES.read_text()).get(name) if REFERENCES.exists() else None
    if kept is None:
        return {"kind": "none", "log_p": math.nan, "se": 0.0, "moments": {}}
    moments = {
        site: tuple(torch.tensor(found[part]).reshape(found["shape"]) for part in ("mean", "sd"))
        for site, found in kept["sites"].items()
    }
    return {"kind": "NUTS", "log_p": kept["log_p"], "se": kept["se"], "moments": moments}


def long_run(own: Own, warmup: int, draws: int) -> dict:
    """Four chains of NUTS: convergence, and moments and quantiles of every number of every site."""
    import arviz as az
    import numpy as np

    chains, sites = [], list(latents(own))
    model = AutoReparam(centered=0.0)(own.model) if own.funnel else own.model
    for chain in range(CHAINS):
        pyro.set_rng_seed(chain)
        kernel = NUTS(model, jit_compile=True, ignore_jit_warnings=True, max_tree_depth=7)
        run = MCMC(kernel, draws, warmup_steps=warmup, disable_progbar=True)
        run.run(*own.args)
        drawn = run.get_samples()
        chains.append(Predictive(model, drawn, return_sites=sites)(*own.args) if own.funnel else drawn)
    samples = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    arrays = az.from_dict(posterior={name: value.numpy() for name, value in samples.items()})
    together = {name: value.flatten(0, 1) for name, value in samples.items()}
    evidence, error, khat = evidence_by_importance(own, together)
    kept = {}
    for name, value in together.items():
        flat = value.reshape(len(value), -1).double().numpy()
        kept[name] = {"shape": list(value.shape[1:])} | {
            part: [float(f"{number:.5g}") for number in numbers]
            for part, numbers in (
                ("mean", flat.mean(0)),
                ("sd", flat.std(0)),
                *((f"q{100 * q:02.0f}", np.quantile(flat, q, 0)) for q in QUANTILES),
            )
        }
    worst = {
        "rhat": max(float(found.max()) for found in az.rhat(arrays).values()),
        "bulk_ess": min(float(found.min()) for found in az.ess(arrays, method="bulk").values()),
    }
    return {"log_p": evidence, "se": error, "khat": khat, **worst, "chains": CHAINS, "draws": draws, "sites": kept}


def evidence_by_importance(own: Own, samples: dict[str, torch.Tensor], count: int = 1500) -> tuple[float, float, float]:
    """log p by importance sampling from a t distribution around NUTS draws, in unconstrained space."""
    import arviz as az

    _, potential, transforms, _ = initialize_model(own.model, own.args, jit_compile=True, skip_jit_warnings=True)
    free = {name: transforms[name](value) if name in transforms else value for name, value in samples.items()}
    flat = torch.cat([value.reshape(len(value), -1) for value in free.values()], -1).double()
    mean, size = flat.mean(0), flat.shape[1]
    covariance = torch.cov(flat.T).reshape(size, size) * 1.1 + 1e-8 * torch.eye(size).double()
    proposal = pyro.distributions.MultivariateStudentT(
        torch.tensor(7.0).double(), mean, torch.linalg.cholesky(covariance * 5 / 7)
    )
    draws = proposal.sample((count,))
    shapes = [(name, value.shape[1:]) for name, value in free.items()]
    weights = []
    for draw in draws.float():
        parts, place = {}, 0
        for name, shape in shapes:
            parts[name] = draw[place : place + math.prod(shape)].reshape(shape)
            place += math.prod(shape)
        weights.append(-potential(parts).detach())
    weights = torch.stack(weights).double() - proposal.log_prob(draws)
    log_p = weights.logsumexp(0) - math.log(count)
    ratio = (weights - log_p).exp()
    _, khat = az.psislw(weights.numpy())
    return float(log_p), float(ratio.std() / math.sqrt(count)), float(khat)


# ---- the guides


def make(name: str, own: Own):
    if name in WORDS:
        return amortize(own.model, *own.args, dependencies=name, quiet=True)
    drawn = list(latents(own))
    kind = {"AutoNormal": AutoNormal, "AutoStructured": AutoStructured}[name]
    guide = kind(poutine.block(own.model, expose=drawn) if own.summed else own.model)
    guide(*own.args)
    return guide


def loss_of(own: Own, particles: int):
    kind = TraceEnum_ELBO if own.summed else Trace_ELBO
    options = {"num_particles": particles, "vectorize_particles": own.vectorizes}
    return kind(max_plate_nesting=3, **options) if own.summed else kind(**options)


def fit(own: Own, guide, steps: int, lr: float) -> None:
    loss = loss_of(own, PARTICLES if own.vectorizes else 2)(own.model, guide)
    loss(*own.args)
    optimizer = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*own.args).backward()
        optimizer.step()
        schedule.step()


def bound(own: Own, guide, draws: int) -> tuple[float, float]:
    """The bound and its standard error."""
    size = 50 if own.vectorizes else 1
    loss = loss_of(own, size)
    with torch.no_grad():
        values = torch.tensor([-loss.loss(own.model, guide, *own.args) for _ in range(draws // size)])
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def errors(own: Own, guide, truth: dict, draws: int) -> dict[str, float]:
    """Errors of means in posterior standard deviations, and of the logarithms of standard deviations."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in latents(own)}
    with torch.no_grad():
        for _ in range(draws):
            drawn = poutine.trace(guide).get_trace(*own.args).nodes
            for name in found:
                found[name].append(drawn[name]["value"])
    means, scales = [], []
    for name, values in found.items():
        mean, scale = (part.flatten() for part in truth["moments"][name])
        drawn = torch.stack(values).reshape(draws, -1)
        means.append((drawn.mean(0) - mean).abs() / scale)
        scales.append((drawn.std(0) / scale).log().abs())
    mean, scale = torch.cat(means), torch.cat(scales)
    return {
        "mean_rms": float(mean.square().mean().sqrt()),
        "mean_max": float(mean.max()),
        "scale_rms": float(scale.square().mean().sqrt()),
        "scale_max": float(scale.max()),
    }


def judged(own: Own, guide) -> dict:
    try:
        report = diagnose(
            own.model, guide, *own.args, refine_steps=0, num_simulations=40, num_samples=1000, progress=False
        )
    except Exception as error:
        return {"alarms": None, "why": str(error).splitlines()[0]}
    return {"alarms": report.alarms, "cannot_say": report.cannot_say}


def measure(name: str, own: Own, row: dict, options: argparse.Namespace, save: Callable[[], None]) -> None:
    """Fill the row of one program: what is asked for is measured anew, the rest kept."""
    truth = reference(name, own)
    row |= {"reference": truth["kind"], "log_p": truth["log_p"], "log_p_se": truth["se"]}
    print(f"{name}: {truth['kind']} log p {truth['log_p']:.2f} ± {truth['se']:.2f}", flush=True)
    row.setdefault("guides", {})
    for kind in options.guides or GUIDES:
        pyro.set_rng_seed(1)
        start = time.perf_counter()
        with pyro.get_param_store().scope():
            guide = make(kind, own)
            fit(own, guide, options.steps, options.lr * (1 if kind in WORDS else PARAMETERS_FASTER))
            seconds = time.perf_counter() - start
            value, error = bound(own, guide, FINAL)
            one: dict = {"elbo": value, "se": error, "seconds": seconds}
            if truth["moments"]:
                one |= errors(own, guide, truth, 300)
                one["should_alarm"] = one["mean_max"] > MEAN_OFF or one["scale_max"] > SCALE_OFF
            if options.diagnose and kind in WORDS:
                one["diagnose"] = judged(own, guide)
        row["guides"][kind] = one
        save()
        print(f"  {kind:15} {value:9.3f} ± {error:.3f}  {one.get('diagnose', '')}  {seconds:.0f} s", flush=True)


def refer(options: argparse.Namespace) -> int:
    """Write the long runs; 1 where one has not converged."""
    found = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
    for name, own in PROGRAMS.items():
        if own.exact is None and (not options.only or name in options.only):
            start = time.perf_counter()
            with pyro.get_param_store().scope():
                run = found[name] = long_run(own, options.warmup, options.draws)
            ordered = {each: found[each] for each in PROGRAMS if each in found}
            REFERENCES.write_text(
                "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in ordered.items()) + "\n}\n"
            )
            print(
                f"{name}: log p {run['log_p']:.3f} ± {run['se']:.3f} (k̂ {run['khat']:.2f}), R̂ {run['rhat']:.4f}, bulk"
                f" ESS {run['bulk_ess']:.0f}, {time.perf_counter() - start:.0f} s",
                flush=True,
            )
    return int(any(run["rhat"] >= 1.01 or run["bulk_ess"] <= 1000 for run in found.values()))


def write(path: Path, rows: dict) -> None:
    ordered = {each: rows[each] for each in PROGRAMS if each in rows}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def falls_short(row: dict) -> bool:
    """Whether the bound of the faithful guide lies more than two standard errors below AutoNormal's."""
    ours, auto = row["guides"].get("faithful"), row["guides"].get("AutoNormal")
    return bool(ours and auto) and ours["elbo"] < auto["elbo"] - 2 * math.hypot(ours["se"], auto["se"])


def table(rows: dict[str, dict]) -> str:
    heads = ["program", "log p", *GUIDES, "mean, sd off: AutoNormal", "faithful", "`diagnose` of faithful (wanted)"]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 2) + " --- |"]
    for name, row in rows.items():
        guides, known = row["guides"], row.get("reference", "none") != "none"
        bounds = [f"{g['elbo']:.2f} ± {g['se']:.2f}" if (g := guides.get(kind)) else "–" for kind in GUIDES]
        off = []
        for kind in ("AutoNormal", "faithful"):
            one = guides.get(kind, {})
            off.append(f"{one['mean_rms']:.2f}, {one['scale_rms']:.2f}" if "mean_rms" in one else "–")
        found = guides.get("faithful", {})
        alarms = (found.get("diagnose") or {}).get("alarms")
        said = "–" if alarms is None else ", ".join(alarms) or "no alarm"
        wanted = {True: "alarm", False: "none", None: "–"}[found.get("should_alarm")]
        log_p = f"{row['log_p']:.2f}" if known else "–"
        log_p += f" ± {row['log_p_se']:.2f}" if known and row["log_p_se"] else ""
        cells = [f"{name} ({row['reference']})" if known else name, log_p, *bounds, *off, f"{said} ({wanted})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="a program's name; may be given again")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--references", action="store_true", help="only run NUTS where there is no closed form")
    parser.add_argument("--warmup", type=int, default=300, help="steps of each of the four chains of NUTS")
    parser.add_argument("--draws", type=int, default=600)
    parser.add_argument("--guides", nargs="*", choices=GUIDES, help="by default all")
    parser.add_argument("--diagnose", action="store_true", help="also ask `diagnose` about the amortized guides")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", action="store_true", help="only write the table of the results into the page")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.references:
        return refer(options)
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    if not options.page:
        for name, own in sorted(PROGRAMS.items(), key=lambda item: item[1].exact is None):  # the quick ones first
            if not options.only or name in options.only:
                measure(name, own, rows.setdefault(name, {}), options, lambda: write(options.out, rows))
    rows = {each: rows[each] for each in PROGRAMS if each in rows}
    print(table(rows))
    if options.page:
        text = PAGE.read_text()
        new = f"<!-- amortize -->\n{table(rows)}\n<!-- end -->"
        PAGE.write_text(re.sub(r"<!-- amortize -->.*?<!-- end -->", lambda _: new, text, flags=re.S))
    return 1 if any(falls_short(row) for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
