"""Wrappers, copies, pickles, exports: seen through, or refused before anything is trained.

Compiled models: karpathy/nanoGPT#325, MakazhanAlpamys/Soup#335, rasbt/LLMs-from-scratch#580. FSDP:
huggingface/peft#1702, mosaicml/llm-foundry#414, pytorch/pytorch#104690.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import selective_lite as sl
from tests.cases.helpers import (
    assert_clear,
    assert_gradients_agree,
    assert_only_these_moved,
    bert,
    cross_entropy,
    llama,
    mlp,
    refused,
    right_or_refused,
    some_of_each,
    tokens,
    train,
    vectors,
)


def compiled(model):
    return torch.compile(model, backend="eager")


def batch():
    return tokens("classes")


def test_scores_diff_and_apply_see_through_torch_compile():
    """nanoGPT#325, Soup#335, LLMs-from-scratch#580: `_orig_mod.` stood before every name."""
    model = bert()
    before = sl.snapshot(compiled(model))
    assert not any("_orig_mod" in name for name in before)
    assert list(sl.weights(compiled(model))) == list(sl.weights(model))
    assert list(sl.head_weights(compiled(model))) == ["classifier.weight", "classifier.bias"]
    selection = sl.select(sl.squared_gradient(model, [batch()]), 0.02)
    sl.fit(model, sl.fixed_mask(model, selection, lr=1e-2, epochs=2), [batch()])
    delta = sl.diff(before, compiled(model))
    receiver = bert()
    delta.apply(compiled(receiver))
    assert torch.equal(receiver(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("when", ["before masking", "inside masking"])
def test_a_compiled_model_trains_as_one_that_is_not(when):
    """`model = torch.compile(model)` stands in the first or in the last line of the set-up."""
    model, plain = mlp(), mlp()
    selection = some_of_each(plain)
    with sl.masked(plain, selection, head=()) as tuning:
        train(plain, tuning.parameters(), vectors(), cross_entropy)
    fast = compiled(model) if when == "before masking" else None
    if fast is not None:
        fast(vectors()["x"])  # it was used before, in a first evaluation
    with sl.masked(fast or model, selection, head=()) as tuning:
        fast = fast or compiled(model)
        train(fast, tuning.parameters(), vectors(), cross_entropy)
        delta = tuning.delta()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name))
    assert not any("_orig_mod" in name for name in delta.metadata["shapes"])
    torch.testing.assert_close(fast(vectors()["x"]), plain(vectors()["x"]))


@pytest.fixture
def alone():
    """A process group of this process only."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before masking", "inside masking"])
def test_a_model_in_distributed_data_parallel(alone, when):
    """`model = DDP(model)` comes first in most scripts: it is right, or refused."""
    model, plain, ddp = mlp(), mlp(), nn.parallel.DistributedDataParallel
    selection = some_of_each(plain)
    with sl.masked(plain, selection, head=()) as tuning:
        train(plain, tuning.parameters(), vectors(), cross_entropy)
    before = sl.snapshot(model)
    if when == "before masking":
        wrapped = ddp(model)
        assert list(sl.weights(wrapped, ())) == list(sl.weights(model, ()))
        with right_or_refused("DistributedDataParallel", "DDP", "wrap"):
            with sl.masked(wrapped, selection, head=()) as tuning:
                train(wrapped, tuning.parameters(), vectors(), cross_entropy)
            assert list(tuning.delta().metadata["shapes"]) == list(selection.indices)
            assert_only_these_moved(before, model, selection)
            for name, p in model.named_parameters():
                torch.testing.assert_close(p, plain.get_parameter(name))
        return
    with sl.masked(model, selection, head=()) as tuning:
        train(ddp(model), tuning.parameters(), vectors(), cross_entropy)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name))


def test_data_parallel_is_refused():
    """`nn.DataParallel` copies the model at every forward: nothing would be trained."""
    parallel, model = nn.DataParallel(mlp()), mlp()
    for call in (
        lambda: sl.weights(parallel, ()),
        lambda: sl.random_scores(parallel, 0, head=()),
        lambda: sl.masked(parallel, some_of_each(model), head=()),
        lambda: sl.snapshot(parallel),
    ):
        with refused("DataParallel"):
            call()


def test_replicas_of_data_parallel_made_inside_are_refused():
    """Trainer uses DataParallel by itself if it sees two GPUs: what a replica is given."""
    model = mlp()
    with sl.masked(model, some_of_each(model), head=()):
        replica = model[0]._replicate_for_data_parallel()
        with refused("DataParallel"):
            replica.weight = model[0].weight.detach()
            replica(vectors()["x"])


@pytest.mark.parametrize("save", ["state_dict", "close"])
def test_a_model_that_was_fully_sharded_trains_and_is_saved(alone, save):
    """peft#1702, llm-foundry#414: it trained, and could then be neither saved nor written back."""
    model, plain = mlp(), mlp()
    selection = some_of_each(plain)
    shard(model, "fully_shard")
    for each in (model, plain):
        tuning = sl.masked(each, selection, head=())
        train(each, each.parameters(), vectors(), cross_entropy)
        if each is plain or save == "close":
            tuning.close()
    for name, saved in model.state_dict().items():
        assert torch.equal(saved.full_tensor(), plain.get_parameter(name))


