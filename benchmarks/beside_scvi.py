"""scVI's own bound beside NegativeBinomialVAE's on the same cells.

    python benchmarks/beside_scvi.py [--seeds 2] [--epochs 60]

Needs ``scvi-tools``, which no extra of gumbo installs. Writes ``benchmarks/results/collection/scvi.md``, which the page
of the model quotes. Runs on one thread.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from _timing import machine
from collection import FOLDER, Columns, seeded, true_evidence

from gumbo.experiments.data import CELL_LIBRARY, load
from gumbo.guides import MeanFieldGuide
from gumbo.inference import SiteELBO, evaluate, fit
from gumbo.models import NegativeBinomialVAE
from gumbo.tables import markdown

RATE, BATCH, DRAWS = 3e-3, 100, 100


def scvi_row(found: Columns, train: torch.Tensor, test: torch.Tensor, seed: int, epochs: int) -> None:
    """scVI with the sizes of ours: a perceptron of one layer of 64, two latents, a latent library."""
    import scvi
    from anndata import AnnData

    scvi.settings.seed = seed
    seen, held = (AnnData(rows.numpy().astype(np.float32)) for rows in (train, test))
    scvi.model.SCVI.setup_anndata(seen)
    model = scvi.model.SCVI(
        seen, n_latent=2, n_hidden=64, n_layers=1, dropout_rate=0.0, gene_likelihood="nb", use_observed_lib_size=False
    )
    with found.timed():
        model.train(
            epochs, accelerator="cpu", batch_size=BATCH, train_size=1.0, enable_progress_bar=False, logger=False,
            plan_kwargs={"lr": RATE, "n_epochs_kl_warmup": 1},
        )  # fmt: skip
    bounds = [-abs(float(model.get_elbo(held))) for _ in range(5)]  # a draw each; its sign differs between versions
    found.add(elbo=float(np.mean(bounds)))
    found.add(evidence=-abs(float(model.get_marginal_ll(held, n_mc_samples=DRAWS))))


def our_row(found: Columns, train: torch.Tensor, test: torch.Tensor, seed: int, epochs: int) -> None:
    model = NegativeBinomialVAE(
        (60,), latent_dim=2, library="latent", library_loc=CELL_LIBRARY[0], library_sd=CELL_LIBRARY[1], hidden=(64,)
    )
    guide = MeanFieldGuide(model, hidden=(64,))
    with found.timed():
        fit(
            model, guide, train, loss=SiteELBO("pathwise"), lr=RATE, batch_size=BATCH, epochs=epochs, seed=seed,
            progress=False,
        )  # fmt: skip
    judged = evaluate(model, guide, test, num_samples=DRAWS)
    found.add(elbo=judged.elbo, evidence=judged.log_evidence)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=60)
    given = parser.parse_args()
    import scvi

    torch.set_num_threads(1)
    data = load("cells")
    train, test = data.train.squeeze(1), data.test.squeeze(1)
    rows = [["truth", "", f"{true_evidence(test).mean():.2f}", ""]]
    named = {f"scVI (scvi-tools {scvi.__version__})": scvi_row, "NegativeBinomialVAE": our_row}
    for name, train_one in named.items():
        found = Columns()
        for seed in seeded(given.seeds):
            train_one(found, train, test, seed, given.epochs)
        rows.append([name, *found.cells("elbo", "evidence"), *found.cells("seconds", digits=0)])
    lines = [
        f"`python benchmarks/beside_scvi.py --seeds {given.seeds} --epochs {given.epochs}`:",
        "",
        "The same cells and sizes (one layer of 64, two latents, a latent library, negative binomial counts), batches",
        f"of {BATCH}, Adam at {RATE:g}, {given.epochs} epochs, each model as its library makes it: scVI has batch",
        "normalization and a library prior from the data's own totals, ours is given the law that the cells were made",
        "with, which favours it. Test cells, nats per cell: the ELBO, and log",
        f"p(x) by {DRAWS} importance-weighted draws; seconds of the processor; mean ± standard error over",
        f"{given.seeds} seeds ({machine()}).",
        "",
        *markdown(["model", "ELBO", "log p(x)", "seconds"], rows),
    ]
    (FOLDER / "scvi.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
