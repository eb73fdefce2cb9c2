"""Together: the gradients of many samples by one forward and one backward pass.

`torch.vmap` makes of the loss of one sample the losses of many. Where a weight multiplies, or is
looked up, the inputs are kept; when the outgoing gradient comes back, each sample's gradient is
formed, added to a sum, and forgotten: no two are held. A weight that is read in any other way
becomes a copy for every sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from .uses import Add, Conv1D, Dense, Linear, LookUp, Part, Use, accumulate

COPIES = 1 << 28  # bytes of weights' copies in a pass, at most


class Unsuited(RuntimeError):
    """One pass cannot do what the loss does, or the model; sample by sample it may be done."""


class Parted(Unsuited):
    """Samples go different ways; ``groups`` are the numbers of those that go the same."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        super().__init__("samples go different ways")
        self.groups = groups


class Pass(TorchFunctionMode):
    """One pass over some samples: a mode that sees every use of a weight.

    Parameters
    ----------
    sums
        ``{parameter: sum}``.
    add
        ``add(sum, gradient)`` adds to a sum, in place, what is asked of a sample's gradient, entry
        by entry; a zero adds nothing.
    size
        Number of samples.
    """

    def __init__(self, sums: Mapping[Any, Tensor], add: Add, size: int) -> None:
        super().__init__()
        self.sums, self.add, self.size = sums, add, size
        self.uses = dict.fromkeys(sums, 0)
        self.parts: dict[Any, list[Part]] = {p: [] for p in sums}
        self.copies: dict[Any, Tensor] = {}
        # Inputs may need no gradient: by this one, every use is on the backward's way.
        self.root = torch.zeros((), requires_grad=True, device="cpu")
        self.number: Any = None  # of the one sample that a vmapped function sees

    def losses(self, loss: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
        """The losses of all samples, by a function of one sample's tensors.

        Parameters
        ----------
        loss
            A function of tensors whose first dimension is 1, the sample's.
        tensors
            Each (size, ...).

        Returns
        -------
        Tensor
            (size, *shape of a loss).

        Raises
        ------
        Parted
            If Python is told different things of different samples.
        Exception
            Whatever else a loss raises that cannot be vmapped.
        """

        def of_one(number: Tensor, *own: Tensor) -> Tensor:
            self.number = number
            with self:
                return loss(*(tensor.unsqueeze(0) for tensor in own))

        numbers = torch.arange(self.size, device=tensors[0].device)
        with warnings.catch_warnings():  # of what vmap does one by one: slower, and right
            warnings.filterwarnings("ignore", "There is a performance drop")
            found = torch.vmap(of_one, randomness="error")(numbers, *tensors)
        nodes, seen = [found.grad_fn], set[Any]()
        while nodes:
            if (node := nodes.pop()) is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
        if any(getattr(node, "variable", None) in self.sums for node in seen):
            raise Unsuited("a weight is read by what is no function of torch")
        return found

    def add_gradients(self, losses: Tensor) -> None:
        """Add every sample's gradients to the sums."""
        leaves = [self.root, *self.copies.values()]
        _, *found = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        for p, gradients in zip(self.copies, found, strict=True):
            if gradients is not None:
                self.parts[p].append(Dense(gradients))
        for p in list(self.parts):
            self.finish(p, self.parts.pop(p))

    def note(self, use: Use, x: Tensor, g: Tensor) -> None:
        """Keep what a use adds to its weight's gradients, and add them to the sum at the last."""
        for p, part in use.parts(x.unflatten(0, (self.size, -1)), g.unflatten(0, (self.size, -1))):
            if p in self.sums:
                self.parts[p].append(part)
                if len(self.parts[p]) == self.uses[p] and p not in self.copies:
                    self.finish(p, self.parts.pop(p))

    def finish(self, p: Any, parts: Sequence[Part]) -> None:
        """Add the gradients of a weight, of which all uses are known, to its sum."""
        accumulate(self.sums[p], parts, self.add)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What a function of torch gives, where a weight may be in its arguments."""
        kwargs = kwargs or {}
        rule = RULES.get(function)
        if rule is not None and (found := rule(self, *args, **kwargs)) is not None:
            return found
        if function in TELLS:
            return self._told(function, *args, **kwargs)
        if function not in PLAIN:
            args, kwargs = tree_map_only(nn.Parameter, self._copy, (args, kwargs))
        return function(*args, **kwargs)

    def _copy(self, p: Any) -> Tensor:
        return self.together(lambda: self._copies(p)) if p in self.sums else p

    def _copies(self, p: Any) -> Tensor:
        if p not in self.copies:
            self.copies[p] = p.detach().expand(self.size, *p.shape).requires_grad_()
            if sum(copy.numel() * copy.element_size() for copy in self.copies.values()) > COPIES:
                raise Unsuited("too many weights are read in a way that takes copies")
        return self.copies[p]

    def _told(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What a function tells Python, or gives in a shape of its own, if all samples agree."""
        seen = list[Tensor]()

        def look(every: Tensor) -> Tensor:
            seen.append(every.detach())
            return every

        self.together(look, tensor)
        (own,) = seen
        kinds, which = own.reshape(self.size, -1).unique(dim=0, return_inverse=True)
        if len(kinds) > 1:
            raise Parted([(which == kind).nonzero()[:, 0] for kind in range(len(kinds))])
        return function(own[0], *args, **kwargs)

    def together(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """``function(*tensors of all samples)``, of which the one sample gets its part."""
        return _Together.apply(function, self.number, *tensors)

    def used(self, use: Use, x: Tensor) -> Tensor:
        """What comes out of a use of a weight."""
        for p in (use.weight, use.bias):
            if p in self.sums:
                self.uses[p] += 1

        def of_all(x: Tensor) -> Tensor:
            shape = x.shape[: x.dim() - use.width]
            # (samples and tokens, features) in and out: of a view, nothing could be done in place.
            found = _Use.apply(self.root, x.reshape(-1, *x.shape[len(shape) :]), self, use)
            return found.view(*shape, found.shape[-1])

        return self.together(of_all, x)


class _Together(Function):
    """A function of all samples' tensors, called where there seems to be one sample."""

    @staticmethod
    def forward(function: Any, number: Any, *tensors: Any) -> Any:
        raise Unsuited("a weight is used after the pass")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing to keep."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, number: Any, *tensors: Any) -> Any:
        """The rule of `torch.vmap`; what is the same for all samples is repeated."""
        if in_dims[1] is None:
            raise Unsuited("a weight is used in a transform of the loss's own")
        every = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        )
        return function(*every), 0


class _Use(Function):
    """A use of a weight, which gets no gradient here."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, x: Tensor, one: Pass, use: Use) -> Tensor:
        ctx.save_for_backward(x)
        ctx.one, ctx.use = one, use
        return use.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,), (g,) = ctx.saved_tensors, gradients
        ctx.one.note(ctx.use, x, g)
        return None, ctx.use.backward(g) if ctx.needs_input_grad[1] else None, None, None


def _linear(one: Pass, x: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    return one.used(Linear(weight, bias), x) if weight in one.sums else None


def _addmm(one: Pass, bias: Any, x: Tensor, weight: Any, **options: Any) -> Tensor | None:
    plain = weight in one.sums and bias.dim() == 1 and not options
    return one.used(Conv1D(weight, bias), x) if plain else None


def _embedding(
    one: Pass,
    numbers: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if max_norm is not None or scale_grad_by_freq:
        raise Unsuited("an embedding looks at all numbers")
    return one.used(LookUp(weight, padding_idx), numbers) if weight in one.sums else None


def _attention(
    one: Pass,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor | None:
    """One fused call for all samples; under `vmap` it would be taken to pieces."""
    if query.dim() != 4 or dropout_p:
        return None
    attend: Any = functional.scaled_dot_product_attention
    tensors = [query, key, value]
    if attn_mask is not None:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        tensors.append(mask.expand(len(query), -1, -1, -1))

    def of_all(*every: Tensor) -> Tensor:
        found = attend(*(each.flatten(0, 1) for each in every), is_causal=is_causal, **options)
        return found.unflatten(0, every[0].shape[:2])

    return one.together(of_all, *tensors)


_T: Any = torch.Tensor
TELLS = {
    *(_T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.item, _T.tolist),
    *(torch.nonzero, _T.nonzero, torch.unique, _T.unique),
    *(torch.unique_consecutive, _T.unique_consecutive),
}
PLAIN = {  # what is read of a weight without its values
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "ndim")),
    *(getattr(_T, name) for name in ("size", "dim", "numel", "element_size", "is_floating_point")),
}
RULES: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    functional.scaled_dot_product_attention: _attention,
    torch.addmm: _addmm,
}
