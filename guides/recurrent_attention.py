"""The guide of scenes: a recurrent network that attends to one object after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..models._base import GenerativeModel
from ..models._networks import mlp
from ..models.attend_infer_repeat import AttendInferRepeat, glimpse, inverse, presence, safe
from ..models.families import MIN_SD
from ._base import Guide, guides

START = 2.0  # the initial logit of a presence: objects are drawn, and so learned, before they are judged


@guides.register("recurrent-attention")
class RecurrentAttentionGuide(Guide):
    r"""One object after the other: its presence and place, then its look.

    .. math:: q(z \mid x) = \prod_t q(z^{pres}_t, z^{where}_t \mid h_t)\, q(z^{what}_t \mid z^{where}_t, x)

    A GRU of ``rnn_hidden`` reads features of the scene and the object before, and gives the presence and the place of
    the next one; a perceptron reads the window of x at that place, and gives the look. An absent object has the model's
    prior.

    The logit of a presence goes from a constant, probability 0.88, at ``judged`` 0 to the network's at 1, the value of
    this buffer unless a schedule changes it. Windows that learn at 0 do not rely on each other, and the network that
    then learns presences does not start from ones that are near certain.

    Estimators: pathwise for z_where and z_what, and for z_pres any word for coins. ``nvil`` gives each z_pres a
    baseline that sees x and the objects before. ``objects(x)`` and ``count_accuracy(x, counts)`` show what it finds.

    Shapes: as the model's. Raises BadInput for any model but `AttendInferRepeat`.

    Args:
        model: the model, whose latents and data shape the guide takes.
        rnn_hidden: size of the recurrent state.
        hidden: widths of the encoder's hidden layers; None mirrors the model's decoder.
        channels: maps of the encoder's convolutions of stride 2; None mirrors the model's decoder.
        activation: activation of the guide's networks; None mirrors the model's decoder.
        min_sd: smallest standard deviation, added to the softplus of an output.

    Eslami et al. 2016, arXiv:1603.08575.

    >>> import torch
    >>> from gumbo.models import AttendInferRepeat
    >>> model = AttendInferRepeat((1, 12, 12), num_steps=2, window=6, what_dim=4, hidden=(16,))
    >>> guide = RecurrentAttentionGuide(model, rnn_hidden=8)
    >>> draws = guide(torch.rand(3, 1, 12, 12))
    >>> draws["z_where_2"].shape, model.counts(draws).shape
    (torch.Size([3, 3]), torch.Size([3]))
    """

    families = ("bernoulli", "normal")

    def __init__(
        self,
        model: AttendInferRepeat,
        rnn_hidden: int = 100,
        hidden: Sequence[int] | None = None,
        channels: Sequence[int] | None = None,
        activation: str | None = None,
        min_sd: float = MIN_SD,
    ):
        super().__init__(model, hidden, channels, activation)
        self.num_steps, self.window, self.min_sd = model.num_steps, model.window, min_sd
        size = self.latents["z_what_1"].size
        self.encoder_rnn = nn.GRUCell(self.encoder.size + 1 + 3 + size, rnn_hidden)
        self.encoder_start = nn.Parameter(0.1 * torch.randn(rnn_hidden))
        self.encoder_next = nn.Linear(rnn_hidden, 1 + 2 * 3)
        with torch.no_grad():
            self.encoder_next.bias[0] = START
        pixels = self.data_shape[0] * self.window**2
        self.encoder_what = mlp([pixels, *self.layout["hidden"], 2 * size], self.layout["activation"])
        self.register_buffer("judged", torch.ones(()))
        for name in ("where_loc", "where_sd", "what_loc"):
            self.register_buffer(name, getattr(model, name).clone(), persistent=False)

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(model, AttendInferRepeat):
            return "it is no attend-infer-repeat, whose steps the guide follows"
        return super().why_not(model)

    def forward(self, x: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        with self.data_plate(x):
            return self._each_step(x, self.features(x, conditions), pyro.sample)

    def _each_step(
        self, x: Tensor, features: Tensor, choose: Callable[[str, dist.TorchDistribution], Tensor]
    ) -> dict[str, Tensor]:
        """The value of each site, chosen given those before; ``features`` are the scene's, ``(B, F)``."""
        values: dict[str, Tensor] = {}
        state, present = self.encoder_start, self.where_loc.new_ones(1)
        where, what = torch.zeros_like(self.where_loc), self.what_loc
        for t in range(1, self.num_steps + 1):
            state = self._advanced(state, features, present, where, what)
            logit, loc, raw = self.encoder_next(state).split((1, 3, 3), -1)
            logit = torch.lerp(torch.full_like(logit, START), logit, self.judged)
            present = values[f"z_pres_{t}"] = choose(
                f"z_pres_{t}", dist.Bernoulli(logits=presence(logit, present)).to_event(1)
            )
            sd = (softplus(raw) + self.min_sd) * self.where_sd
            where = values[f"z_where_{t}"] = choose(
                f"z_where_{t}", unless_absent(present, self.where_loc + loc, sd, self.where_loc, self.where_sd)
            )
            seen = glimpse(x, inverse(safe(where)), self.window, self.window)
            loc, raw = self.encoder_what(seen.flatten(-3)).chunk(2, -1)
            sd = softplus(raw) + self.min_sd
            what = values[f"z_what_{t}"] = choose(
                f"z_what_{t}", unless_absent(present, loc, sd, self.what_loc, torch.ones_like(self.what_loc))
            )
        return values

    def _advanced(self, state: Tensor, *inputs: Tensor) -> Tensor:
        """The state after a step of the network, which supports one leading dimension only, ``(..., rnn_hidden)``."""
        leading = torch.broadcast_shapes(state.shape[:-1], *(part.shape[:-1] for part in inputs))
        rows = torch.cat([part.expand(*leading, -1) for part in inputs], -1)
        found = self.encoder_rnn(rows.flatten(0, -2), state.expand(*leading, -1).flatten(0, -2))
        return found.unflatten(0, leading)

    @torch.no_grad()
    def objects(self, x: Tensor) -> dict[str, Tensor]:
        """What is most probable, one step after the other: presences of at least one half, and the means of the rest.

        Args:
            x: scenes, ``(B, *data_shape)``.

        Returns:
            The value of each site, ``(B, *shape)``, as a call of the guide returns its draws.
        """
        self.check_batch(x, self._like())
        return self._each_step(x, self.features(x, {}), lambda site, law: most_probable(law))

    def count_accuracy(self, x: Tensor, counts: Tensor) -> float:
        """The share of scenes in which `objects` finds the right number.

        Args:
            x: scenes, ``(B, *data_shape)``.
            counts: their numbers of objects, ``(B,)``.

        Returns:
            A number in [0, 1].

        Raises:
            BadInput: counts of another shape.
        """
        self.check_shape("counts", counts, (len(x),))
        found = self.objects(x)
        present = torch.cat([found[f"z_pres_{t}"] for t in range(1, self.num_steps + 1)], -1)
        return (present.sum(-1) == counts).double().mean().item()


def unless_absent(
    present: Tensor, loc: Tensor, sd: Tensor, prior_loc: Tensor, prior_sd: Tensor
) -> dist.TorchDistribution:
    """N(loc, sd²) of a present object, the prior of an absent one."""
    return dist.Normal(torch.lerp(prior_loc, loc, present), torch.lerp(prior_sd, sd, present)).to_event(1)


def most_probable(law: dist.TorchDistribution) -> Tensor:
    base = law.base_dist
    return (base.logits >= 0).to(base.logits.dtype) if isinstance(base, dist.Bernoulli) else base.mean
