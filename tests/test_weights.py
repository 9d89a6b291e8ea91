"""Reading W wherever it is held: quantised by real bitsandbytes and torchao, sharded by real torch.distributed, or by a
reader of the user's own; and adapters on such layers, from attach to their file.

DeepSpeed is not installed: its ZeRO-3 is a stand-in with the attributes and the context manager that are used.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from transformers.pytorch_utils import Conv1D

import loraxs_kernels as lx
from loraxs_kernels import LoraXSLinear, adapter_file
from loraxs_kernels.matching import match
from loraxs_kernels.sharding import assign
from loraxs_kernels.weights import weight_of

N, K = 32, 64  # whole blocks of every scheme


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, to quantise as it does")


def linear4bit(linear: nn.Linear, quant_type: str = "nf4", compute_dtype=torch.bfloat16, **options) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, to quantise as it does")
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, compute_dtype=compute_dtype, quant_type=quant_type, **options
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.detach().clone(),
        False,
        quant_type=quant_type,
        compress_statistics=layer.weight.compress_statistics,
    )
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer.to("cpu")  # quantises


def linear8bit(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, to quantise as it does")
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def torchao(linear: nn.Linear, bits: int) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, to quantise as it does")
    config = {
        8: lambda: quantization.Int8WeightOnlyConfig(),
        4: lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32), intx_packing_format="unpacked_to_int8"
        ),
    }
    layer = copy.deepcopy(linear)
    quantization.quantize_(layer, config[bits]())
    assert type(layer.weight) not in (nn.Parameter, torch.Tensor)
    return layer


QUANTISED = {
    "nf4": lambda linear: linear4bit(linear),
    "fp4": lambda linear: linear4bit(linear, "fp4", compress_statistics=False),
    "bnb int8": linear8bit,
    "torchao int8": lambda linear: torchao(linear, 8),
    "torchao int4": lambda linear: torchao(linear, 4),
}
ERROR = {"nf4": 0.12, "fp4": 0.16, "bnb int8": 0.01, "torchao int8": 0.01, "torchao int4": 0.12}
everywhere = pytest.mark.parametrize("kind", QUANTISED)


def model_of(kind: str | None = None) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(K, 96), nn.GELU(), nn.Linear(96, N))
    for i in (0, 2):
        if kind is not None:
            model[i] = QUANTISED[kind](model[i])
    return model


def effective(layer: nn.Module) -> torch.Tensor:
    """W (N, K), fp32, as the layer's own forward has it: its answers to unit vectors."""
    eye = torch.eye(layer.in_features).requires_grad_()  # bitsandbytes packs anew for inference where nothing trains
    return (layer(eye) - layer(torch.zeros_like(eye).requires_grad_())).detach().t().float()


def adapters(model: nn.Module) -> list[LoraXSLinear]:
    return [m for m in model.modules() if isinstance(m, LoraXSLinear)]


def snapshot(model: nn.Module):
    modules = [(name, id(m)) for name, m in model.named_modules()]
    return modules, [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(K, N), Conv1D(N, K)], ids=["linear", "conv1d"])
def test_a_plain_weight_is_read_as_it_is(layer, dtype):
    layer = layer.to(dtype)
    W = weight_of(layer)
    assert (W.shape, W.dtype, W.device) == ((N, K), dtype, torch.device("cpu"))
    assert W.read().data_ptr() == layer.weight.data_ptr() and not W.read().requires_grad
    torch.testing.assert_close(
        W.read(), layer.weight.T.detach() if isinstance(layer, Conv1D) else layer.weight.detach()
    )


@everywhere
def test_what_is_read_is_what_the_quantised_layer_computes_with(kind):
    linear = nn.Linear(K, N)
    layer = QUANTISED[kind](linear)
    weight = layer.weight
    W = weight_of(layer, "q")
    assert W.shape == (N, K) and W.device.type == "cpu"
    assert W.dtype == (torch.bfloat16 if kind in ("nf4", "fp4") else torch.float32)
    read = W.read()
    assert read.dtype == torch.float32 and not read.requires_grad and type(read) is torch.Tensor
    assert 0 < (read - linear.weight).norm() < ERROR[kind] * linear.weight.norm()
    if kind in ("nf4", "fp4"):  # bf16 inside
        torch.testing.assert_close(effective(layer), read, rtol=2**-7, atol=2**-7 * read.abs().max().item())
    else:
        torch.testing.assert_close(effective(layer), read, rtol=1e-4, atol=1e-4)
    assert torch.equal(W.read(), read), "before the first forward and after"
    assert layer.weight is weight and type(weight) is not nn.Parameter


def test_a_scale_of_the_input_belongs_to_the_weight():
    """As of torchao's AWQ and SmoothQuant."""
    layer = torchao(nn.Linear(K, N), 8)
    layer.weight.act_pre_scale = torch.linspace(0.5, 2, K)
    torch.testing.assert_close(weight_of(layer).read(), effective(layer), rtol=1e-4, atol=1e-4)


