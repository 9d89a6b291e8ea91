"""Weights that a model's own code reads without calling their layers: where an adapter would have no effect."""

from __future__ import annotations

import ast
import copy
import importlib
import linecache
import pickle
import re
import types
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels import LoraXSLinear
from loraxs_kernels.matching import match
from loraxs_kernels.reads import NOT_WHILE_IT_RUNS, reads_of


def helped(self, x):
    return x @ self.helper.weight


class Block(nn.Module):
    """One layer for each way to read a weight, and for each that only looks like one."""

    NAMES = (
        *("called", "aliased", "rebound", "looped", "counted", "returned", "helped", "partly", "nested", "read_if"),
        *("listed", "in_tuple", "zipped", "sliced", "valued", "by_name", "by_a_name"),
        *(
            "read_if_changed",
            "read_if_either",
            "walrus",
            "asked",
            "cast",
            "compared",
            "tied",
            "not_read_if",
            "initialised",
        ),
    )

    def __init__(self, exact: bool):
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, nn.Linear(4, 4))
        self.helper, self.blocks, self.exact, self.changed = self.helped, nn.ModuleList([self.looped]), exact, False
        self.more = nn.ModuleList([self.counted])
        self.inner = nn.ModuleDict({"partly": self.partly})
        self.parts = nn.ModuleList([self.sliced])
        self.named = nn.ModuleDict({"valued": self.valued})
        self.box = nn.ModuleDict({"by_a_name": self.by_a_name})
        self.reset_parameters()

    def get_param_groups(self):
        return [{"params": layer.weight} for layer in (self.called, self.asked)]

    def reset_parameters(self):
        nn.init.zeros_(self.initialised.weight)

    def qk_clip_(self, scale):
        self.called.weight.mul_(scale)

    def train(self, mode: bool = True):
        self.changed = not mode
        return super().train(mode)

    def get_output_embeddings(self):
        return self.returned

    def later(self):
        return lambda: self.nested.weight.sum()

    def local_init(self):
        self.initialised.weight.zero_()

    @property
    def part(self):
        return self.inner.partly.weight[:, :2]

    @torch.no_grad()
    def forward(self, x):
        x = self.called(x.to(self.called.weight.dtype)) + torch.zeros_like(self.asked.weight)
        self.logged = self.called.weight.detach().norm(), torch.linalg.vector_norm(self.cast.weight)
        if x.ndim > 2:
            first = self.aliased
        again = first
        weight = again.weight
        x = F.linear(x, weight)
        layer = self.rebound
        x = x @ layer.weight.t()
        for each in self.blocks:
            x = x @ each.weight
        for _, each in enumerate(self.more):
            x = x @ each.weight
        some = [self.listed]
        for each in some:
            x = x @ each.weight
        x = x @ torch.cat([each.weight for each in (self.in_tuple,)])
        for _, each in zip(self.blocks, (self.zipped,), strict=True):
            x = x @ each.weight
        x = x @ self.parts[:1][0].weight
        for each in reversed(self.named.values()):
            x = x @ each.weight
        for suffix in ("a_name",):
            x = x @ getattr(self.box, f"by_{suffix}").weight @ getattr(self, "by_name").weight  # noqa: B009
        x = x * getattr(self.called, "weight").sum()  # noqa: B009
        head = self.get_output_embeddings()
        x = helped(self, x @ head.weight)
        mode = self.exact
        if x.ndim > 2:
            mode = not mode
        if not mode:
            x = x @ self.read_if_either.weight
        x = x @ named.weight if (named := self.walrus) else x
        if self.exact and x.ndim > 1:
            x = x @ self.read_if.weight
        if not self.exact and x.ndim > 1:
            x = x @ self.not_read_if.weight
        if self.changed:
            x = x @ self.read_if_changed.weight
        dtype = self.cast.weight
        x = x.to(dtype.dtype).to(self.cast.weight)
        if self.compared.weight is not None and isinstance(self.compared.weight, nn.Parameter):
            self.tied.weight = self.asked.weight
        return self.compared(self.tied(self.cast(x))) + self.later()()