@pytest.mark.parametrize(
    ("style", "order"),
    [("FSDP", "mask first"), ("FSDP", "shard first"), ("fully_shard", "mask first")],
)
@pytest.mark.filterwarnings("ignore")
def test_other_orders_and_fsdp1_are_refused_before_training(alone, style, order):
    """Accelerate's FSDP wraps inside of `trainer.train()`, when the model is masked already."""
    model = mlp()
    selection = some_of_each(model)
    with refused("call fully_shard (FSDP2) before masked"):
        if order == "mask first":
            sl.masked(model, selection, head=())
            sharded = shard(model, style)
        else:
            sharded = shard(model, style)
            sl.masked(sharded, selection, head=())
        trained = [p for p in sharded.parameters() if p.requires_grad]
        train(sharded, trained, vectors(), cross_entropy, kind=torch.optim.SGD)


def shard(model, style):
    """A model whose parameters are spread over the processes of its group."""
    if style == "FSDP":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("kind", ["compact", "LoRA"])
def test_a_changed_model_is_pickled_or_says_what_to_do(tmp_path, kind):
    """`torch.save(model)`, spawned processes: `Can't pickle MaskedLinear`."""
    model, x = mlp(), vectors()["x"]
    if kind == "LoRA":
        sl.add_adapters(model, ("0.weight",), kind="lora", rank=2)
        train(model, model.parameters(), vectors(), cross_entropy)
        tuning = None
    else:
        tuning = sl.masked(model, some_of_each(model), head=())
        train(model, tuning.parameters(), vectors(), cross_entropy)
    with right_or_refused("masked", "pickle", "merge"):
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(x), model(x))
    with right_or_refused("masked", "pickle", "merge"):
        torch.save(model, tmp_path / "whole.pt")
        again = torch.load(tmp_path / "whole.pt", weights_only=False)
        assert torch.equal(again(x), model(x))
    if tuning is not None:
        tuning.close()
    assert torch.equal(again(x), model(x))


def test_a_copy_made_inside_is_a_model_of_its_own():
    """`best = copy.deepcopy(model)` for early stopping keeps its values."""
    model, x = bert(), batch()
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        parameters = [*tuning.parameters(), *tuning.dense_parameters()]
        train(model, parameters, x)
        best = copy.deepcopy(model)
        at_best = model.eval()(**x).logits.detach()
        train(model, parameters, x)
        assert torch.equal(best.eval()(**x).logits, at_best)
        assert not torch.equal(model.eval()(**x).logits, at_best)
    assert torch.equal(best(**x).logits, at_best)


def test_the_state_of_a_model_in_masked_training_loads_into_an_ordinary_one():
    """`torch.save(model.state_dict())` in a user's own loop: values of now, own keys."""
    model, ordinary = bert(), bert()
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, [*tuning.parameters(), *tuning.dense_parameters()], batch())
        state = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            inside = model(**batch()).logits
    ordinary.load_state_dict(state)
    assert torch.equal(ordinary(**batch()).logits, inside)