def test_torchaos_nf4_is_read():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = nn.Linear(K, N, bias=False)
    layer.weight = nn.Parameter(nf4.to_nf4(layer.weight.detach().bfloat16(), 64, 4), requires_grad=False)
    torch.testing.assert_close(weight_of(layer).read(), layer(torch.eye(K).bfloat16()).t())


@pytest.mark.parametrize("block", [None, (16, 24), (128, 128)], ids=str)
def test_adapters_on_fp8_layers_of_transformers(block, monkeypatch):
    """Their kernels run on GPUs alone; here the product is taken with the weight that the codes stand for."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    rows, columns = block or (N, K)
    scales = torch.rand(-(-N // rows), -(-K // columns)) + 0.5
    layer = fp8.FP8Linear(K, N, block_size=(rows, columns))
    layer.block_size = block
    layer.weight = nn.Parameter(torch.randn(N, K).to(torch.float8_e4m3fn), requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scales if block else scales[0, 0])
    dense = nn.Linear(K, N, bias=False)
    exact = torch.stack([layer.weight[i].float() * scales[i // rows].repeat_interleave(columns)[:K] for i in range(N)])
    read = weight_of(layer)
    assert (read.shape, read.dtype) == ((N, K), torch.bfloat16) and torch.equal(read.read(), exact)
    layer.bias = nn.Parameter(torch.zeros(N, dtype=torch.float16))
    assert weight_of(layer).dtype == torch.float16
    layer.bias = None

    dense.weight.data = exact
    monkeypatch.setattr(type(layer), "forward", lambda self, x: F.linear(x, exact.to(x.dtype)))
    models = nn.Sequential(layer), nn.Sequential(dense)
    x = torch.randn(3, K, dtype=torch.bfloat16, requires_grad=True)
    for model in models:
        lx.attach(model, 4, target_modules="all-linear", init_std=0.1)
    adapter, other = (model[0] for model in models)
    assert adapter.A.dtype == torch.bfloat16 and adapter.base_layer is layer
    for got, wanted in ((adapter.delta_weight(), other.delta_weight()), (models[0](x), models[1](x.float()))):
        assert 0 < (got - wanted).norm() < 0.02 * wanted.norm()
    models[0](x).sum().backward()
    assert adapter.R.grad.any() and layer.weight.grad is None and layer.weight_scale_inv.grad is None
    with pytest.raises(TypeError, match=r"got a FP8Linear with .* torch\.float8_e4m3fn, must be an nn\.Linear or"):
        lx.merge(models[0])


def test_fp8_layers_that_hold_something_else():
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(K, N, block_size=(16, 16))
    layer.weight = nn.Parameter(torch.zeros(N, K // 2, dtype=torch.int8), requires_grad=False)  # two of fp4 in each
    with pytest.raises(TypeError, match=r"got a FP8Linear with .* shape \(32, 32\) and dtype torch.int8, must be"):
        weight_of(layer)
    layer.weight = nn.Parameter(torch.randn(N, K))  # as transformers dequantises it
    assert weight_of(layer).read().data_ptr() == layer.weight.data_ptr()
    derived = type("FP8GroupedLinear", (fp8.FP8Linear,), {})(K, N, block_size=(16, 16))
    with pytest.raises(TypeError, match="got a FP8GroupedLinear with"):
        weight_of(derived)


def test_a_layer_of_compressed_tensors_says_how_to_load_it():
    layer = nn.Linear(K, N)
    layer.quantization_scheme = object()
    del layer.weight  # it is packed until the first forward
    with pytest.raises(TypeError, match=r"got a Linear that compressed-tensors .*Config\(dequantize=True\) loads it"):
        weight_of(layer)


def test_4bit_layers_say_their_dtype_and_lose_nothing_by_it(bnb):
    linear = nn.Linear(K, N)
    exact = weight_of(linear4bit(linear, compute_dtype=torch.float16)).read()
    for compute_dtype in (torch.bfloat16, torch.float16, torch.float32, None):
        layer = linear4bit(linear, compute_dtype=compute_dtype)
        assert weight_of(layer).dtype == (compute_dtype or torch.float32)
        assert torch.equal(weight_of(layer).read(), exact)
    half = linear4bit(linear.bfloat16(), compute_dtype=None)
    assert weight_of(half).dtype == torch.bfloat16 == half.weight.quant_state.dtype
    own = bnb.functional.dequantize_4bit(half.weight.data, half.weight.quant_state)
    assert own.dtype == torch.bfloat16 and half.weight.quant_state.dtype == torch.bfloat16
    torch.testing.assert_close(weight_of(half).read().bfloat16(), own, rtol=2**-7, atol=0)


def test_int8_layers_that_keep_a_float_weight(bnb):
    layer = bnb.nn.Linear8bitLt(K, N)  # has_fp16_weights: quantised in every forward
    assert weight_of(layer.half()).dtype == torch.float16
    assert torch.equal(weight_of(layer).read(), layer.weight.detach())


def test_layers_that_are_not_as_they_will_be_are_refused(bnb):
    for layer in (bnb.nn.Linear4bit(K, N), bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)):
        with pytest.raises(
            TypeError, match=r"module 'q': got a Linear\dbit\w* .* no scales yet, must be quantised first"
        ):
            LoraXSLinear.from_linear(layer, 4, name="q")
    packed = linear4bit(nn.Linear(K, N))
    # What Linear4bit.forward does in eval mode where the CPU has AVX512-BF16, here wherever the test runs.
    packed.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(packed.weight.data, packed.weight.quant_state)
    with pytest.raises(TypeError, match=r"module 'q': .* packed anew and rounded .* load the model again"):
        LoraXSLinear.from_linear(packed, 4, name="q")


def test_shapes_are_known_on_the_meta_device(bnb):
    for layer in (
        bnb.nn.Linear4bit(K, N, compute_dtype=torch.bfloat16, device="meta"),
        bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False, device="meta"),
    ):
        adapted = LoraXSLinear.from_linear(layer, 4)
        assert adapted.A.is_meta and adapted.A.shape == (4, K) and adapted.B.shape == (N, 4)
        assert adapted.A.dtype == weight_of(layer).dtype


@everywhere
def test_adapters_on_a_quantised_model(kind):
    """Matched, made from the W that is read, trained through the quantised base, taken off again."""
    model = model_of(kind)
    before = snapshot(model)
    dense = [weight_of(model[i]).read() for i in (0, 2)]
    assert match(model, "all-linear") == ["0", "2"]
    lx.attach(model, 8, target_modules="all-linear", alpha=16)
    layers = adapters(model)
    for layer, W in zip(layers, dense, strict=True):
        S = torch.linalg.svdvals(W)[:8]
        assert layer.A.dtype == layer.B.dtype == (torch.bfloat16 if kind in ("nf4", "fp4") else torch.float32)
        torch.testing.assert_close(layer.A.float().norm(dim=1), S, rtol=2e-2, atol=0)
        nn.init.normal_(layer.R, std=0.3)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.R", "2.R"]

    x = torch.randn(5, K)
    y = model(x)
    W0, W2 = (effective(layer.base_layer) for layer in layers)
    R0, R2 = (layer.R.detach().clone().requires_grad_() for layer in layers)
    delta = [2 * layer.B.float() @ R @ layer.A.float() for layer, R in zip(layers, (R0, R2), strict=True)]
    bias = [layer.bias.detach().float() for layer in layers]
    right = F.linear(F.gelu(F.linear(x, W0 + delta[0], bias[0])), W2 + delta[1], bias[1])
    tolerance = dict(rtol=3e-2, atol=3e-2) if kind in ("nf4", "fp4") else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y, right, **tolerance)
    got = torch.autograd.grad(y.square().sum(), [layer.R for layer in layers])
    for g, r in zip(got, torch.autograd.grad(right.square().sum(), (R0, R2)), strict=True):
        assert (g - r).norm() < tolerance["rtol"] * r.norm()

    for call in (lx.merge, lambda m: lx.detach(m, merge=True)):
        with pytest.raises(TypeError, match=r"module '0': got a Linear\w* with a \w+ weight .* to merge into"):
            call(model)
    assert adapters(model) == layers and not any(layer.merged for layer in layers)
    lx.detach(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_a_layer_that_quantises_its_input_is_refused_where_a_gradient_would_be_lost(way):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao, to quantise as it does")
    model = model_of()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    if way == "attach":
        lx.attach(model, 4, target_modules="all-linear")
    else:
        peft = pytest.importorskip("peft")
        from loraxs_kernels.integrations.peft import LoraXSConfig

        model = peft.get_peft_model(model, LoraXSConfig(r=4, target_modules=["0", "2"]))
    x = torch.randn(5, K)
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match=r"module '2': its base layer, a Linear with a \w+ weight, passes no"):
        model(x)


@everywhere
def test_a_failed_attach_changes_nothing(kind):
    model = model_of(kind)
    model[2] = nn.Linear(96, N)
    nn.init.constant_(model[2].weight, float("nan"))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"module '2': W: .* finite"):
        lx.attach(model, 8, target_modules="all-linear")
    with pytest.raises(ValueError, match=r"rank: got 65 for module '0' of shape 96 x 64"):
        lx.attach(model, 65, target_modules="all-linear")
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["nf4", "bnb int8"])
def test_the_adapter_file_of_a_quantised_model(kind, tmp_path):
    model = model_of(kind)
    fresh, x = copy.deepcopy(model), torch.randn(5, K)
    lx.attach(model, 8, target_modules="all-linear", seed=3)
    for layer in adapters(model):
        nn.init.normal_(layer.R, std=0.3)
    y = model(x)
    lx.save_adapter(model, tmp_path / "adapter.safetensors")
    lx.load_adapter(fresh, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(fresh(x), y)
    for ours, theirs in zip(adapters(fresh), adapters(model), strict=True):
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.R, theirs.R)
    with pytest.raises(lx.AdapterMismatch, match="relative error of delta W in module"):
        lx.load_adapter(model_of(kind), tmp_path / "adapter.safetensors")


def test_given_factors_take_the_dtype_a_quantised_layer_computes_in():
    layer = linear4bit(nn.Linear(K, N))
    adapted = LoraXSLinear.from_linear(layer, 4, init=(torch.randn(4, K), torch.randn(N, 4)))
    assert adapted.A.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=rf"must be \(4, {K}\) and \({N}, 4\)"):
        LoraXSLinear.from_linear(layer, 4, init=(torch.randn(4, K + 1), torch.randn(N, 4)))


# Layers that only their author knows.


class Halved(nn.Module):
    """Its weight in two halves, and no attribute that tells."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("left", linear.weight.detach()[:, : K // 2].clone())
        self.register_buffer("right", linear.weight.detach()[:, K // 2 :].clone())

    def forward(self, x):
        return x[..., : K // 2] @ self.left.T + x[..., K // 2 :] @ self.right.T


class HalvedAgain(Halved):
    pass


def whole(layer: Halved) -> torch.Tensor:
    return torch.cat([layer.left, layer.right], 1)


@pytest.fixture
def register():
    """lx.register_weight_reader, undone at the end of the test."""
    registered = []

    def register(layer_type, read, **options):
        registered.append(layer_type)
        lx.register_weight_reader(layer_type, read, **options)

    yield register
    for layer_type in registered:
        lx.register_weight_reader(layer_type, None)


def test_a_registered_layer_is_adapted_like_any_other(register):
    linear = nn.Linear(K, N, bias=False)
    model = nn.Sequential(Halved(linear), nn.GELU())
    for target_modules, found in (
        (["0"], "matches module '0'"),
        ("all-linear", "finds only layers such as '0'"),
    ):
        with pytest.raises(TypeError, match=rf"{found}, a Halved, .* lx\.register_weight_reader\(Halved, read\)"):
            lx.attach(model, 4, target_modules=target_modules)
    reads = []
    register(Halved, lambda layer: reads.append(layer) or whole(layer))
    lx.attach(model, 4, target_modules="all-linear")
    expected = LoraXSLinear.from_linear(copy.deepcopy(linear), 4, name="0")
    assert torch.equal(model[0].A, expected.A) and torch.equal(model[0].B, expected.B) and len(reads) == 1
    nn.init.normal_(model[0].R)
    x = torch.randn(3, K)
    torch.testing.assert_close(model[0](x), F.linear(x, linear.weight + model[0].delta_weight()))
    model[0](x).sum().backward()
    assert len(reads) == 1 and model[0].R.grad.any()
    with pytest.raises(TypeError, match=r"module '0': got a Halved, must be an nn\.Linear or Conv1D .* to merge into"):
        lx.merge(model)


def test_a_reader_may_fill_one_buffer_for_every_layer(register):
    buffer = torch.empty(N, K)
    register(Halved, lambda layer: buffer.copy_(whole(layer)))
    torch.set_num_threads(3)  # as many weights are in use at a time
    model = lx.attach(nn.Sequential(*(nn.Sequential(Halved(nn.Linear(K, N))) for _ in range(6))), 4)
    for (layer,) in model:
        U, S, Vh = lx.truncated_svd(whole(layer.base_layer), 4)
        torch.testing.assert_close(layer.B @ layer.A, U * S @ Vh, rtol=0, atol=1e-5)


def test_layers_that_share_a_parameter_but_not_what_is_read_of_it_have_factors_of_their_own(register):
    class Rescaled(nn.Module):
        def __init__(self, weight: nn.Parameter, factor: float):
            super().__init__()
            self.weight, self.factor = weight, factor
            self.out_features, self.in_features = weight.shape

    register(Rescaled, lambda layer: layer.factor * layer.weight)
    weight = nn.Parameter(torch.randn(N, K))
    first, second = adapters(lx.attach(nn.Sequential(Rescaled(weight, 1.0), Rescaled(weight, 3.0)), 4))
    torch.testing.assert_close(second.A.norm(dim=1), 3 * first.A.norm(dim=1))


class HQQLinear(nn.Module):
    """What HQQ's layer looks like: no nn.Linear, its weight packed under a name of its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.W_q = nn.Parameter(linear.weight.detach().mul(9).round().to(torch.int8).view(-1, 2), requires_grad=False)

    def forward(self, x):
        return x @ self.W_q.view(self.out_features, -1).to(x.dtype).T / 9


class Linear(nn.Module):
    """What torch_geometric's layer looks like: no nn.Linear, without in_features and out_features."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize("way", ["attach", "peft"])
def test_layers_of_a_kind_that_is_not_read_are_counted_and_refused_by_name(way, register):
    peft = pytest.importorskip("peft") if way == "peft" else None

    def attach(model, target_modules):
        if way == "attach":
            return lx.attach(model, 4, target_modules=target_modules)
        from loraxs_kernels.integrations.peft import LoraXSConfig

        return peft.get_peft_model(model, LoraXSConfig(r=4, target_modules=target_modules))

    def mixed():
        others = [nn.Bilinear(K, K, 4), nn.Conv1d(K, K, 1), nn.Identity(), nn.Sequential(nn.Linear(K, K))]
        others[-1].in_features = others[-1].out_features = K  # a container that says so
        others.append(Linear(nn.Parameter(torch.ones(K, K))))
        return nn.ModuleList([nn.Linear(K, K), HQQLinear(nn.Linear(K, K)), Halved(nn.Linear(K, N)), *others])

    with pytest.warns(UserWarning) as warned:
        model = attach(mixed(), "all-linear")
    (text,) = [str(each.message) for each in warned if "leaves out" in str(each.message)]
    assert "leaves out 3 layers that cannot be adapted; the first, '1', is a HQQLinear, whose weight" in text
    assert "lx.register_weight_reader(HQQLinear, read)" in text
    assert sum(hasattr(m, "base_layer") for m in model.modules()) == 2
    model, message = mixed(), r"matches module '1', a HQQLinear.* lx\.register_weight_reader\(HQQLinear, read\)"
    before = snapshot(model)
    with pytest.raises(TypeError, match=message):
        attach(model, ["0", "1"])
    assert snapshot(model) == before
    with pytest.raises(TypeError, match=rf"matches module '7', a {__name__}.Linear, whose weight"):
        attach(model, ["0", "7"])
    register(HQQLinear, lambda layer: layer.W_q.view(K, K).float() / 9)
    assert hasattr(
        attach(model, ["0", "1"]).get_submodule("1" if way == "attach" else "base_model.model.1"), "base_layer"
    )
    register(Halved, whole)
    with pytest.warns(UserWarning, match="leaves out 1 layer that"):
        model = attach(mixed(), "all-linear")
    assert {type(m.base_layer) for m in model.modules() if hasattr(m, "base_layer")} == {nn.Linear, HQQLinear, Halved}
    if way == "peft":  # the layers have other names below the first adapter's
        with pytest.warns(UserWarning, match="leaves out 1 layer that"):
            model.add_adapter("second", type(model.peft_config["default"])(r=4, target_modules="all-linear"))
        first, second = (model.peft_config[name].target_modules for name in ("default", "second"))
        assert first == second == {"0", "1", "2", "6.0"}


def test_the_most_specific_reader_wins_and_users_readers_over_ours(register):
    layer, linear = HalvedAgain(nn.Linear(K, N)), nn.Linear(K, N)
    register(Halved, whole)
    assert torch.equal(weight_of(layer).read(), whole(layer))
    register(HalvedAgain, lambda layer: 2 * whole(layer))
    register(Halved, lambda layer: 3 * whole(layer))
    assert torch.equal(weight_of(layer).read(), 2 * whole(layer))
    lx.register_weight_reader(HalvedAgain, None)
    assert torch.equal(weight_of(layer).read(), 3 * whole(layer))
    register(nn.Linear, lambda layer: 4 * layer.weight)
    assert torch.equal(weight_of(linear).read(), 4 * linear.weight.detach())
    lx.register_weight_reader(nn.Linear, None)
    assert torch.equal(weight_of(linear).read(), linear.weight.detach())


def test_a_registered_layers_shape_dtype_and_device(register):
    class Odd(nn.Module):
        """No features by name, a compute_dtype as quantised layers have, only integers for a weight."""

        compute_dtype = torch.float16

        def __init__(self, device=None):
            super().__init__()
            self.register_buffer("codes", torch.zeros(K, N, dtype=torch.int8, device=device))

    register(Odd, lambda layer: layer.codes.t().half())
    with pytest.raises(TypeError, match=r"module 'q': .* an? Odd's, is given as \(None, None\), must be two integers"):
        LoraXSLinear.from_linear(Odd(), 4, name="q")
    register(Odd, lambda layer: layer.codes.t().half(), shape=lambda layer: layer.codes.t().shape)
    W = weight_of(Odd())
    assert (W.shape, W.dtype, W.read().shape) == ((N, K), torch.float16, (N, K))
    assert LoraXSLinear.from_linear(Odd("meta"), 4).A.is_meta
    del Odd.compute_dtype
    assert weight_of(Odd()).dtype == torch.float32


BAD = {
    "shape": (lambda layer: whole(layer).t(), ValueError, r"gave shape \(64, 32\), must be .* of shape \(32, 64\)"),
    "no tensor": (lambda layer: whole(layer).numpy(), TypeError, r"gave array\(.*must be a dense tensor"),
    "nothing": (lambda layer: None, TypeError, r"gave None, must be a dense tensor"),
    "integers": (lambda layer: whole(layer).to(torch.int8), TypeError, r"gave a Tensor of torch\.int8, .* must be"),
    "sparse": (
        lambda layer: whole(layer).to_sparse(),
        TypeError,
        r"gave a Tensor .* torch\.sparse_coo on cpu, must be a dense",
    ),
    "no values": (lambda layer: whole(layer).to("meta"), TypeError, r"gave a Tensor .* on meta, .*, with its values"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_reader_returns_is_checked(register, case):
    read, error, message = BAD[case]
    register(Halved, read)
    model = nn.Sequential(nn.Linear(K, K), Halved(nn.Linear(K, N)))
    before = snapshot(model)
    with pytest.raises(error, match=rf"(?s)module '1': reading the weight of a Halved {message}"):
        lx.attach(model, 4, target_modules="all-linear")
    assert snapshot(model) == before


def test_what_is_registered_is_checked():
    with pytest.raises(TypeError, match=r"layer_type: got 'Linear', must be a subclass of nn\.Module"):
        lx.register_weight_reader("Linear", whole)
    with pytest.raises(TypeError, match=r"read: got 3 for Halved, must be a function"):
        lx.register_weight_reader(Halved, 3)
    with pytest.raises(TypeError, match=r"shape: got \(2, 3\) for Halved, must be a function"):
        lx.register_weight_reader(Halved, whole, shape=(2, 3))
    lx.register_weight_reader(Halved, None)  # nothing to take back


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Packed(nn.Linear):
    """Somebody's quantised layer: two weights in one number, and scales."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features)
        self.weight = nn.Parameter(linear.weight.detach()[:, ::2].clone())

    def forward(self, x):
        return x[..., ::2] @ self.weight.T


def weight_normed(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "made",
    [
        nn.utils.parametrizations.weight_norm,
        weight_normed,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["parametrized", "weight_norm", "pruned"],
)
def test_a_weight_that_is_made_from_others_is_not_merged_into(made):
    model = nn.Sequential(nn.Linear(K, K), made(nn.Linear(K, N)))
    lx.attach(model, 4, target_modules="all-linear")
    before, x = snapshot(model), torch.randn(3, K)
    y = model(x)
    for merge in (lx.merge, lambda model: lx.detach(model, merge=True)):
        with pytest.raises(TypeError, match=r"module '1': got a \w*Linear .*is a parameter, not made from oth"):
            merge(model)
        assert snapshot(model) == before and torch.equal(model(x), y)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: prune.l1_unstructured(model[0].base_layer, "weight", 0.5),
        lambda model: parametrize.register_parametrization(model[0].base_layer, "weight", nn.Tanh()),
        lambda model: torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True),
        lambda model: setattr(model[0], "base_layer", torchao(model[0].base_layer, 8)),
    ],
    ids=["pruned", "parametrized", "replaced", "quantised"],
)
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_what_is_done_to_the_base_of_a_merged_layer_is_not_ignored(change):
    """It would leave the merged weight as it is: a model that is not quantised, and is saved so."""
    model, x = lx.attach(nn.Sequential(nn.Linear(K, N)), 4, init_std=0.3).eval(), torch.randn(3, K)
    expected = model(x)
    lx.merge(model)
    change(model)
    for use in (lambda: model(x), model.state_dict, lambda: model[0].weight):
        with pytest.raises(RuntimeError, match=r"base layer, now a \w*Linear, was quantised.*lx\.detach\(model, merge"):
            use()
    model[0].unmerge()
    assert model(x).shape == expected.shape and not torch.equal(model(x), expected)


@pytest.mark.parametrize("instead", [None, torch.zeros(0)], ids=["freed", "flattened"])
def test_a_merged_layer_needs_no_weight_of_its_base(instead):
    """FSDP1 leaves a plain tensor in its place (use_orig_params=False)."""
    model, x = lx.attach(nn.Sequential(nn.Linear(K, N)), 4, init_std=0.3), torch.randn(3, K)
    expected = model(x)
    lx.merge(model)
    del model[0].base_layer.weight
    model[0].base_layer.weight = instead
    torch.testing.assert_close(model.eval()(x), expected)
    torch.testing.assert_close(nn.functional.linear(x, *model.state_dict().values()), expected)


def test_a_weight_in_float8_is_not_merged_into():
    """As diffusers' layerwise casting stores weights."""
    model = lx.attach(nn.Sequential(nn.Linear(K, N)), 4)
    model[0].base_layer.weight.data = model[0].base_layer.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"module '0': got a Linear .*torch\.float8_e4m3fn, must be .* in bf16, fp16"):
        lx.merge(model)


class Half(prune.BasePruningMethod):
    """A user's own."""

    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask * (t > t.median())


@pytest.mark.parametrize("made", [weight_normed, nn.utils.spectral_norm, lambda m: Half.apply(m, "weight") and m])
def test_a_weight_that_a_hook_makes_is_that_of_the_state_dict(made):
    """Before the first forward `weight` is still the one of the parameters that were there before it."""
    model, trained = made(nn.Linear(K, N)), made(nn.Linear(K, N))
    trained(torch.randn(3, K))
    model.load_state_dict(trained.state_dict())
    assert not torch.equal(model.weight, trained.weight)
    before = model.weight
    W, left = weight_of(model).read(), {name: t.clone() for name, t in model.state_dict().items()}
    assert model.weight is before  # with its gradient
    model.eval()(torch.randn(3, K))
    assert torch.equal(W, model.weight) and all(torch.equal(t, left[name]) for name, t in model.state_dict().items())


def test_a_linear_with_a_forward_of_its_own_is_called_and_the_delta_added():
    model = nn.Sequential(nn.Linear(K, K), Scaled(K, N))
    plain = nn.Linear(K, N)
    plain.load_state_dict(model[1].state_dict())
    before, x = snapshot(model), torch.randn(3, K)
    lx.attach(model, 4, target_modules="all-linear", alpha=8)
    expected = LoraXSLinear.from_linear(plain, 4, name="1")
    layer = model[1]
    assert torch.equal(layer.A, expected.A) and torch.equal(layer.B, expected.B)
    nn.init.normal_(layer.R)
    h = model[0](x)
    torch.testing.assert_close(model(x), 2 * plain(h) + h @ layer.delta_weight().T)
    gR = torch.autograd.grad(model(x).sum(), layer.R)[0]
    torch.testing.assert_close(gR, 2 * layer.B.sum(0)[:, None] * (h @ layer.A.T).sum(0))
    with pytest.raises(TypeError, match=r"module '1': got a Scaled .* with that class's forward .* to merge into"):
        lx.merge(model)
    assert snapshot(lx.detach(model)) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.int8], ids=str)
def test_a_quantised_class_derived_from_linear_is_refused(dtype):
    layer = Packed(nn.Linear(K, N)) if dtype == torch.float32 else Scaled(K, N)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    name = type(layer).__name__
    with pytest.raises(
        TypeError, match=rf"module 'q': got a {name} .* If it is quantised, lx\.register_weight_reader can"
    ):
        LoraXSLinear.from_linear(layer, 4, name="q")


# Weights that are sharded over ranks.


@pytest.fixture
def mesh():
    """One rank, on the CPU."""
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_weights_are_gathered(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    linear = nn.Linear(K, N)
    sharded = copy.deepcopy(linear)
    for dim in (0, 1):
        sharded.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Shard(dim)]))
        layer, expected = (LoraXSLinear.from_linear(each, 4) for each in (sharded, linear))
        assert type(layer.A) is torch.Tensor and torch.equal(layer.A, expected.A) and torch.equal(layer.B, expected.B)
        with pytest.raises(TypeError, match=r"got a Linear with a DTensor weight .* to merge into"):
            layer.merge()


