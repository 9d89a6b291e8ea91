"""LoraXSLinear: one layer, over nn.Linear and Conv1D, through everything that happens to a module."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import assert_accurate
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import loraxs_kernels as lx
import loraxs_kernels.route
from loraxs_kernels import LoraXSLinear, attach, backends, forward_together, functional
from loraxs_kernels.naming import FLOATS, dtype_name
from loraxs_kernels.recipe import Recipe
from loraxs_kernels.reference import UnfusedLinear, lowrank_linear, relative_error
from loraxs_kernels.together import joins


def make(kind: str = "linear", dtype: torch.dtype = torch.float32, N: int = 24, K: int = 40, **options) -> LoraXSLinear:
    """A layer with an R large enough to matter."""
    linear = Conv1D(N, K) if kind == "conv1d" else nn.Linear(K, N, bias=kind != "no bias")
    nn.init.normal_(linear.weight, std=K**-0.5)
    layer = LoraXSLinear.from_linear(linear.to(dtype), options.pop("rank", 6), **options)
    nn.init.normal_(layer.R, std=0.3)
    return layer


def dense(layer: LoraXSLinear) -> torch.Tensor:
    """W + s B R A in fp64."""
    W = layer.base_layer.weight.double()
    W = W.T if isinstance(layer.base_layer, Conv1D) else W
    return W + layer.alpha / layer.rank * layer.B.double() @ layer.R.double() @ layer.A.double()


def test_factors_are_the_svd_of_the_weight():
    layer = make(alpha=12)
    U, S, Vh = torch.linalg.svd(layer.base_layer.weight.double(), full_matrices=False)
    torch.testing.assert_close(layer.B.double().abs(), U[:, :6].abs(), atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.A.double().abs(), (S[:6, None] * Vh[:6]).abs(), atol=1e-4, rtol=0)
    fresh = LoraXSLinear.from_linear(nn.Linear(40, 24), 24, init_std=1e-5)
    assert layer.scaling == 2.0 and fresh.scaling == 1.0
    assert 0.7e-5 < fresh.R.std() < 1.3e-5 and fresh.R.dtype == torch.float32 and fresh.R.requires_grad


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients(kind, dtype):
    layer = make(kind, dtype, alpha=9)
    assert layer.R.dtype == torch.promote_types(dtype, torch.float32) and layer.A.dtype == layer.B.dtype == dtype
    x, gY = torch.randn(2, 5, 40, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)

    def run(forward, x, R) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = forward(x)
        return [y, *torch.autograd.grad(y, (x, R), gY.to(y.dtype))]

    oracle_R = layer.R.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.double()
    W = layer.base_layer.weight.double() if kind != "conv1d" else layer.base_layer.weight.double().T
    delta = lambda: layer.scaling * layer.B.double() @ oracle_R @ layer.A.double()  # noqa: E731
    oracle = run(lambda x: F.linear(x, W + delta(), bias), x.double(), oracle_R)
    unfused = copy.deepcopy(layer)
    unfused.R.data = unfused.R.data.to(dtype)
    separate = UnfusedLinear(unfused)
    chain = run(separate, x, separate.lora_latent.weight)
    for name, *three in zip(("y", "gX", "gR"), run(layer, x, layer.R), chain, oracle, strict=True):
        assert_accurate(*three, dtype, name)


@pytest.mark.parametrize("merged", [False, True])
def test_x_may_be_given_by_the_name_that_linear_has_for_it(merged):
    layer, x = make(), torch.randn(3, 40)
    if merged:
        layer.eval().merge()
    assert torch.equal(layer(input=x), layer(x))
    with pytest.raises(TypeError, match=r"linear: got no x, must be a tensor of shape \(\.\.\., 40\)"):
        layer()


def test_hooks_of_all_modules_get_the_output_of_a_base_that_is_called_as_it_was():
    layer, x, seen = make(dropout=0.5), torch.randn(3, 40, requires_grad=True), []
    hooks = nn.modules.module
    with contextlib.ExitStack() as stack:
        for handle in (
            hooks.register_module_forward_hook(lambda module, args, y: seen.append((y, y.detach().clone()))),
            hooks.register_module_full_backward_hook(lambda *_: None),
        ):
            stack.callback(handle.remove)
        layer(x).sum().backward()
    assert len(seen) == 2 and all(torch.equal(y, then) for y, then in seen) and layer.R.grad is not None


def test_opaque_bases_get_the_delta_on_top():
    """A hooked base, one with an overridden forward, one of another class: called as they are, delta added."""
    layer = make()
    x = torch.randn(3, 40)
    expected = layer(x)
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(y.clone()) or y + 1)
    torch.testing.assert_close(layer(x), expected + 1)
    torch.testing.assert_close(seen[0], layer.base_layer(x) - 1)
    handle.remove()
    layer.base_layer.forward = lambda x: F.linear(x, layer.base_layer.weight, layer.base_layer.bias) + 2
    torch.testing.assert_close(layer(x), expected + 2)

    class Quantised(nn.Module):
        """What a quantised layer looks like from outside: integers for a weight, and a forward of its own."""

        def __init__(self, linear):
            super().__init__()
            self.register_buffer("weight", linear.weight.detach().mul(100).round().to(torch.int8))

        def forward(self, x):
            return x @ (self.weight.to(x.dtype) / 100).T

    base = Quantised(layer.base_layer)
    opaque = LoraXSLinear.from_linear(base, 6, init=(layer.A, layer.B))
    nn.init.normal_(opaque.R)
    x.requires_grad_()
    y = opaque(x)
    expected = base(x) + x @ (opaque.B @ opaque.R @ opaque.A).T
    torch.testing.assert_close(y, expected)
    got, right = (torch.autograd.grad(t.square().sum(), (x, opaque.R)) for t in (y, expected))
    for g, r in zip(got, right, strict=True):
        torch.testing.assert_close(g, r)
    with pytest.raises(TypeError, match=r"linear: got a Quantised with a Tensor weight of shape .* dtype torch\.int8"):
        opaque.merge()
    with pytest.raises(TypeError, match=r"module 'q': got a Quantised .* lx\.register_weight_reader can"):
        LoraXSLinear.from_linear(base, 6, name="q")


@pytest.fixture
def fused(monkeypatch):
    """An entry for each pass through the primitive that computed with W, not the delta alone."""
    seen, run = [], loraxs_kernels.route.run

    def counted(x, W, *rest):
        seen.extend([] if W is None else [True])
        return run(x, W, *rest)

    monkeypatch.setattr(loraxs_kernels.route, "run", counted)
    return seen


MOVING = {
    "device": lambda hooks: hooks.AlignDevicesHook("cpu"),
    "and back": lambda hooks: hooks.AlignDevicesHook(torch.device("cpu"), io_same_device=True, place_submodules=True),
    "two": lambda hooks: hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), hooks.AlignDevicesHook(None)),
}


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("hook", MOVING.values(), ids=MOVING)
def test_hooks_of_accelerate_that_only_move_leave_a_layer_fused(fused, hook, kind):
    hooks = pytest.importorskip("accelerate.hooks")
    layer, other = make(kind), make()
    x = torch.randn(3, 40, requires_grad=True)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, layer.R))
    hooks.add_hook_to_module(layer.base_layer, hook(hooks))
    hooks.add_hook_to_module(layer, hook(hooks))  # as dispatch_model after attach does
    fused.clear()
    for each in (layer, copy.deepcopy(layer), torch.compile(layer, backend="eager")):
        assert torch.equal(each(x), expected) and fused.pop() and not fused
    for got, right in zip(torch.autograd.grad(layer(x).square().sum(), (x, layer.R)), gradients, strict=True):
        assert torch.equal(got, right)
    assert joins(layer, x)
    for y, right in zip(forward_together(x, layer, other), separately(x, layer, other), strict=True):
        torch.testing.assert_close(y, right)


def doubling(hooks):
    """A hook of a class that someone has derived from accelerate's."""

    class Double(hooks.AlignDevicesHook):
        def post_forward(self, module, output):
            return 2 * output

    return Double("cpu")


