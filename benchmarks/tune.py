"""Learning rates and temperatures of trained cells, by their bound on the validation images after a short run.

Prints, for each cell, rate and temperature, the ELBO and log p(x) by 100 draws, in nats per datum on 1,000 validation
images; the test images are not looked at. Adam starts at the rate and decays to a hundredth of it by a cosine. For
example::

    python benchmarks/tune.py arm "linear/arm" --rates 1e-3 3e-3 --steps 10000
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from gumbo.experiments.reproduction import tables
from gumbo.experiments.reproduction.trained import cosine, train
from gumbo.files import append_line

RESULTS = Path(__file__).parent / "results" / "tune.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="a table of gumbo reproduce that trains")
    parser.add_argument("cells", nargs="+", help="names of its cells")
    parser.add_argument("--rates", nargs="+", default=["3e-4", "1e-3", "3e-3", "1e-2"])
    parser.add_argument("--temperatures", nargs="+", default=[None], help="of a relaxation; the cell's own by default")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for chosen in tables[args.table].chosen(args.cells):
        for rate, warmth in product(args.rates, args.temperatures):
            cell = replace(chosen, lr=cosine(rate), variance=False, temperature=warmth or chosen.temperature)
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                trained = train(cell, args.seed, args.steps, Path(folder), rows=None, compile=True, device="cpu")
            found = trained.numbers
            said = {"table": args.table, "cell": cell.name, "rate": rate, "steps": found["steps"], "seed": args.seed}
            said |= {
                "temperature": cell.temperature,
                "valid": round(found["valid"]["elbo"], 3),
                "log_evidence": round(found["valid"]["log_evidence"], 3),
                "seconds": round(time.perf_counter() - began),
            }
            append_line(RESULTS, json.dumps(said))
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