def test_weights_loaded_inside_are_the_ones_that_train():
    """`model.load_state_dict(best)` at the end of training, before the context is left."""
    model, other = bert(), bert(seed=5)
    with sl.masked(model, some_of_each(model, head=None)) as tuning:
        train(model, tuning.parameters(), batch())
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(**batch()).logits, other(**batch()).logits)
    assert torch.equal(model(**batch()).logits, other(**batch()).logits)


EXPORTS = {
    "torch.export": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "torch.jit.trace": lambda m, x: torch.jit.trace(m, x)(x),
    "torch.jit.script": lambda m, x: torch.jit.script(m)(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", EXPORTS)
def test_an_export_inside_masked_training_is_right_or_refused(how):
    """A hook that exports at every checkpoint: stale weights, or an error with internal names."""
    model, x = mlp().eval(), vectors()["x"]
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        train(model, tuning.parameters(), vectors(), cross_entropy)
        try:
            with torch.no_grad():
                found = EXPORTS[how](model, x)
        except Exception as error:
            assert "masked" in str(error) or "selective" in str(error), repr(error)
        else:
            torch.testing.assert_close(found, model(x))
    with torch.no_grad():
        torch.testing.assert_close(EXPORTS[how](model, x), model(x))


def test_torch_func_inside_masked_training_is_right_or_refused():
    """functional_call with the parameters of the model, as meta-learning does."""
    model, x = mlp().double(), vectors()["x"].double()
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        model(x).square().mean().backward()
        true = [p.grad.clone() for p in tuning.parameters()]

        def loss(parameters):
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        try:
            found = torch.func.grad(loss)(own)
        except RuntimeError as error:
            assert any(w in str(error) for w in ("functorch", "masked", "vmap", "transform"))
        else:
            mine = {id(p): found[n] for n, p in own.items()}
            for p, t in zip(tuning.parameters(), true, strict=True):
                torch.testing.assert_close(mine[id(p)], t)


def test_a_base_that_is_offloaded_is_refused():
    """`device_map="auto"` left layers elsewhere: here they are on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    model, selection = bert(), some_of_each(bert())
    accelerate.cpu_offload(model, execution_device="cpu")
    with refused("meta", "offload"):
        sl.masked(model, selection, head=())


def test_a_model_with_hooks_of_accelerate_trains():
    """`device_map=` on one device replaces every layer's `forward` by one with hooks."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = bert(), bert()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    selection = some_of_each(plain)
    results = []
    for each in (model, plain):
        with right_or_refused("forward", "hook"):
            with sl.masked(each, selection, head=()) as tuning:
                train(each, tuning.parameters(), batch())
            results.append(each(**batch()).logits)
    if len(results) == 2:
        torch.testing.assert_close(*results)


class Quantized(nn.Module):
    """A linear layer of 8-bit integers with scales, as quantization libraries have them."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        rounded = (linear.weight.detach() / scale).round().to(torch.int8)
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.rounded * self.scale, self.bias)


class Integers(Quantized):
    """The same with the integers as a parameter, as bitsandbytes has them."""

    def __init__(self, linear):
        super().__init__(linear)
        rounded = self._buffers.pop("rounded")
        self.rounded = nn.Parameter(rounded, requires_grad=False)


class Coded(torch.Tensor):
    """A tensor that claims to be float32 and holds codes, as torchao has them."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)

    def __init__(self, held):
        self.held = held.to(torch.int8)

    def dequantize(self):
        return self.held.float()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].held)
        raise NotImplementedError(f"{function} of codes")


def test_a_tensor_of_codes_is_no_candidate():
    """torchao's int8 weights claim float32: scores raised NotImplementedError."""
    model = mlp()
    model[0].weight = nn.Parameter(Coded(torch.ones(8, 6)), requires_grad=False)
    assert "0.weight" not in sl.weights(model, ())
    assert "2.weight" in sl.weights(model, ())


@pytest.mark.parametrize("kind", [Quantized, Integers])
def test_a_quantized_base_trains_what_floats_remain(kind, path):
    """QLoRA's base: norms, biases and embeddings are floats still, and can be selected."""
    model, fresh = bert(), bert()
    for each in (model, fresh):
        for layer in each.bert.encoder.layer:
            layer.output.dense = kind(layer.output.dense)
    scores = sl.squared_gradient(model, [batch()])
    assert not any("rounded" in name for name in scores)
    before, selection = sl.snapshot(model), sl.select(scores, 0.05)
    with sl.masked(model, selection) as tuning:
        train(model, [p for p in model.parameters() if p.requires_grad], batch())
    assert_only_these_moved(before, model, selection, head=sl.head_weights(model))
    tuning.delta().save(path)
    sl.load(path).apply(fresh)
    assert torch.equal(fresh(**batch()).logits, model(**batch()).logits)