MORE = {
    "offload": lambda hooks: hooks.AlignDevicesHook("cpu", offload=True),
    "of another class": doubling,
    "one of two": lambda hooks: hooks.SequentialHook(hooks.AlignDevicesHook("cpu"), doubling(hooks)),
    "cpu_offload_with_hook": lambda hooks: hooks.CpuOffload("cpu"),
    "of the base class": lambda hooks: hooks.ModelHook(),
}


@pytest.mark.parametrize("hook", MORE.values(), ids=MORE)
def test_hooks_that_do_more_are_called(fused, hook):
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = make(), torch.randn(3, 40)
    base, delta = layer.base_layer(x), layer(x) - layer.base_layer(x)
    hook = hook(hooks)
    hooks.add_hook_to_module(layer.base_layer, hook)
    doubles = any(type(each).__name__ == "Double" for each in (hook, *getattr(hook, "hooks", ())))
    fused.clear()
    torch.testing.assert_close(layer(x), (2 if doubles else 1) * base + delta)
    assert fused == [] and not joins(layer, x)


def test_what_stands_around_a_hook_that_only_moves_is_called(fused):
    """A forward put on before or after it, a hook of torch's beside it, a hook that turns gradients off."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = make(), torch.randn(3, 40)
    expected, base = layer(x).detach(), layer.base_layer
    fused.clear()

    def check(plus: float) -> None:
        torch.testing.assert_close(layer(x), expected + plus)
        assert not fused and not joins(layer, x)
        hooks.remove_hook_from_module(base)
        base.__dict__.pop("forward", None)

    base.forward = lambda x: F.linear(x, base.weight, base.bias) + 1
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook("cpu"))
    check(1)
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook("cpu"))
    moved = base.forward
    base.forward = lambda x: moved(x) + 2
    check(2)
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook("cpu"))
    handle = base.register_forward_hook(lambda m, args, y: y + 3)
    check(3)
    handle.remove()
    hook = hooks.AlignDevicesHook("cpu")
    hook.no_grad = True
    hooks.add_hook_to_module(base, hook)
    check(0)
    hooks.add_hook_to_module(base, hooks.AlignDevicesHook("cpu"))
    assert torch.equal(layer(x), expected) and fused == [True]


def test_an_adapter_elsewhere_is_refused_where_nothing_moves_x():
    layer = make(dropout=0.5)
    layer.A = layer.A.to("meta")
    with pytest.raises(ValueError, match="A: got device meta for linear, must be cpu like x"):
        layer(torch.randn(5, 40))


def test_a_hook_moves_x_to_the_layer_and_y_back(fused):
    """From the CPU to "meta", where there is nothing to compute, and the way back from there is an error of torch's."""
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = make().to("meta"), torch.randn(3, 40)
    for back in (False, True):
        hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook("meta", io_same_device=back))
        with pytest.raises(NotImplementedError, match="out of meta tensor") if back else nullcontext():
            assert layer(x).is_meta
        assert fused.pop() and not fused and not joins(layer, x)


@pytest.mark.gpu("torch backend")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_hook_moves_to_a_gpu_and_back(fused, dropout):
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = make(dropout=dropout), torch.randn(3, 40, requires_grad=True)
    expected = layer.eval()(x)
    right = torch.autograd.grad(expected.sum(), (x, layer.R))
    layer.cuda()
    fused.clear()
    hooks.add_hook_to_module(layer.base_layer, hooks.AlignDevicesHook(0, io_same_device=True))
    y = layer(x)
    assert fused == [True] and not y.is_cuda
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=0)
    for got, g in zip(torch.autograd.grad(y.sum(), (x, layer.R)), right, strict=True):
        torch.testing.assert_close(got.cpu(), g, atol=1e-4, rtol=1e-4)
    assert not layer.train()(x).is_cuda and len(fused) == (2 if dropout == 0 else 1)


class Routed(nn.Linear):
    """A linear layer with more arguments, and more outputs where it is asked for them."""

    def forward(self, x, scale=1.0, *, top=None):
        y = super().forward(x) * scale
        return y if top is None else (y, y.topk(top))


