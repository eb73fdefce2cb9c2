"""Two processes that torchrun starts: Trainer and accelerate train as one process.

Only trained values travel.
"""

import os
import subprocess
import sys

import torch

SCRIPT = '''
import os, sys
import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification
from transformers import Trainer, TrainerCallback, TrainingArguments
import selective_lite as sl

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(os.environ.get("RANK", 0))
world = int(os.environ.get("WORLD_SIZE", 1))
torch.manual_seed(0)
config = BertConfig(vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
                    intermediate_size=20, max_position_embeddings=16, num_labels=3,
                    hidden_dropout_prob=0, attention_probs_dropout_prob=0)
model = BertForSequenceClassification(config).double()
ids, labels = torch.randint(1, 53, (16, 7)), torch.randint(0, 3, (16,))
examples = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels)]
before, selection = sl.snapshot(model), sl.select(sl.random_scores(model, 0), 200)

class Wire(TorchDispatchMode):
    """Every tensor that a collective operation takes, by the operation's name."""
    sent = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            lists = [a if isinstance(a, (list, tuple)) else [a] for a in args]
            tensors = [t for a in lists for t in a if torch.is_tensor(t)]
            self.sent.append((func.overloadpacket.__name__, sum(t.numel() for t in tensors)))
        return func(*args, **(kwargs or {}))

class Listen(TrainerCallback):
    """From the third step on: in the second DDP also agrees on how gradients go together."""
    def on_step_begin(self, args, state, control, **rest):
        if state.global_step == 2:
            self.wire = Wire()
            self.wire.__enter__()
    def on_step_end(self, args, state, control, **rest):
        if state.global_step == 4:
            self.wire.__exit__(None, None, None)

with sl.masked(model, selection, dense=("classifier",)) as training:
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=4 // world, learning_rate=1e-2,
        weight_decay=0.1, max_grad_norm=0.5, train_sampling_strategy="sequential",
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        ddp_broadcast_buffers=sys.argv[2] == "buffers",
        logging_strategy="no", ddp_find_unused_parameters=False)
    trainer = Trainer(model, arguments, train_dataset=examples, callbacks=[Listen()])
    trainer.model_accepts_loss_kwargs = False  # a loss is its batch's mean
    trainer.train()
    trained = sum(p.numel() for p in (*training.parameters(), *training.dense_parameters()))
torch.save({"before": before, "after": sl.snapshot(model), "masks": selection.masks(),
            "sent": Wire.sent, "trained": trained}, f"{folder}/{world}-{rank}.pt")
'''


def run(folder, processes, buffers):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        if processes > 1
        else []
    )
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, *launch, str(folder / "script.py"), str(folder), buffers]
    done = subprocess.run(
        command,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]


def test_two_processes_train_as_one_and_only_trained_values_travel(tmp_path):
    first, second = run(tmp_path, 2, "home")
    (alone,) = run(tmp_path, 1, "home")
    for name, before in alone["before"].items():
        assert torch.equal(first["after"][name], second["after"][name])
        torch.testing.assert_close(
            first["after"][name], alone["after"][name], rtol=1e-9, atol=1e-12
        )
        if not name.startswith("classifier"):
            mask = alone["masks"][name]
            assert torch.equal(first["after"][name][~mask], before[~mask])
    gradients = [count for name, count in first["sent"] if name == "allreduce_"]
    assert sum(gradients) == 2 * first["trained"]  # two steps were listened to
    # and nothing else was sent
    assert first["sent"] == [("allreduce_", count) for count in gradients]
