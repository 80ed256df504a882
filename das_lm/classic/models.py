"""A multilayer perceptron with one head, or one for every task."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from das_lm.errors import UserError, did_you_mean
from das_lm.randomness import addressed_seed

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Module):
    """
    Linear layers with an activation after each (`body`), and a linear layer per head (`heads`): methods tell the
    parameters of the heads from those of the feature extractor by these names.

    The parameters are a function of (seed, name of the parameter) alone, drawn as torch draws those of `nn.Linear`,
    U(−1/√inputs, 1/√inputs). The global random state plays no part, and the body is the same under any heads.

    Args:
        sizes: width of the inputs, then of every hidden layer.
        heads: outputs of the only head, or a list with the outputs of every head.
        seed: of the parameters.
        activation: `"relu"`, `"tanh"` or `"gelu"`.

    Raises:
        UserError: a size that is no positive number, no head, or an unknown activation.
    """

    def __init__(self, sizes: Sequence[int], heads: int | Sequence[int], seed: int = 0, activation: str = "relu"):
        super().__init__()
        widths = [heads] if isinstance(heads, int) else list(heads)
        if not sizes or not widths or min(*sizes, *widths) < 1:
            raise UserError(f"MLP: sizes {list(sizes)} with heads {widths}: write widths of 1 or more, and one head")
        if activation not in ACTIVATIONS:
            raise UserError(f"MLP: there is no activation '{activation}'.{did_you_mean(activation, ACTIVATIONS)}")
        layers = [(skip_init(nn.Linear, *pair), ACTIVATIONS[activation]()) for pair in itertools.pairwise(sizes)]
        self.body = nn.Sequential(*itertools.chain.from_iterable(layers))
        self.heads = nn.ModuleList(skip_init(nn.Linear, sizes[-1], width) for width in widths)
        self._initialise(seed)
        # Row t: where the outputs of head t stand among those of all heads; past its width, the padding after them.
        ends = list(itertools.accumulate(widths))
        places = torch.full((len(widths), max(widths)), ends[-1])
        for place, width, end in zip(places, widths, ends, strict=True):
            place[:width] = torch.arange(end - width, end)
        self.register_buffer("places", places, persistent=False)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        for layer_name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                for name, parameter in layer.named_parameters():
                    generator = torch.Generator().manual_seed(addressed_seed(seed, f"{layer_name}.{name}"))
                    bound = layer.in_features**-0.5
                    parameter.uniform_(-bound, bound, generator=generator)

    def features(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs, shape [rows, inputs] -> what the heads read, [rows, features]."""
        return self.body(inputs)

    def head_logits(self, inputs: torch.Tensor, task: int) -> torch.Tensor:
        """The outputs of one head on any inputs, without padding: shape [rows, outputs of that head]."""
        return self.heads[task](self.features(inputs))

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor | None = None, task: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            inputs: shape [rows, inputs].
            labels: shape [rows]: classes (int64), for the mean cross-entropy, or numbers, for the mean squared error.
            task: the head of every row, int64 of shape [rows]; a batch may mix them. One head needs none.

        Returns:
            `logits`, shape [rows, outputs of the widest head], and with labels their `loss`. The logits of a narrower
            head are padded with the lowest number there is: cross-entropy sees a probability of exactly zero.

        Raises:
            UserError: several heads and no `task`.
        """
        features = self.features(inputs)
        if len(self.heads) == 1:
            logits = self.heads[0](features)
        elif task is None:
            raise UserError(f"the model has {len(self.heads)} heads; give `task`, the head of every row")
        else:
            outputs = torch.cat([head(features) for head in self.heads], dim=1)
            padding = outputs.new_full((len(outputs), 1), torch.finfo(outputs.dtype).min)
            logits = torch.cat([outputs, padding], dim=1).gather(1, self.places[task])
        if labels is None:
            return {"logits": logits}
        if labels.is_floating_point():
            loss = F.mse_loss(logits, labels.view_as(logits))
        else:
            loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}