@pytest.mark.parametrize("through", ["attach", "peft"])
def test_a_base_with_a_forward_of_its_own_gets_all_arguments_and_returns_what_an_adapter_fits(through):
    model, x = nn.ModuleDict({"q": Routed(12, 8), "k": nn.Linear(12, 8)}), torch.randn(3, 12)
    base = copy.deepcopy(model)
    if through == "attach":
        lx.attach(model, 2, target_modules=["q", "k"])
        layers = model
    else:
        peft = pytest.importorskip("peft")
        from loraxs_kernels.integrations.peft import LoraXSConfig

        layers = peft.get_peft_model(model, LoraXSConfig(r=2, target_modules=["q", "k"])).base_model.model
    added = layers["q"](x) - base["q"](x)
    torch.testing.assert_close(layers["q"](x, 3.0), base["q"](x, scale=3.0) + added)
    torch.testing.assert_close(layers["q"](x, scale=3.0), base["q"](x, scale=3.0) + added)
    with pytest.raises(TypeError, match=r"module 'q': its base layer, a Routed, returned a tuple .*exclude_modules"):
        layers["q"](x, top=1)
    layers["q"].base_layer.forward = lambda x: x
    with pytest.raises(TypeError, match=r"a Routed, returned a tensor of shape \(3, 12\) for .* must .* \(3, 8\)"):
        layers["q"](x)
    with pytest.raises(TypeError, match="positional argument"):
        layers["k"](x, 3.0)
    if through == "attach":
        layers["k"].merge()
        with pytest.raises(TypeError):
            layers["k"](x, 3.0)


class PassesNoGradient(nn.Linear):
    """Like a layer that quantises its input: what comes before it gets no gradient."""

    def forward(self, x):
        return super().forward(x.detach().round(decimals=2))


@pytest.mark.parametrize("how", ["eager", "bias trains", "dropout", "compiled", "checkpointed", "reentrant"])
def test_a_base_that_passes_no_gradient_is_refused(how):
    layer = LoraXSLinear.from_linear(PassesNoGradient(12, 8), 2, name="a.b", dropout=0.1 if how == "dropout" else 0.0)
    x = torch.randn(3, 12)
    layer(x).sum().backward()  # nothing before it wants a gradient
    assert layer.R.grad is not None
    x.requires_grad_()
    with torch.no_grad():
        layer(x)
    layer.base_layer.bias.requires_grad_(how == "bias trains")
    run = {
        "compiled": lambda: torch.compile(layer, backend="aot_eager")(x),
        "checkpointed": lambda: checkpoint(layer, x, use_reentrant=False),
        "reentrant": lambda: checkpoint(layer, x, use_reentrant=True).sum().backward(),
    }.get(how, lambda: layer(x))
    message = r"module 'a\.b': its base layer, a PassesNoGradient with a Parameter weight, passes no gradient to its"
    with pytest.raises(RuntimeError, match=message):
        run()


def test_a_base_that_passes_its_gradient_compiles_in_one_graph():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).tanh()

    layer, x = LoraXSLinear.from_linear(Own(12, 8), 2), torch.randn(3, 12, requires_grad=True)
    nn.init.normal_(layer.R)
    layer.bias.requires_grad_(True)
    assert layer(2 * x).grad_fn is not None
    y, compiled = layer(x), torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    for got, right in zip(*(torch.autograd.grad(t.sum(), (x, layer.R)) for t in (compiled, y)), strict=True):
        torch.testing.assert_close(got, right)


def test_unfrozen_base_weight_still_gets_its_gradient():
    layer = make()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(3, 40)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_layer.weight.grad, torch.ones(3, 24).T @ x)
    assert layer.base_layer.bias.grad is not None and layer.R.grad is not None


def test_adapter_dtype_other_than_the_base():
    base = nn.Linear(40, 24).bfloat16()
    mixed = LoraXSLinear.from_linear(base, 6, dtype=torch.float32)
    nn.init.normal_(mixed.R)
    assert mixed.A.dtype == torch.float32
    x = torch.randn(3, 40).bfloat16()
    y = mixed(x)
    assert y.dtype == torch.bfloat16
    expected = base(x).double() + x.double() @ (mixed.B @ mixed.R @ mixed.A).T.double()
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=2e-2)


