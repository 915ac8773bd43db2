"""Data and reference moments of posteriors, from a checkout of posteriordb (github.com/stan-dev/posteriordb).

    python benchmarks/posteriordb_references.py POSTERIORDB

It writes `experiments/reproduction/posteriordb.json`: data as posteriordb has them, and of each reference posterior,
10,000 draws of long dynamic HMC runs, the means, standard deviations and quantiles of every parameter, with the largest
R-hat and the smallest effective sample sizes of these draws.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import arviz as az
import numpy as np

from gumbo.experiments.reproduction.programs_of_posteriordb import PROGRAMS

OUT = Path(__file__).resolve().parent.parent / "experiments" / "reproduction" / "posteriordb.json"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def read(path: Path):
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".json")]
        return json.loads(archive.read(name))


def rounded(values) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def reference(draws: list[dict[str, list[float]]]) -> dict:
    """Moments and quantiles by parameter, of chains that are mappings of parameters to draws."""
    found = {}
    for name in draws[0]:
        chains = np.array([chain[name] for chain in draws])
        found[name] = {"mean": float(f"{chains.mean():.6g}"), "sd": float(f"{chains.std():.6g}")}
        found[name]["quantiles"] = rounded(np.quantile(chains, QUANTILES))
    every = az.convert_to_dataset({name: np.array([chain[name] for chain in draws]) for name in draws[0]})
    worst = {"rhat": az.rhat(every).to_array().max(), "ess_bulk": az.ess(every).to_array().min()}
    worst["ess_tail"] = az.ess(every, method="tail").to_array().min()
    return {name: float(f"{float(value):.5g}") for name, value in worst.items()} | {"parameters": found}


def main(folder: str) -> None:
    base = Path(folder) / "posterior_database"
    data, references = {}, {}
    for name in PROGRAMS:
        about = json.loads((base / "posteriors" / f"{name}.json").read_text())
        data[about["data_name"]] = read(base / "data" / "data" / f"{about['data_name']}.json.zip")
        archive = base / "reference_posteriors" / "draws" / "draws" / f"{about['reference_posterior_name']}.json.zip"
        references[name] = {"data": about["data_name"], **reference(read(archive))}
        print(name, {key: references[name][key] for key in ("rhat", "ess_bulk", "ess_tail")})
    lines = [f' "quantiles": {json.dumps(QUANTILES)},', ' "data": {']
    lines += [",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in data.items()), " },"]
    lines += [' "references": {']
    lines += [",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in references.items()), " }"]
    OUT.write_text("\n".join(["{", *lines, "}"]) + "\n")
    print(f"{OUT}: {len(references)} posteriors")


if __name__ == "__main__":
    main(*sys.argv[1:])