def test_gradient_checkpointing():
    """Long sequences: the forward is run again in the backward."""
    model, plain = llama().train(), llama().train()
    model.gradient_checkpointing_enable()
    selection = some_of_each(model)
    for each in (model, plain):
        with sl.masked(each, selection) as tuning:
            train(each, tuning.parameters(), tokens())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, plain.get_parameter(name))


def test_hooks_of_the_user_run_as_before():
    """Activations are looked at with forward hooks, gradients with backward hooks."""
    model, seen = mlp(), []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        train(model, tuning.parameters(), vectors(), cross_entropy, steps=1)
    model(vectors()["x"])
    assert seen == ["before", "forward", "backward", "before", "forward"]


def test_pruned_layers_keep_their_zeros():
    """torch.nn.utils.prune computes `weight` from `weight_orig` in a hook before every forward."""
    model, x = mlp(), vectors()
    nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    zeros = model[0].weight == 0
    before, selection = sl.snapshot(model), some_of_each(model, 12)
    with sl.masked(model, selection, head=()) as tuning:
        train(model, tuning.parameters(), x, cross_entropy)
        inside = model(x["x"])
    assert torch.equal(model(x["x"]), inside)
    assert (model[0].weight[zeros] == 0).all()
    assert_only_these_moved(before, model, selection)


def test_text_is_generated_inside_as_after():
    """Samples are looked at in every epoch; the cache of keys and values is used."""
    model, ids = llama(), tokens()["input_ids"]
    with sl.masked(model, some_of_each(model, 100)) as tuning:
        train(model, tuning.parameters(), tokens(), lr=0.1)
        inside = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), inside)


def test_a_layer_that_is_called_twice_gets_both_gradients():
    """One layer at two depths, as in ALBERT."""
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 2)).double()
    data = {**vectors(), "x": vectors()["x"].double()}
    assert_gradients_agree(model, some_of_each(model), data, cross_entropy)


def test_a_failed_wrapper_does_not_stop_other_trainings(alone):
    """FSDP was refused, the notebook holds on to its error; another model trains on."""
    broken, model = mlp(), mlp(1)
    open_training = sl.masked(broken, some_of_each(broken), head=())
    with pytest.raises(RuntimeError):
        shard(broken, "FSDP")(vectors()["x"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cross_entropy(model, vectors()).backward()
    optimizer.step()
    assert not open_training.closed


def test_masking_twice_says_to_leave_first():
    """A notebook cell that was run again, after an error in the one before."""
    model = mlp()
    selection = some_of_each(model)
    tuning = sl.masked(model, selection, head=())
    with refused("leave"):
        sl.masked(model, selection, head=())
    tuning.close()
    tuning.close()
    with sl.masked(model, selection, head=()):
        pass


def test_an_error_inside_leaves_an_ordinary_model():
    """Out of memory in the middle of an epoch, and the notebook goes on."""
    model = mlp()
    keys = list(model.state_dict())
    with pytest.raises(KeyError), sl.masked(model, some_of_each(model), head=()):
        raise KeyError("out of memory")
    assert list(model.state_dict()) == keys
    assert all(type(m) in (nn.Sequential, nn.Linear, nn.Tanh) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_scores_of_a_model_in_masked_training_are_refused_or_right():
    """Re-selecting by hand in the middle of training."""
    model = mlp()
    with sl.masked(model, some_of_each(model), head=()) as tuning:
        train(model, tuning.parameters(), vectors(), cross_entropy)
        try:
            inside = sl.squared_gradient(model, [vectors()], loss=cross_entropy, head=())
        except ValueError as error:
            assert_clear(error, ("masked",))
            return
    after = sl.squared_gradient(model, [vectors()], loss=cross_entropy, head=())
    torch.testing.assert_close(inside, after)