@pytest.mark.parametrize("first", ["shard", "attach"])
def test_fsdp2_models_train_like_whole_ones(mesh, first):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(model_of(), model_of())
    model[1][0] = nn.Linear(N, 96)
    expected = lx.attach(copy.deepcopy(model), 4, target_modules="all-linear")

    def attach():
        lx.attach(model, 4, target_modules="all-linear")

    def shard():
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    for step in (shard, attach) if first == "shard" else (attach, shard):
        step()
    assert type(adapters(model)[0].base_layer.weight).__name__ == "DTensor"
    x = torch.randn(5, K)
    for each in (model, expected):
        each(x).square().sum().backward()
    for ours, theirs in zip(adapters(model), adapters(expected), strict=True):
        gR = ours.R.grad if first == "shard" else ours.R.grad.full_tensor()
        torch.testing.assert_close(gR, theirs.R.grad)
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)


def test_fsdp2_models_of_the_meta_device_are_filled_after_sharding(mesh):
    """torch's own order for models that no rank can hold: shapes, shards, memory, weights; and A, B, R in the end."""
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    expected = lx.attach(copy.deepcopy(model), 4, target_modules="all-linear")
    sharded = lx.attach(copy.deepcopy(model).to("meta"), 4, target_modules="all-linear")
    fully_shard(sharded, mesh=mesh).to_empty(device="cpu")
    for ours, theirs in zip(adapters(sharded), adapters(expected), strict=True):
        for p, q in zip(ours.base_layer.parameters(), theirs.base_layer.parameters(), strict=True):
            assign(p.detach(), q)
        nn.init.zeros_(ours.R)
        ours.reset_parameters()
        assert type(ours.R.data).__name__ == "DTensor" and torch.equal(ours.R.full_tensor(), theirs.R)
        assert torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B)


