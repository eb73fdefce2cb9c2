"""The optimizer of the authors' transformers, with which several parity tests step."""

import math

import torch


class AuthorsAdamW(torch.optim.Optimizer):
    """AdamW with eps outside the bias correction, and decay of every weight last."""

    def __init__(self, groups, *, lr=1e-3, eps):
        super().__init__(groups, {"lr": lr, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                state["m"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["v"].mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
                rate = (
                    group["lr"] * math.sqrt(1 - 0.999 ** state["step"]) / (1 - 0.9 ** state["step"])
                )
                p.addcdiv_(state["m"], state["v"].sqrt() + group["eps"], value=-rate)
                p.add_(p, alpha=-group["lr"] * group["weight_decay"])
