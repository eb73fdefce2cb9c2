"""Per sample: gradients of samples, added one by one, or many in a pass where that gives the same.

One by one is the reference. A pass is tried first, on two copies of one sample: if it cannot be
done, or does not give the double of what the sample gave alone, samples stay alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from .together import Parted, Pass, Unsuited
from .uses import Add, Part, accumulate

SAVED = 1 << 29  # bytes that a pass keeps for its backward, as far as one sample tells
MOST = 32  # samples in a pass
APART = {torch.float64: 1e-6, torch.float32: 1e-2}  # rounding, relative; less exact types: 0.2
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Join = Callable[[Sequence[Tensor]], Any]  # a batch, of its tensors


def add_gradients(loss: Tensor, sums: Mapping[Any, Tensor], add: Add) -> None:
    """Add what is asked of the gradients of one loss to sums, holding no two of them.

    ``.grad`` is left alone. What computed the loss may have taken gradients, too: they are not
    added.
    """
    with ExitStack() as hooks:
        for p, total in sums.items():
            hooks.enter_context(p.register_hook(partial(_add, add, total)))
        torch.autograd.grad(loss, list(sums), allow_unused=True)


def _add(add: Add, total: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Add a gradient to a sum, and drop it as soon as it is complete."""
    if gradient is None:
        return None
    sparse = gradient.is_sparse
    add(total, (gradient.to_dense() if sparse else gradient).to(total.dtype))
    # What autograd holds in its place: one zero.
    return None if sparse else gradient.new_zeros(()).expand_as(gradient)


class Samples:
    """Adds what is asked of each sample's gradients to sums.

    Parameters
    ----------
    model
        The model.
    loss
        ``(model, batch) -> scalar``.
    sums
        ``{parameter: zeros}``.
    add
        ``add(sum, gradient)``, entry by entry, in place.
    alone
        What adds the gradients of a batch as those of one sample.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        sums: Mapping[Any, Tensor],
        add: Add,
        alone: Callable[[Any], None],
    ) -> None:
        self.model, self.loss, self.sums, self.add, self.alone = model, loss, sums, add, alone
        self.together: bool | None = None  # None until the first sample was seen
        self.entries, self.saved = 0, 0  # of the first sample, and bytes that it has a pass keep

    def __call__(self, tensors: Sequence[Tensor], join: Join) -> None:
        """Add the samples of a batch.

        Parameters
        ----------
        tensors
            The batch's tensors, each with the sample in its first dimension.
        join
            A batch, made of such tensors.
        """
        size, start = len(tensors[0]), 0
        if self.together is None:
            start, self.together = 1, False
            self._add([tensor[:1] for tensor in tensors], join)
            self.together = size > 1 and not _has_more(self.model) and self._agrees(tensors, join)
        step = self._step(tensors)
        for first in range(start, size, step):
            self._add([tensor[first : first + step] for tensor in tensors], join)

    def _step(self, tensors: Sequence[Tensor]) -> int:
        """How many samples of a batch one pass takes; attention grows with the length's square."""
        longer = max(1.0, _entries(tensors) / max(1, self.entries)) ** 2
        return max(1, min(MOST, int(SAVED / max(1.0, self.saved * longer))))

    def _agrees(self, tensors: Sequence[Tensor], join: Join) -> bool:
        """Whether a pass over the first sample, twice, gives the double of the sums."""
        kept = dict[int, int]()

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        one = _Trial(self.sums, self.add, 2)
        try:
            with _state_kept(self.model), saved_tensors_hooks(keep, lambda tensor: tensor):
                twice = [tensor[:1].expand(2, *tensor.shape[1:]) for tensor in tensors]
                losses = one.losses(self._loss_of(join), twice)
            if not _plain(losses, 2):
                return False
            one.add_gradients(losses)
        except Exception:  # whatever it is: if it is one alone, too, it is raised there
            return False
        for p in self.sums:
            kept.pop(p.untyped_storage().data_ptr(), None)
        self.entries, self.saved = _entries(tensors), sum(kept.values()) // 2
        return True

    def _loss_of(self, join: Join) -> Callable[..., Tensor]:
        return lambda *tensors: self.loss(self.model, join(tensors))

    def _add(self, tensors: Sequence[Tensor], join: Join) -> None:
        size = len(tensors[0])
        if size > 1 and self.together:
            one = Pass(self.sums, self.add, size)
            try:
                with _state_kept(self.model):
                    losses = one.losses(self._loss_of(join), tensors)
            except Parted as parted:
                self.together = size < 4 or len(parted.groups) < size  # or it helps nowhere
                for group in parted.groups:
                    self._add([tensor[group] for tensor in tensors], join)
                return
            except Exception:
                self.together = False
            else:
                if _plain(losses, size):
                    one.add_gradients(losses)
                    return
        for sample in range(size):  # with its own error, if it has one
            self.alone(join([tensor[sample : sample + 1] for tensor in tensors]))


class _Trial(Pass):
    """A pass over one sample twice, that compares what it finds with sums over the one."""

    @cached_property
    def typical(self) -> float:
        """The largest mean of a sum: what rounding is measured by where a gradient should be 0."""
        return max(float(total.abs().mean()) for total in self.sums.values())

    def finish(self, p: Any, parts: Sequence[Part]) -> None:
        """Raise unless the parts give the double of a sum."""
        total, found = self.sums[p], torch.zeros_like(self.sums[p])
        accumulate(found, parts, self.add)
        size = 2 * total.abs().sum() + 1e-4 * self.typical * total.numel()
        if not (found - 2 * total).abs().sum() <= APART.get(p.dtype, 0.2) * size:
            raise Unsuited("a pass does not give what a sample gives alone")


def _entries(tensors: Sequence[Tensor]) -> int:
    return sum(tensor[0].numel() for tensor in tensors)


def _plain(losses: Any, size: int) -> bool:
    """Whether there is one finite loss a sample, with a gradient."""
    scalar = torch.is_tensor(losses) and losses.numel() == size and losses.requires_grad
    return scalar and bool(torch.isfinite(losses).all())


def _has_more(model: nn.Module) -> bool:
    """Whether a model runs what others have put around its modules: they expect tensors."""
    kinds = (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel)
    return any(
        isinstance(module, kinds)
        or type(module).__name__ == "OptimizedModule"
        or any(getattr(module, hooks) for hooks in HOOKS)
        for module in model.modules()
    )


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """A block after which modules hold what they held: what a pass has cached is of no use."""
    held = [(d, dict(d)) for m in model.modules() for d in (vars(m), m._buffers)]
    try:
        yield
    finally:
        for now, before in held:
            if now.keys() != before.keys() or any(now[key] is not before[key] for key in before):
                now.clear()
                now.update(before)