def test_dropout_is_on_the_adapter_alone_and_in_training_only():
    layer = make(dropout=0.5)
    x = torch.randn(2000, 40)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, dense(layer).float(), layer.bias))
    layer.train()
    with torch.random.fork_rng():
        y = layer(x)
    with torch.random.fork_rng():
        dropped = F.dropout(x, 0.5)
    torch.testing.assert_close(y - layer.base_layer(x), dropped @ layer.delta_weight().T, atol=1e-4, rtol=1e-4)
    layer(x.requires_grad_()).sum().backward()
    assert layer.R.grad is not None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_exact_restoration(kind, dtype):
    layer = make(kind, dtype)
    x = torch.randn(3, 40, dtype=dtype)
    weight, before, y = layer.base_layer.weight, layer.base_layer.weight.clone(), layer(x)
    assert layer.weight is weight
    layer.merge()
    layer.merge()  # once is enough
    assert layer.merged and "merged" in repr(layer) and layer.weight.shape == weight.shape
    torch.testing.assert_close(layer(x), y, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=3e-2)
    merged = layer.weight.T if kind == "conv1d" else layer.weight
    torch.testing.assert_close(merged.double(), dense(layer), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert layer.base_layer.weight is weight and torch.equal(weight, before)
    layer.unmerge()
    assert layer.weight is weight and torch.equal(layer(x), y)


@pytest.mark.parametrize("within", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_merge_is_the_same_wherever_it_is_called(kind, within):
    layer = make(kind)
    delta, x = layer.delta_weight(), torch.randn(3, 40, requires_grad=True)
    layer.merge()
    expected = layer.weight
    layer.unmerge()
    with within():
        assert torch.equal(layer.delta_weight(), delta)
        layer.merge()
    assert torch.equal(layer.weight, expected)
    layer(x).sum().backward()  # which an inference tensor would not allow
    assert x.grad is not None


def test_a_weight_is_merged_into_in_its_own_precision():
    layer = LoraXSLinear.from_linear(nn.Linear(40, 24, dtype=torch.float64), 6, dtype=torch.bfloat16)
    nn.init.zeros_(layer.R)
    layer.merge()
    assert torch.equal(layer.weight, layer.base_layer.weight)


@pytest.mark.parametrize("init", ["svd", "random"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_drawn_does_not_depend_on_the_default_dtype(init, default):
    linear = nn.Linear(40, 24)
    expected = LoraXSLinear.from_linear(linear, 6, init=init).state_dict()
    torch.set_default_dtype(default)
    try:
        made = LoraXSLinear.from_linear(linear, 6, init=init).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(made[name], expected[name]) for name in "ARB")


def test_training_while_merged_is_warned_of():
    model, x = nn.Sequential(make(), make(K=24)), torch.randn(3, 40)
    lx.merge(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")  # torch.compile's own
        warnings.filterwarnings("default", "the adapters are merged, so that R gets no gradient")
        model.eval()(x)
        with torch.no_grad():
            model.train()(x)
        torch.compile(model, backend="eager", fullgraph=True)(x)
        assert not said
        model(x)
        model(x)
    assert len(said) == 1


def test_a_merge_that_is_not_finite_is_refused():
    layer = LoraXSLinear.from_linear(nn.Linear(8, 8), 2, name="block.proj")
    nn.init.constant_(layer.R, float("inf"))
    with pytest.raises(ValueError, match=r"module 'block\.proj': the merged weight has NaN or Inf"):
        layer.merge()
    assert not layer.merged


def test_state_dict_round_trip():
    layer, other = make(), make()
    x = torch.randn(3, 40)
    state = layer.state_dict()
    assert sorted(state) == ["A", "B", "R", "base_layer.bias", "base_layer.weight"]
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    other.merge()
    with pytest.raises(RuntimeError, match="is merged"):
        other.load_state_dict(state)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_state_dict_while_merged_is_that_of_a_plain_layer(kind):
    layer, x = make(kind), torch.randn(3, 40)
    nn.utils.parametrize.register_parametrization(layer, "R", nn.Identity())
    before = layer.state_dict()
    layer.merge()
    model = nn.Sequential(Conv1D(24, 40) if kind == "conv1d" else nn.Linear(40, 24, bias=kind != "no bias"))
    state = nn.Sequential(layer).state_dict()
    assert all(t.is_contiguous() and not t.requires_grad for t in state.values())
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), layer(x))
    assert state["0.weight"].data_ptr() == layer.weight.data_ptr(), "no copy is made"
    layer.unmerge()
    assert {name: t.data_ptr() for name, t in layer.state_dict().items() if name != "B"} == {
        name: t.data_ptr() for name, t in before.items() if name != "B"
    }


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way, merged):
    layer = make("conv1d", alpha=9, dropout=0.1).eval()
    if merged:
        layer.merge()
    x = torch.randn(3, 40)
    copied = way(layer)
    assert torch.equal(copied(x), layer(x)) and repr(copied) == repr(layer) and copied.recipe == layer.recipe
    copied.R.data.zero_()
    assert layer.R.any()


def test_a_pickle_of_an_earlier_version_keeps_its_sigma(tmp_path):
    layer = make(init_std=0.5)
    state = layer.__dict__.copy()
    state["sigma"] = state.pop("init_std")
    earlier = LoraXSLinear.__new__(LoraXSLinear)
    earlier.__setstate__(state)
    assert earlier.init_std == 0.5 and "sigma" not in earlier.__dict__
    lx.save_adapter(nn.Sequential(earlier), tmp_path / "a.safetensors")


def test_moves_keep_R_in_full_precision():
    layer = make()
    R = layer.R.detach().clone()
    parameter = layer.R
    layer.merge()
    layer.to(torch.bfloat16)
    assert layer.A.dtype == layer.B.dtype == layer.base_layer.weight.dtype == layer.weight.dtype == torch.bfloat16
    assert layer.R is parameter and layer.R.dtype == torch.float32 and torch.equal(layer.R, R)
    layer.unmerge()
    assert layer(torch.randn(3, 40).bfloat16()).dtype == torch.bfloat16
    assert layer.half().R.dtype == torch.float32 and layer.double().R.dtype == torch.float64
    assert layer.float().R.dtype == torch.float32 and torch.equal(layer.R, R)
    assert layer.to("meta").R.is_meta


class CastsByItsFirstParameter(nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(next(self.parameters()).dtype))


def test_a_model_that_takes_its_dtype_from_its_first_parameter_gets_that_of_its_weights():
    model = CastsByItsFirstParameter(nn.Linear(8, 8)).bfloat16()
    lx.attach(model, 2)
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        assert call(torch.ones(1, 8)).dtype == torch.bfloat16
    assert [name for name, _ in model.named_modules()] == ["", "0.base_layer", "0"]
    both = nn.Sequential(model[0], model[0])
    assert [name for name, _ in both.named_parameters()] == ["0.base_layer.weight", "0.base_layer.bias", "0.R"]
    assert len([*both.modules()]) == 3 and len([*both.named_modules(remove_duplicate=False)]) == 5
    assert [name for name, _ in model[0].named_modules(prefix="x")] == ["x", "x.base_layer"]


def test_meta_device_then_real_weights():
    with torch.device("meta"):
        layer = LoraXSLinear.from_linear(nn.Linear(40, 24), 6)
    assert layer.A.is_meta and layer.R.is_meta
    linear = nn.Linear(40, 24)
    layer.to_empty(device="cpu").base_layer.load_state_dict(linear.state_dict())
    assert layer(torch.zeros(1, 40)).isnan().all()  # memory of zeros would make an adapter that never trains
    layer.reset_parameters()
    expected = LoraXSLinear.from_linear(linear, 6)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_meta_device_then_assigned_weights():
    linear = nn.Linear(40, 24)
    with torch.device("meta"):
        layer = LoraXSLinear.from_linear(nn.Linear(40, 24), 6)
        given = LoraXSLinear.from_linear(nn.Linear(40, 24), 6, init=(torch.empty(6, 40), torch.empty(24, 6)))
    assert layer(torch.empty(3, 40, device="meta")).is_meta
    with pytest.raises(ValueError, match="its weight is on the meta device, must be loaded first"):
        layer.reset_parameters()
    for each in (layer, given):
        each.base_layer.load_state_dict(linear.state_dict(), assign=True)
        with torch.no_grad(), pytest.raises(ValueError, match="A, R, B: not all are in memory"):
            each(torch.ones(3, 40))
    with pytest.raises(ValueError, match="A and B were given"):
        given.reset_parameters()
    layer.reset_parameters()
    expected = LoraXSLinear.from_linear(linear, 6).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in layer.state_dict().items()) and layer.R.requires_grad
    layer.R = nn.Parameter(layer.R.detach().to("meta"))
    with pytest.raises(ValueError, match="A, R, B: not all are in memory"):
        forward_together(torch.ones(3, 40), layer, LoraXSLinear.from_linear(linear, 6))