def two_ranks(rank: int, store: str) -> None:
    """What needs a second rank: pieces that are really missing here, and of unequal size."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        linear = nn.Linear(40, 25)
        expected = LoraXSLinear.from_linear(copy.deepcopy(linear), 4, name="0")

        def check(model: nn.Sequential) -> None:
            lx.attach(model, 4, target_modules=["0"])
            assert torch.equal(model[0].A, expected.A) and torch.equal(model[0].B, expected.B)

        model = nn.Sequential(copy.deepcopy(linear), nn.Linear(25, 8))
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        check(fully_shard(model, mesh=mesh))
        for use_orig_params in (True, False):
            model = nn.Sequential(copy.deepcopy(linear), nn.Linear(25, 8))
            wrapped = FSDP(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
            with pytest.raises(
                TypeError,
                match=r"module '0': got a Linear .* a part that FullyShardedDataParallel keeps here, must be whole",
            ):
                lx.attach(model, 4, target_modules=["0"])
            with FSDP.summon_full_params(wrapped, writeback=False):
                check(model)
            wrapped(torch.randn(3, 40)).sum().backward()
            assert model[0].R.grad.any()
        # Attached first, so that R is sharded with the rest and its gradient reduced.
        alone = lx.attach(nn.Sequential(copy.deepcopy(linear), nn.Linear(25, 8)), 4, target_modules=["0"])
        nn.init.normal_(alone[0].R)
        model = fully_shard(copy.deepcopy(alone), mesh=mesh)
        x = torch.randn(2, 3, 40)
        model(x[rank]).sum().backward()
        (alone(x).sum() / 2).backward()
        torch.testing.assert_close(model[0].R.grad.full_tensor(), alone[0].R.grad)
        file = f"{store}-{rank}.safetensors"
        lx.save_adapter(model, file)
        R = alone[0].R.detach().clone()
        for each in (alone, model):
            nn.init.zeros_(each[0].R)
            lx.load_adapter(each, file)
        assert torch.equal(alone[0].R, R) and torch.equal(model[0].R.full_tensor(), R)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # in the ordinary way a thread of torch's own, not yet joined, aborts the process now and then


def test_weights_sharded_over_two_ranks(tmp_path):
    if not dist.is_available():
        pytest.skip("this torch has no distributed package")
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path / "store"),), nprocs=2)


@pytest.fixture
def zero3(monkeypatch):
    """Stands in for DeepSpeed, which is not installed: a parameter that holds nothing outside GatheredParameters."""
    gathered = []

    @contextlib.contextmanager
    def gather(params, modifier_rank=None):
        for p in params:
            assert p.numel() == 0, "DeepSpeed refuses to gather a parameter twice"
            p.data = p.ds_tensor.clone()
        gathered.append(len(params))
        yield
        for p in params:
            if modifier_rank is not None:
                p.ds_tensor.copy_(p.data)
            p.data.fill_(float("nan") if p.is_floating_point() else 0)  # another's memory now
            p.data = torch.empty(0, dtype=p.dtype)

    deepspeed = types.ModuleType("deepspeed")
    deepspeed.zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)

    def partition(layer: nn.Module, *names: str) -> nn.Module:
        for p in map(layer.get_parameter, names or ("weight",)):
            p.ds_id, p.ds_shape, p.ds_tensor = 0, p.shape, p.data.clone()
            p.data = torch.empty(0, dtype=p.dtype)
        return layer

    return types.SimpleNamespace(partition=partition, gathered=gathered)


@pytest.mark.parametrize("layer", [nn.Linear(K, N), Conv1D(N, K)], ids=["linear", "conv1d"])
def test_zero3_weights_are_gathered_one_at_a_time(zero3, layer):
    expected = LoraXSLinear.from_linear(copy.deepcopy(layer), 4, name="0")
    model = nn.Sequential(zero3.partition(copy.deepcopy(layer)))
    assert weight_of(model[0]).shape == (N, K) and zero3.gathered == []
    lx.attach(model, 4, target_modules=["0"])
    assert torch.equal(model[0].A, expected.A) and torch.equal(model[0].B, expected.B)
    assert zero3.gathered == [1] and model[0].base_layer.weight.numel() == 0
    with pytest.raises(TypeError, match=r"module '0': .* to merge into"):
        lx.merge(model)


@pytest.mark.parametrize("parametrized", [False, True])
def test_adapters_that_zero3_has_partitioned_are_saved_and_loaded(zero3, tmp_path, parametrized):
    """Also an R that is made of another parameter; and what a load that fails has changed is put back."""

    class Double(nn.Module):
        def forward(self, R):
            return 2 * R

        def right_inverse(self, R):
            return R / 2

    def make(times: float = 1.0) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, 3))
        lx.attach(model, 4, target_modules=["0"], modules_to_save=["1"], init_std=0.3)
        if parametrized:
            parametrize.register_parametrization(model[0], "R", Double())
        for p in model.parameters():
            p.data *= times if p.requires_grad else 1
        return model

    expected, sharded, files = make(), make(), [tmp_path / name for name in "abc"]
    made = "0.parametrizations.R.original" if parametrized else "0.R"
    zero3.partition(sharded, made, "1.weight", "1.bias")
    for model, file in zip((expected, sharded), files, strict=False):
        lx.save_adapter(model, file)
    assert files[0].read_bytes() == files[1].read_bytes() and max(zero3.gathered) == 1
    assert sharded.get_parameter(made).shape == (0,)
    other = zero3.partition(make(0.5), made, "1.weight", "1.bias")
    lx.save_adapter(other, files[2])
    before = files[2].read_bytes()

    def fails(t, value):
        assign(t, value)
        raise OSError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(adapter_file, "assign", fails)
        lx.load_adapter(other, files[0])
    lx.save_adapter(other, files[2])
    assert files[2].read_bytes() == before
    lx.load_adapter(other, files[0])
    lx.save_adapter(other, files[2])
    assert files[2].read_bytes() == files[0].read_bytes() != before


def test_zero3_weights_that_are_gathered_already_and_quantised_ones(zero3):
    layer = zero3.partition(nn.Linear(K, N))
    layer.weight.data = layer.weight.ds_tensor.clone()
    assert torch.equal(weight_of(layer).read(), layer.weight.ds_tensor) and zero3.gathered == []
    quantised = linear4bit(nn.Linear(K, N))
    expected = weight_of(quantised).read()
    assert torch.equal(weight_of(zero3.partition(quantised)).read(), expected) and zero3.gathered == [1]
