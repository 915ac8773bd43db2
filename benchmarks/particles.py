"""Vectorized particles against a hand-written version of the same estimator.

    python benchmarks/particles.py [--batch-size 128] [--particles 8] [--rounds 60] [--no-validation]

Leave-one-out gradients of a 200-unit Bernoulli VAE on 28 × 28 images: SiteELBO("rloo", num_particles=K) against the
same estimator written out in PyTorch for the same two networks, both with torch.optim.Adam. Prints medians and ratio.
"""

from __future__ import annotations

import argparse

import pyro
import torch
import torch.nn.functional as F
from _timing import interleaved, machine, median

from gumbo.guides import BernoulliGuide
from gumbo.inference import SiteELBO
from gumbo.models import BernoulliVAE


def by_hand(model, guide, x, particles):
    """−ELBO of K particles with a leave-one-out baseline, as one would write it without Pyro."""
    flat = x.flatten(1)

    def log_bernoulli(logits, value):
        return -F.binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)

    def loss():
        logits = guide.encoder_heads["z"](guide.encoder(x))
        with torch.no_grad():
            z = torch.bernoulli(logits.sigmoid().expand(particles, *logits.shape))
        log_q = log_bernoulli(logits.expand_as(z), z)
        prior = log_bernoulli(model.decoder_prior_logits.expand_as(z), z)
        log_p = prior + log_bernoulli(model.decoder(z), flat.expand(particles, *flat.shape))
        cost = (log_p - log_q).detach()
        baseline = (cost.sum(0) - cost) / (particles - 1)
        value = cost.sum() / particles
        surrogate = (log_p + (cost - baseline) * log_q).sum() / particles
        return -(value + surrogate - surrogate.detach())

    return loss


def step(loss, parameters):
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def run():
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--no-validation", action="store_true", help="as by hand: nothing looks at the values")
    options = parser.parse_args()
    if options.no_validation:
        pyro.enable_validation(False)
    torch.manual_seed(0)
    x = (torch.rand(options.batch_size, 1, 28, 28) > 0.5).float()

    def pair():
        torch.manual_seed(1)
        model = BernoulliVAE((1, 28, 28), num_latents=200)
        return model, BernoulliGuide(model)

    model, guide = pair()
    ours = SiteELBO("rloo", num_particles=options.particles)(model, guide).initialize(x)
    hand_model, hand_guide = pair()
    hand = by_hand(hand_model, hand_guide, x, options.particles)
    torch.manual_seed(2)
    a = ours(x)
    torch.manual_seed(2)
    b = hand()
    # The same draws must give the same loss and gradients, or the comparison would mean nothing.
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    a.backward()
    b.backward()
    for p, q in zip(
        [*model.parameters(), *guide.parameters()], [*hand_model.parameters(), *hand_guide.parameters()], strict=True
    ):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)
    times = interleaved(
        {
            "by hand": step(hand, [*hand_model.parameters(), *hand_guide.parameters()]),
            "gumbo": step(lambda: ours(x), ours.parameters()),
        },
        options.rounds,
    )
    print(f"rloo, K = {options.particles}, batch {options.batch_size}; {machine()}")
    for name, values in times.items():
        print(f"{name:>8}: {median(values):8.2f} ms a step (fastest {min(values):.2f})")
    print(f"   ratio: {median(times['gumbo']) / median(times['by hand']):8.3f}")


if __name__ == "__main__":
    main()