@pytest.mark.parametrize("true_rank", [0, 2])
def test_rank_deficient_weights_train_all_the_same(true_rank):
    linear = nn.Linear(40, 24)
    linear.weight.data = torch.randn(24, true_rank) @ torch.randn(true_rank, 40)
    layer = LoraXSLinear.from_linear(linear, 6)
    torch.testing.assert_close(layer.B.T @ layer.B, torch.eye(6), atol=1e-5, rtol=0)
    assert layer.A[true_rank:].abs().max() == 0 and layer(torch.randn(3, 40)).isfinite().all()
    torch.testing.assert_close(layer.B @ layer.A, linear.weight.data, atol=1e-4, rtol=0)


def test_seed_decides_everything_random():
    linear = nn.Linear(40, 24)

    def state(**options):
        return LoraXSLinear.from_linear(linear, 6, **options)

    for init in ("svd", "random"):
        a, b = state(init=init, seed=1, name="a"), state(init=init, seed=1, name="a")
        assert torch.equal(a.R, b.R) and torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
        assert not torch.equal(a.R, state(init=init, seed=2, name="a").R)
        assert not torch.equal(a.R, state(init=init, seed=1, name="b").R)
    # Files hold neither random A and B nor the seed's R, so that every version has to draw the same.
    recipe = Recipe(init="random", seed=3, name="a.b")
    drawn = [*recipe.drawn(1, (1, 2)), recipe.initial_R(2, 0.5)]
    expected = [[0.3317, -0.5879], [0.3903], [-0.2304, -0.2221, -0.1713, -0.2274]]
    for t, values in zip(drawn, expected, strict=True):
        torch.testing.assert_close(t.flatten(), torch.tensor(values), atol=1e-4, rtol=0)


def test_a_recipe_notes_the_conversions_that_can_change_a_value():
    """Each once, so that a model may go to and fro between dtypes for ever."""
    for made in FLOATS[1:]:
        A = 1 + torch.rand(20, dtype=torch.promote_types(made, torch.float32))
        for dtypes in itertools.product(FLOATS, repeat=4):
            recipe, t, changed = Recipe(weight_dtype=dtype_name(made)), A, set()
            for dtype in dtypes:
                before, t, recipe = t, t.to(dtype), recipe.cast(dtype)
                changed |= set() if torch.equal(t.double(), before.double()) else {dtype_name(dtype)}
            assert torch.equal(recipe.round((A, A))[0].to(t.dtype), t) and changed <= {*recipe.rounded}
            assert len(recipe.rounded) == len({*recipe.rounded} & (changed | {"bfloat16", "float16"}))
    assert Recipe(init="given").cast(torch.float16).rounded == Recipe().cast(torch.float8_e5m2).rounded == ()


def test_random_init_is_kaiming_uniform():
    layer = LoraXSLinear.from_linear(nn.Linear(4000, 3000), 16, init="random")
    for factor, fan_in in ((layer.A, 4000), (layer.B, 16)):
        bound = fan_in**-0.5
        assert factor.abs().max() <= bound and abs(factor.std() / (bound / 3**0.5) - 1) < 0.02


class TinyLoRA(nn.Module):
    """R = sum_i v_i P_i: u numbers train instead of r^2."""

    def __init__(self, u: int, r: int):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(u))
        self.register_buffer("P", torch.randn(u, r, r) / r)

    def forward(self, R):
        return R + torch.einsum("u,urq->rq", self.v, self.P)


def train(layer: LoraXSLinear, steps: int = 60) -> tuple[float, float]:
    """First and last loss of fitting another layer's output."""
    x, target = torch.randn(64, 40), torch.randn(64, 24)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def test_tinylora_by_parametrization():
    layer = LoraXSLinear.from_linear(nn.Linear(40, 24), 6)
    parametrize.register_parametrization(layer, "R", TinyLoRA(13, 6))
    layer.parametrizations.R.original.requires_grad_(False)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 13
    first, last = train(layer)
    assert last < first
    layer.to(torch.bfloat16)
    assert (
        layer.parametrizations.R[0].v.dtype == torch.float32 and layer(torch.randn(2, 40).bfloat16()).isfinite().all()
    )


