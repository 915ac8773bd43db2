"""The guide of state space models: deep Markov, and switching."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..errors import BadInput
from ..models._base import GenerativeModel
from ..models._chains import Couplings, NormalChain
from ..models._sequences import standard_where_masked
from ..models.deep_markov_model import DeepMarkovModel
from ..models.switching_state_space import SwitchingStateSpace
from ._base import AnyGuide, guides


@guides.register("combiner")
class CombinerGuide(AnyGuide):
    r"""A chain that reads the future data: :math:`q(z \mid x) = \prod_t q(z_t \mid z_{t-1}, x_{t:T})`.

    A recurrent network (a GRU of ``rnn_hidden``) reads a sequence from its end to step t; its state h_t and z_{t−1}
    combine into ½ (tanh(W z_{t−1} + b) + h_t), from which linear maps compute mean and standard deviation. With
    ``flows`` above 0 each step's Normal is transformed by that many affine couplings, the same at all steps. Padding
    has no effect.

    For `SwitchingStateSpace`, whose steps are sites of their own, each step's Normal is a site, without couplings.

    Shapes: as the model's; called as ``guide(x, mask=mask)``. Raises BadInput for any other
    model, and for couplings over single steps.

    Args:
        model: the model, whose latents and data shape the guide takes.
        rnn_hidden: size of the recurrent state.
        flows: number of affine couplings of each step.
        flow_hidden: width of the hidden layers of a coupling.
        min_sd: smallest standard deviation, added to the softplus of an output.

    Krishnan, Shalit & Sontag 2017, arXiv:1609.09869; Dinh, Sohl-Dickstein & Bengio 2017, arXiv:1605.08803, for the
    couplings, in place of the inverse autoregressive flows of Pyro's example: they score a given value in one pass.

    >>> import torch
    >>> from gumbo.models import DeepMarkovModel
    >>> model = DeepMarkovModel((6, 4), latent_dim=2, hidden=(8,), transition_hidden=8)
    >>> mask = model.mask_of(torch.tensor([6, 2, 1]))
    >>> CombinerGuide(model, rnn_hidden=8)(torch.zeros(3, 6, 4), mask=mask)["z"].shape
    torch.Size([3, 6, 2])
    """

    families = ("normal",)
    _ranges = {"flows": 0}

    def __init__(
        self,
        model: GenerativeModel,
        rnn_hidden: int = 600,
        flows: int = 0,
        flow_hidden: int = 50,
        min_sd: float = 1e-3,
    ):
        super().__init__(model)
        self.min_sd = min_sd
        self.whole = "z" in self.latents  # one site of all steps
        if flows and not self.whole:
            raise BadInput(
                f"CombinerGuide: flows={flows} serve a chain that is one site; set flows=0 for {type(model).__name__}"
            )
        size, width = next(iter(self.latents.values())).shape[-1], self.data_shape[-1]
        self.encoder_rnn = nn.GRU(width, rnn_hidden, batch_first=True)
        self.encoder_previous = nn.Linear(size, rnn_hidden)
        self.encoder_output = nn.Linear(rnn_hidden, 2 * size)
        self.encoder_start = nn.Parameter(torch.zeros(size))
        self.encoder_flow = Couplings(size, flows, flow_hidden) if flows else None

    @classmethod
    def why_not(cls, model: GenerativeModel) -> str:
        if not isinstance(model, (DeepMarkovModel, SwitchingStateSpace)):
            return "it is no deep Markov model and no switching state space, whose steps the guide follows"
        return super().why_not(model)

    def forward(self, x: Tensor, **conditions: Tensor) -> dict[str, Tensor]:
        with self.data_plate(x):
            (mask,) = self.check_conditions(conditions, len(x))
            future, before, output = self.read(x, mask), self.encoder_previous, self.encoder_output
            states = future.unbind(1)  # once: the gradient of future[:, t] would fill all steps with zeros at each

            def step(previous: Tensor, t: int | slice) -> tuple[Tensor, Tensor]:
                state = future[:, t] if isinstance(t, slice) else states[t]
                combined = (before(previous).tanh() + state) / 2
                loc, raw = output(combined).chunk(2, -1)
                return loc, softplus(raw) + self.min_sd

            if self.whole:
                return {"z": pyro.sample("z", NormalChain(step, self.encoder_start, mask, self.encoder_flow))}
            last, drawn = self.encoder_start, {}
            for t, site in enumerate(self.latents):
                last = drawn[site] = pyro.sample(site, standard_where_masked(*step(last, t), mask[:, t]))
            return drawn

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        """The state of the network at each step t, from x_t ... x_T, ``(B, T, rnn_hidden)``."""
        steps = torch.arange(mask.shape[-1], device=x.device)
        last = mask.sum(-1, keepdim=True).long() - 1
        turned = torch.where(steps <= last, last - steps, steps).unsqueeze(-1)  # its own inverse
        rows = x.flatten(1, -2)
        read, _ = self.encoder_rnn(rows.gather(1, turned.expand(-1, -1, rows.shape[-1])))
        return read.gather(1, turned.expand(-1, -1, read.shape[-1]))