NOT_READ = {"called", "asked", "cast", "compared", "tied", "not_read_if", "initialised"}


def test_reads_are_told_from_what_only_asks_or_never_runs():
    said = r"leaves out 18 layers that .* 'aliased', is of a Block, .* \(in Block.forward"
    with pytest.warns(UserWarning, match=said):
        assert set(match(Block(exact=True), "all-linear")) == NOT_READ
    model = nn.Sequential(Block(exact=False))
    with pytest.raises(TypeError, match=r"'0.not_read_if' of a Block, which reads .* \(in Block.forward\): an adapter"):
        match(model, ["not_read_if"])
    with pytest.raises(TypeError, match=r"'0.partly' of a Block, .* \(in Block.part\)"):
        match(model, ["partly"])
    with pytest.raises(TypeError, match=r"'returned' of a Block, which reads"):  # "all-linear" takes it for the head
        match(model[0], ["returned"])
    assert match(model, ["read_if", "called"]) == ["0.called", "0.read_if"]


class Wrapper(nn.Module):
    """Stands in for the layer in it, whose weight it has as its own."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    @property
    def weight(self):
        return self.linear.weight

    def forward(self, x):
        return self.linear(x)


class Computing(Wrapper):
    def forward(self, x):
        return F.linear(x, self.weight)


class OfWrappers(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read, self.computing = Wrapper(), Wrapper(), Computing()

    def freeze(self):
        for p in (self.called.weight, self.read.weight):
            p.requires_grad = False

    def forward(self, x):
        if torch.is_tensor(self.called.weight):
            x = x.to(self.called.weight.data.dtype).view(-1, self.called.weight.T.shape[0])
        return F.linear(self.called(self.computing(x)), self.read.weight)


def test_the_weight_of_a_wrapper_is_read_where_the_wrapper_s_is():
    with pytest.warns(UserWarning, match=r"leaves out 2 layers .* 'read.linear', is of a OfWrappers, which reads"):
        assert match(OfWrappers(), "all-linear") == ["called.linear"]


def test_a_file_that_was_edited_after_its_import_is_no_source(tmp_path, monkeypatch):
    file = tmp_path / "loraxs_edited.py"
    file.write_text("from torch import nn\nclass M(nn.Sequential):\n    def forward(self):\n        self[0].weight\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = importlib.import_module("loraxs_edited").M(nn.Linear(4, 4))
    file.write_text("(\n" * 4)
    linecache.checkcache(str(file))
    assert match(model, "all-linear") == ["0"]


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return F.linear(self.inner(x), self.inner[0].weight)


def test_a_module_far_above_the_layer_may_read_it():
    model = nn.Sequential(Around(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
    with pytest.raises(
        TypeError, match=r"'all-linear' finds only layers such as '0\.inner\.0', of a Around, which reads"
    ):
        match(model, "all-linear")  # which of the two inner[0] is, is not told


# What the models of transformers read: {class: its layers}.  All but the last line take no adapter.
READ_BY_TRANSFORMERS = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), "out_proj x_proj dt_proj"),
    **dict.fromkeys(
        ("Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer", "Zamba2MambaMixer"), "out_proj"
    ),
    **{"GraniteMoeHybridMambaLayer": "out_proj", "JambaMambaMixer": "dt_proj"},
    **{"WavLMAttention": "q_proj k_proj v_proj out_proj", "VideoMAESelfAttention": "query key value"},
    **dict.fromkeys(("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap"), "k_proj k_linear"),
    **{"MaskFormerDetrMHAttentionMap": "k_proj k_linear", "DabDetrMHAttentionMap": "k_linear"},
    **dict.fromkeys(("LayoutLMv2Encoder", "LayoutLMv3Encoder"), "rel_pos_bias rel_pos_x_bias rel_pos_y_bias"),
    **{"PPDocLayoutV2ReadingOrderEncoder": "rel_pos_bias", "LSHSelfAttention": "query_key value"},
    **{"MobileBertLMPredictionHead": "dense decoder", "NeoMMEForMaskedLM": "unembedding_projection"},
    **{"LongcatFlashTopkRouter": "classifier", "Gemma3nTextAltUp": "correction_coefs prediction_coefs"},
    **{"TDNNLayer": "kernel", "DeepseekV2Moe": "gate", "DeepseekOcr2TextMoe": "gate"},
    # only where a setting or an argument asks for it
    **{"BloomAttention": "dense", "BloomMLP": "dense_4h_to_h", "DisentangledSelfAttention": "in_proj"},
    **dict.fromkeys(("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), "lm_head"),
}


def test_every_weight_that_transformers_reads_without_calling_its_layer_is_known():
    found, must = set(), set()
    known = {(kind, name) for kind, names in READ_BY_TRANSFORMERS.items() for name in names.split()}
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for text in re.findall(r"^class .*\n(?:(?:[ )].*)?\n)*", file.read_text(encoding="utf-8"), re.MULTILINE):
            linear = set(re.findall(r"self\.(\w+) = (?:nn\.)?Linear\(", text))
            if not (linear and re.search(r"self\.\w+\.weight\b(?!\.(dtype|device))", text)):
                continue
            kind, text = ast.parse(text).body[0], re.sub(r"#.*", "", text)
            must |= {(each, name) for each, name in known if each == kind.name and f"self.{name}.weight" in text}
            for method in (node for node in kind.body if isinstance(node, ast.FunctionDef)):
                layers = [] if NOT_WHILE_IT_RUNS.match(method.name) else [read.layer for read in reads_of(method)]
                found |= {(kind.name, layer[-1]) for layer in layers if layer[-1] in linear}
    assert ("MambaMixer", "out_proj") in must <= found <= known


def test_a_setting_decides_what_bloom_reads():
    sizes = dict(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    usual = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    assert len(match(usual, "all-linear")) == 4
    exact = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes, pretraining_tp=2, slow_but_exact=True))
    with pytest.raises(TypeError, match=r"'transformer\.h\.0\.self_attention\.dense' of a BloomAttention, which reads"):
        match(exact, ["dense"])


def test_what_only_an_argument_that_no_model_passes_would_read_is_adapted():
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = transformers.DebertaModel(transformers.DebertaConfig(**sizes))
    assert "encoder.layer.0.attention.self.in_proj" in match(model, "all-linear")


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.exact, self.ours, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() if isinstance(layer, (nn.Linear, nn.Conv1d)) else layer(x)
        x = self.exact(x) if type(self.exact) is nn.Linear else x
        x = self.ours(x) if isinstance(self.ours, (nn.Linear, LoraXSLinear)) else x
        return self.other(x) if isinstance(self.other, nn.Module) else x

    def told(self, type):
        return type() is nn.Linear  # a function of the caller's


def test_code_that_asks_for_linear_layers_would_not_find_adapted_ones():
    model = Asking()
    with pytest.warns(
        UserWarning, match=r"2 layers .* 'layers.0', is of a Asking, which asks whether .*Asking.forward"
    ):
        lx.attach(model, 2, init_std=0.0)
    assert [name for name, m in model.named_modules() if isinstance(m, LoraXSLinear)] == ["ours", "other"]


class Listing(nn.Module):
    """Holds layers beside its children, in each way that code has."""

    def __init__(self):
        super().__init__()
        for name in ("listed", "bound", "partial", "hidden", "child"):
            setattr(self, name, nn.Linear(4, 4))
        self.calls = {"first": [self.listed], "others": (self.bound.forward, partial(self.partial))}
        vars(self)["tied"] = self.hidden

    def forward(self, x):
        return self.child(self.calls["first"][0](x))


def test_layers_that_are_held_beside_the_children_are_left_out():
    model = nn.Sequential(Listing())
    said = r"4 layers .* '0.listed', is of a Listing, which also holds it in its attribute 'calls': an adapter wou"
    with pytest.warns(UserWarning, match=said):
        assert match(model, "all-linear") == ["0.child"]
    with pytest.raises(TypeError, match=r"'0.hidden' of a Listing, which also holds it in its attribute 'tied'"):
        match(model, ["hidden"])
    model[0].child.forward = partial(nn.Linear.forward, model[0].child)  # a layer that holds itself
    assert match(model, ["child"]) == ["0.child"]


def test_attributes_of_any_kind_are_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 4))
    model.itself = {}
    model.itself["update"] = partial(print, model.itself)
    model.gone = weakref.proxy(other := {1})
    del other
    assert type(lx.attach(model, 2)[0]) is LoraXSLinear


def test_a_layer_that_is_compiled_by_itself_is_refused_with_advice():
    model = nn.Sequential(torch.compile(nn.Linear(4, 4), backend="eager"))
    with pytest.raises(ValueError, match="is compiled by itself"):
        lx.attach(model, 2)


def test_a_function_put_in_the_place_of_forward_may_read():
    model = nn.Sequential(nn.Linear(4, 4))
    assert match(model, "all-linear") == ["0"]
    model.helper = model[0]
    model.forward = types.MethodType(helped, model)
    with pytest.raises(TypeError, match=r"'0' of a Sequential, which reads .* \(in .*test_reads\)"):
        match(model, ["0"])


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, **options).eval()


MASK = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def copied(model: nn.Module, way: str) -> nn.Module:
    return {"itself": lambda m: m, "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[way](
        model
    )


@pytest.mark.filterwarnings("ignore:target_modules. 'all-linear' leaves out 2 layers")
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "padding"])
@pytest.mark.parametrize("way", ["itself", "deepcopy", "pickle"])
def test_torchs_encoder_uses_its_adapters_in_eval_mode(way, mask):
    model = copied(lx.attach(encoder(), 4, init_std=0.5, progress=False), way)
    seen = slice(None) if mask is None else ~mask
    with torch.no_grad():
        trained = model.train()(X, src_key_padding_mask=mask)[seen]
        y = model.eval()(X, src_key_padding_mask=mask)[seen]
        assert not torch.allclose(y, encoder()(X, src_key_padding_mask=mask)[seen], atol=1e-2)
        torch.testing.assert_close(y, trained)
        torch.testing.assert_close(lx.merge(model)(X, src_key_padding_mask=mask)[seen], trained)
    lx.unmerge(model)(X, src_key_padding_mask=mask).sum().backward()
    assert all(m.R.grad is not None for m in model.modules() if isinstance(m, LoraXSLinear))


def settings(model: nn.Module) -> list:
    left = {"peft_config"}  # by PEFT 0.18
    return [{k: v for k, v in vars(m).items() if not k.startswith("_") and k not in left} for m in model.modules()]


@pytest.mark.filterwarnings("ignore:target_modules. 'all-linear' leaves out 2 layers")
def test_torchs_encoder_is_as_it_was_without_its_adapters():
    model, slow = encoder(), encoder(enable_nested_tensor=False)
    before, y = settings(model), model(X, src_key_padding_mask=MASK)
    lx.attach(model, 4, progress=False)
    lx.detach(model)
    assert settings(model) == before and torch.equal(model(X, src_key_padding_mask=MASK), y)
    lx.detach(lx.attach(slow, 4, progress=False))
    assert slow.use_nested_tensor is False and slow.layers[0].activation_relu_or_gelu == 1


def test_torchs_encoder_uses_the_adapters_of_peft_in_eval_mode():
    peft = pytest.importorskip("peft")
    from loraxs_kernels.integrations.peft import LoraXSConfig

    base = encoder()
    before = settings(base)
    model = peft.get_peft_model(base, LoraXSConfig(r=4, target_modules=["linear1", "linear2"], init_std=0.5))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), model.train()(X))
    model.add_adapter("second", LoraXSConfig(r=2, target_modules="all-linear"))
    assert set(base.layers[1].linear2.loraxs_R) == {"default", "second"}
    assert settings(model.eval().unload()) == before