def test_psoft_by_parametrization():
    """PSOFT: R is orthogonal; the adapter starts at the identity's delta and stays on the group."""
    layer = LoraXSLinear.from_linear(nn.Linear(40, 24), 6)
    layer.R.data = torch.eye(6)
    nn.utils.parametrizations.orthogonal(layer, "R", orthogonal_map="cayley")
    first, last = train(layer)
    assert last < first
    torch.testing.assert_close(layer.R @ layer.R.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("compiled", [False, True])
def test_compile(compiled):
    layer = make(dropout=0.0)
    model = nn.Sequential(nn.Linear(40, 40), layer, nn.ReLU())
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    x = torch.randn(3, 40)
    run(x).sum().backward()
    expected = torch.autograd.grad((model[1](model[0](x))).relu().sum(), layer.R)[0]
    torch.testing.assert_close(layer.R.grad, expected)


@pytest.mark.parametrize("through", ["attach", "peft"])
def test_equal_blocks_compile_once(through):
    """As torch.compile of each block of a model does: their names must be no reason to compile each by itself."""
    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))
    if through == "attach":
        attach(model, 2)
    else:
        peft = pytest.importorskip("peft")
        from loraxs_kernels.integrations.peft import LoraXSConfig

        peft.get_peft_model(model, LoraXSConfig(r=2))
    torch.compiler.reset()
    counter, x = CompileCounter(), torch.randn(4, 8)
    for block in model:
        torch.compile(block, fullgraph=True, backend=counter)(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("how", ["fused", "delta", "together", "forced", "index"])
def test_selective_checkpointing_may_save_products(how, monkeypatch):
    """It keeps what an operator returns, and refuses to find it changed."""
    layers = [make(seed=i, dropout=0.5 if how == "delta" else 0.0) for i in range(2)]
    x, products = torch.randn(5, 40, requires_grad=True), [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = partial(create_selective_checkpoint_contexts, products)

    def indexed(layer, x):
        R, operands = layer.R.unsqueeze(0), (layer.base_layer.weight.detach(), layer.A)
        return functional.lora_xs_linear(x, *operands, R, layer.B, 1.0, index=[0, -1, 0, 0, -1])

    def kernel(x, W, A, R, B, s, bias=None, out=None, other=None):
        """Adds to a product of torch's where torch does not see it."""
        y = nn.functional.linear(x, W, bias)
        delta, z, gram = of_torch(x, None, A, R, B, s, None, None, other)
        y.detach().numpy()[:] += delta.numpy()
        return y, z, gram

    if how == "forced":
        of_torch = backends.primitive("torch")
        monkeypatch.setattr(backends, "primitive", {"torch": of_torch, "cuda": kernel}.__getitem__)
        monkeypatch.setattr(backends, "_forced", "cuda")

    def call(x):
        if how == "index":
            return sum(indexed(layer, x) for layer in layers)
        return sum(forward_together(x, *layers) if how == "together" else [layer(x) for layer in layers])

    results = []
    for run in (call, lambda x: checkpoint(call, x, use_reentrant=False, context_fn=context)):
        torch.manual_seed(0)
        results.append(torch.autograd.grad(run(x).square().sum(), (x, *(layer.R for layer in layers))))
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_are_counted(dropout):
    """Also those of products that write in place otherwise."""
    layer, other, x = make(dropout=dropout), make(dropout=dropout), torch.randn(5, 40, requires_grad=True)
    N, K, r = layer.out_features, layer.in_features, layer.rank
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    chain = 2 * 5 * (N * K + K * r + r * r + r * N)
    assert (forward.get_total_flops(), backward.get_total_flops()) == (chain, chain + 2 * 5 * r * r)
    with FlopCounterMode(display=False) as both:
        sum(y.sum() for y in forward_together(x, layer, other)).backward()
    assert both.get_total_flops() == 2 * (2 * chain + 2 * 5 * r * r)


@pytest.mark.parametrize("fused", [True, False])
def test_many_R_on_one_base(fused):
    layer, x, Rs = make(), torch.randn(5, 40), torch.randn(3, 6, 6)
    layer.base_layer.weight.requires_grad_(not fused)

    def call(R: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"R": R}, (x,))

    for y, R in zip(torch.func.vmap(call)(Rs), Rs, strict=True):
        torch.testing.assert_close(y, call(R))
    _, derivative = torch.func.linearize(call, Rs[0])
    for R in Rs:
        torch.testing.assert_close(derivative(R), torch.func.jvp(call, (Rs[0],), (R,))[1])


def test_gradients_for_each_sample():
    """As differential privacy takes them."""
    model, x = nn.Sequential(make(K=16, N=12), nn.Tanh(), make(K=12, N=8)), torch.randn(5, 16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(trained: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, trained, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    assert list(found) == ["0.R", "2.R"]
    for i, each in enumerate(x):
        model.zero_grad()
        loss(trained, each).backward()
        for name, p in trained.items():
            torch.testing.assert_close(found[name][i], p.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_trace_computes_and_trains_as_the_layer_does(dropout):
    layer, x = make(dropout=dropout).eval(), torch.randn(2, 3, 40)
    traced = torch.jit.trace(layer, x)
    both = nn.ModuleList([layer, layer])
    both.forward = lambda x: forward_together(x, *both)
    torch.testing.assert_close(torch.jit.trace(both, x)(x), (layer(x), layer(x)))
    other = torch.randn(2, 3, 40, requires_grad=True)
    results = [(y := call(other), *torch.autograd.grad(y.square().sum(), (other, layer.R))) for call in (traced, layer)]
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


def test_autocast_over_an_fp32_layer():
    layer = make()
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        layer.dropout = 0.5
        dropped = layer(x)
    assert y.dtype == dropped.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), x.double() @ dense(layer).T + layer.bias.double(), rtol=3e-2, atol=3e-2)


BAD = {
    "rank zero": (dict(rank=0), ValueError, "rank: got 0 for module 'a.b', must be an integer of at least 1"),
    "rank too large": (dict(rank=9), ValueError, r"rank: got 9 for module 'a\.b' of shape 8 x 12, must be at most 8"),
    "rank no integer": (dict(rank=2.0), ValueError, r"rank: got 2\.0"),
    "alpha": (dict(alpha=float("nan")), ValueError, r"alpha: got nan for module 'a\.b'"),
    "alpha a bool": (dict(alpha=True), ValueError, r"alpha: got True for module 'a\.b', must be a finite number"),
    "dropout": (dict(dropout=1.0), ValueError, r"dropout: got 1\.0 for module 'a\.b', must be in \[0, 1\)"),
    "dropout nan": (dict(dropout=float("nan")), ValueError, r"dropout: got nan for module 'a\.b'"),
    "dropout no number": (dict(dropout="0.1"), ValueError, r"dropout: got '0\.1' for module 'a\.b'"),
    "init_std": (dict(init_std=-1.0), ValueError, r"init_std: got -1\.0"),
    "init_std nan": (dict(init_std=float("nan")), ValueError, r"init_std: got nan for module 'a\.b', must be a finite"),
    "init_std inf": (dict(init_std=float("inf")), ValueError, r"init_std: got inf for module 'a\.b'"),
    "init_std no number": (dict(init_std="1e-5"), ValueError, r"init_std: got '1e-5' for module 'a\.b'"),
    "dtype int32": (
        dict(dtype=torch.int32),
        ValueError,
        r"dtype: got torch\.int32 for module 'a\.b', must be one of bfl",
    ),
    "dtype complex64": (dict(dtype=torch.complex64), ValueError, r"dtype: got torch\.complex64 for module"),
    "dtype float8": (dict(dtype=torch.float8_e4m3fn), ValueError, r"dtype: got torch\.float8_e4m3fn for module"),
    "dtype a string": (dict(dtype="float"), ValueError, r"dtype: got 'float' for module"),
    "rank a bool": (dict(rank=True), ValueError, r"rank: got True for module 'a\.b', must be an integer"),
    "seed": (dict(seed=1.5), ValueError, r"seed: got 1\.5 for module 'a\.b', must be an integer"),
    "init": (dict(init="kaiming"), ValueError, "init: got 'kaiming' for module 'a.b'"),
    "a recipe that makes nothing": (dict(init=Recipe("given")), ValueError, r"init: got Recipe\(init='given'.* a pair"),
    "factors of another shape": (dict(init=(torch.ones(2, 8), torch.ones(8, 2))), ValueError, r"must be \(2, 12\)"),
    "factors not finite": (dict(init=(torch.ones(2, 12) / 0, torch.ones(8, 2))), ValueError, "NaN or Inf"),
    "factors in float8": (
        dict(init=(torch.ones(2, 12).to(torch.float8_e5m2), torch.ones(8, 2))),
        TypeError,
        r"init: got \(torch.float8_e5m2, torch.float32\) .* pair \(A, B\) of tensors in bf16, fp16, fp32 or fp64",
    ),
    "factors no tensors": (dict(init=(1, 2)), TypeError, r"init: got \(int, int\) for module"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    options, error, message = BAD[case]
    linear = nn.Linear(12, 8)
    with pytest.raises(error, match=message):
        LoraXSLinear.from_linear(linear, **(dict(rank=2, name="a.b") | options))
    assert linear.weight.requires_grad


def test_numbers_of_other_packages_are_taken_and_kept_as_floats():
    numpy = pytest.importorskip("numpy")
    layer = make(alpha=numpy.float32(4), dropout=numpy.float64(0.25), init_std=numpy.float32(0.5))
    assert (layer.alpha, layer.dropout, layer.init_std) == (4.0, 0.25, 0.5)
    assert {type(each) for each in (layer.alpha, layer.scaling, layer.dropout, layer.init_std)} == {float}
    with pytest.raises(ValueError, match=r"init_std: got .*inf"):
        make(init_std=numpy.float32("inf"))


def test_bad_layers_are_named():
    nan = nn.Linear(12, 8)
    nan.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"module 'a\.b': W: has a largest magnitude of nan, must be finite"):
        LoraXSLinear.from_linear(nan, 2, name="a.b")
    with pytest.raises(TypeError, match=r"module 'norm': got a LayerNorm .* must be an nn\.Linear or Conv1D"):
        LoraXSLinear.from_linear(nn.LayerNorm(8), 2, name="norm")
    sharded = nn.Linear(12, 8)
    sharded.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(TypeError, match=r"module 'z': got a Linear with a Parameter weight of shape \(0,\)"):
        LoraXSLinear.from_linear(sharded, 2, name="z")
    with pytest.raises(TypeError, match="module '0': got a LazyLinear whose weight has no shape yet"):
        attach(nn.Sequential(nn.LazyLinear(8)), 2)
    with pytest.raises(TypeError, match=r"linear: got a str, must be an nn\.Linear or Conv1D"):
        LoraXSLinear.from_linear("q_proj", 2)
    with pytest.raises(ValueError, match="already has a LoRA-XS adapter"):
        LoraXSLinear.from_linear(make(), 2)
    layer = LoraXSLinear.from_linear(nn.Linear(12, 8), 2, name="a.b")
    with pytest.raises(ValueError, match=r"factors: got A of shape \(1, 12\) .* for module 'a\.b', must be \(2, 12\)"):
        layer.reset_parameters((torch.ones(1, 12), torch.ones(8, 2)))


def test_bad_x_is_named():
    layer = LoraXSLinear.from_linear(nn.Linear(12, 8), 2, name="a.b")
    with pytest.raises(ValueError, match=r"x: got shape \(3, 11\) and torch\.float32 for module 'a\.b', must be"):
        layer(torch.ones(3, 11))
    with pytest.raises(ValueError, match=r"torch\.float64 for module"):
        layer(torch.ones(3, 12).double())
    for layout in (torch.strided, torch.jagged):
        with pytest.raises(ValueError, match=r"x: got a nested tensor .* for module 'a\.b', must be a dense tensor"):
            layer(torch.nested.nested_tensor([torch.ones(3, 12), torch.ones(2, 12)], layout=layout))
    for call in (layer, lambda x: forward_together(x, layer, layer)):
        with pytest.raises(TypeError, match=r"module 'a\.b': got x of type list, must be a tensor of shape"):
            call([1.0] * 12)


def test_what_torch_takes_for_a_tensor_is_one():
    """As nn.Linear takes functorch's tensors with first-class dimensions, which are no torch.Tensor."""

    class Like:
        def __init__(self, held: torch.Tensor) -> None:
            self.held = held

        def __getattr__(self, name):
            return getattr(self.held, name)

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function(*(a.held if isinstance(a, Like) else a for a in args), **kwargs or {})

    layer, x = make(), torch.randn(3, 40)
    with torch.no_grad():
        for call in (layer, layer.base_layer, lambda x: forward_together(x, layer, layer)[1]):
            torch.testing.assert_close(call(Like(x)), call(x))


@pytest.mark.parametrize("name", "AB")
def test_factors_that_are_set_to_train_are_refused(name):
    layer, x = make(), torch.randn(3, 40)
    getattr(layer, name).requires_grad_(True)
    for call in (layer, torch.compile(layer, backend="eager"), lambda x: forward_together(x, layer, make())):
        with pytest.raises(ValueError, match="A, B: one has requires_grad=True for linear, must be frozen"):
            call(x)
    with torch.no_grad():
        layer(x)


# --- layers that share their input


def siblings(dtype: torch.dtype = torch.float32) -> list[LoraXSLinear]:
    """Of other sizes, ranks, scales, kinds and biases."""
    return [
        make("linear", dtype, N=24, rank=6),
        make("conv1d", dtype, N=8, rank=3, alpha=9),
        make("no bias", dtype, N=40, rank=8, alpha=2),
    ]


def separately(x: torch.Tensor, *layers: nn.Module) -> tuple[torch.Tensor, ...]:
    return tuple(layer(x) for layer in layers)


def joint_gradients(call, layers, x, used=(0, 1, 2)) -> list[torch.Tensor]:
    """The ys, gX and the gRs of those layers whose output is used."""
    x = x.detach().requires_grad_()
    ys = call(x, *layers)
    g = torch.Generator().manual_seed(0)
    gYs = [torch.randn(y.shape, generator=g, dtype=torch.float64).to(y) for y in ys]
    wanted = (x, *(layers[i].R for i in used))
    return [*ys, *torch.autograd.grad([ys[i] for i in used], wanted, [gYs[i] for i in used])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
def test_together_is_what_separate_calls_give(dtype, used):
    check_together(siblings(dtype), torch.randn(2, 5, 40, dtype=dtype), used)


@pytest.mark.gpu("torch backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_together_on_a_gpu(dtype):
    layers = [make(dtype=dtype, N=N, K=1024, rank=r).cuda() for N, r in ((1024, 20), (256, 16), (256, 16))]
    check_together(layers, torch.randn(2, 300, 1024, dtype=dtype, device="cuda"), (0, 1, 2))


def check_together(layers, x, used):
    dtype = x.dtype
    exact = [copy.deepcopy(layer).double() for layer in layers]
    got = joint_gradients(forward_together, layers, x, used)
    chain = joint_gradients(separately, layers, x, used)
    oracle = joint_gradients(separately, exact, x.double(), used)
    for i, three in enumerate(zip(got, chain, oracle, strict=True)):
        assert three[0].dtype == three[1].dtype
        assert_accurate(*three, dtype, f"result {i}")


def test_together_reads_x_once_and_keeps_z_alone():
    layers, x = siblings()[:2], torch.randn(5, 40, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward_together(x, *layers)
    own = {t.data_ptr() for layer in layers for t in (layer.base_layer.weight, layer.A, layer.B, layer.R)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in own] == [(5, 6 + 3)]


def test_together_keeps_no_weight_where_x_needs_no_gradient():
    layers, kept = siblings(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ys = forward_together(torch.randn(5, 40), *layers)
    weights = {layer.base_layer.weight.data_ptr() for layer in layers}
    assert kept and not weights & {t.data_ptr() for t in kept}
    sum(y.sum() for y in ys).backward()
    assert all(layer.R.grad is not None for layer in layers)


def test_together_calls_what_it_cannot_join():
    """A merged layer, a dropping one, one with a hook, a plain linear, one of a subclass; the rest are still joined."""

    class Own(LoraXSLinear):
        pass

    a, b, merged, dropping, hooked, plain = *siblings()[:2], make(), make(dropout=0.5), make(), nn.Linear(40, 3)
    own, calls = make(), []
    own.__class__ = Own
    merged.merge()
    hooked.register_forward_hook(lambda module, args, y: calls.append(module) or y + 1)
    layers, x = (a, merged, dropping, b, hooked, plain, own), torch.randn(5, 40)
    torch.manual_seed(1)
    expected = separately(x, *layers)
    torch.manual_seed(1)
    for y, right in zip(forward_together(x, *layers), expected, strict=True):
        torch.testing.assert_close(y, right)
    assert calls == [hooked, hooked]
    assert [joins(layer, x) for layer in layers if isinstance(layer, LoraXSLinear)] == [
        *(True, False, False, True, False),
        False,  # of a subclass, which may have a forward of its own
    ]
    assert joins(dropping.eval(), x)
    for by_itself in ("seat", "shares"):  # a bank's, and FSDP2's
        other = make()
        setattr(other, by_itself, object())
        assert not joins(other, x)
    assert forward_together(x) == ()


def test_together_under_checkpointing():
    layers, x = siblings(), torch.randn(5, 40)
    expected = joint_gradients(separately, layers, x)
    got = joint_gradients(lambda x, *layers: checkpoint(forward_together, x, *layers, use_reentrant=False), layers, x)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


def test_together_under_compile_and_autocast():
    layers, x = siblings(), torch.randn(5, 40)
    compiled = torch.compile(forward_together, fullgraph=True, backend="aot_eager")
    for g, e in zip(joint_gradients(compiled, layers, x), joint_gradients(separately, layers, x), strict=True):
        torch.testing.assert_close(g, e)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = joint_gradients(forward_together, layers, x), joint_gradients(separately, layers, x)
    after = joint_gradients(torch.autocast("cpu", torch.bfloat16)(forward_together), layers, x)
    assert [t.dtype for t in got] == [torch.bfloat16] * 3 + [torch.float32] * 4
    for g, e, a in zip(got, expected, after, strict=True):
        assert relative_error(g, e) < 1e-2
        assert torch.equal(g, a)  # the backward is the same within autocast


def test_together_lets_outputs_change_in_place():
    layers, x = siblings(), torch.randn(2, 5, 40, requires_grad=True)
    q, k, _ = forward_together(x, *layers)
    q.mul_(2)
    (q.sum() + k.sum()).backward()
    got, x.grad = x.grad, None
    q, k, _ = separately(x, *layers)
    (2 * q.sum() + k.sum()).backward()
    torch.testing.assert_close(got, x.grad)


def unfused(layer: LoraXSLinear):
    """The layer in separate torch ops."""
    W = layer.weight.t() if isinstance(layer.base_layer, Conv1D) else layer.weight
    return lambda x: lowrank_linear(x, W, layer.A, layer.R, layer.B, layer.scaling, layer.bias)[0]


def test_second_derivatives_together():
    layers, x = [layer.double() for layer in siblings()], torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    inputs = x, *(layer.R for layer in layers)

    def second(call, used):
        q, *others = (y.tanh() for y in call(x, *layers))
        loss = q.sum() if used == "one" else (q * sum(y.sum() for y in others)).sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)

    for used in ("one", "all"):
        expected = second(lambda x, *layers: [unfused(layer)(x) for layer in layers], used)
        for call in (forward_together, separately):
            for got, right in zip(second(call, used), expected, strict=True):
                torch.testing.assert_close(got, right)


def test_a_gradient_penalty_of_a_real_model(minilm):
    """|d loss / d embeddings|^2, differentiated for every R, beside the layers that people run today."""
    minilm.set_attn_implementation("eager")  # the fused attention of a CPU is differentiable once
    model = attach(minilm.double(), 8, target_modules="all-linear", init_std=0.1, progress=False)
    today = copy.deepcopy(model)
    for parent in list(today.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoraXSLinear):
                parent._modules[name] = UnfusedLinear(child)
    embeddings = model.embeddings(torch.randint(1000, 5000, (2, 12))).detach().requires_grad_()

    def penalized(model):
        y = model(inputs_embeds=embeddings).last_hidden_state
        (g,) = torch.autograd.grad(y.square().mean(), embeddings, create_graph=True)
        trained = [p for name, p in model.named_parameters() if p.requires_grad and "pooler" not in name]
        return torch.autograd.grad(g.square().sum(), trained)

    for got, expected in zip(penalized(model), penalized(today), strict=True):
        assert relative_error(got, expected) < 1e-10


def test_together_names_the_layer_that_x_does_not_fit():
    layers = [make(), LoraXSLinear.from_linear(nn.Linear(7, 3), 2, name="k_proj")]
    for context in (nullcontext, forward_ad.dual_level):
        message = r"x: got shape \(5, 40\) .* for module 'k_proj', must .* \(\.\.\., 7\)"
        with context(), pytest.raises(ValueError, match=message):
            forward_together(torch.randn(5, 40), *layers)
