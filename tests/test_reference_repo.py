"""The reference implementation's models and checkpoints: the same numbers here, and the traps on the way.

`restated` is what the reference does to a PEFT model, in our words.  With LORAXS_REFERENCE_REPO=<a checkout of
MohammadrezaBanaei/LoRA-XS> the same tests run on its own code.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import sys
import types
import warnings

import pytest
import safetensors.torch
import torch
from helpers import assert_all_or_nothing
from torch import nn
from torch.nn import functional as F

import loraxs_kernels as lx
from loraxs_kernels import AdapterMismatch, LoraXSLinear
from loraxs_kernels.integrations import reference_repo
from loraxs_kernels.integrations.reference_repo import (
    export_as_lora,
    load_reference_adapter,
    replace_reference_layers,
)
from loraxs_kernels.matching import adapted_layers
from loraxs_kernels.recipe import Recipe
from loraxs_kernels.reference import relative_error

peft = pytest.importorskip("peft")
LoraXSConfig = lx.integrations.peft.LoraXSConfig
decomposition = pytest.importorskip("sklearn.decomposition")
transformers = pytest.importorskip("transformers")

TARGETS = ["query", "value", "attention.output.dense", "output.dense"]  # the reference's own, for GLUE
IDS = torch.arange(3, 15).view(2, 6)
CONFIG = {
    "reconstruction_type": "svd",
    "reconstr_mode": "separated",
    "half_init_dec": False,
    "replacement_module_random_init": False,
    "r_squared": True,
    "svd": {"n_iter": 10, "random_state": 42},
}


def restated(model, peft_config, reconstruct_config):
    """A, B from scikit-learn's SVD of W^T in lora_A and lora_B, R a module beside them, a forward through it."""
    config = peft_config["default"]
    for layer in [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]:
        W = layer.weight
        svd = decomposition.TruncatedSVD(config.r, **reconstruct_config["svd"])
        projected = svd.fit_transform(W.T.detach().cpu().numpy())  # W^T = V (U S)^T: (K, r), V S
        if reconstruct_config["replacement_module_random_init"]:
            projected, svd.components_ = torch.randn(projected.shape), torch.randn(svd.components_.shape)
        A, B = (torch.as_tensor(t).to(W).clone() for t in (projected.T, svd.components_.T))
        layer.lora_A.default.weight = nn.Parameter(A, requires_grad=False)
        layer.lora_B.default.weight = nn.Parameter(B, requires_grad=False)
        layer.default_lora_latent_mapping = nn.Linear(config.r, config.r, bias=False)
        nn.init.normal_(layer.default_lora_latent_mapping.weight, std=1e-5)
        layer.forward = types.MethodType(forward_through_R, layer)


def forward_through_R(self, x):
    adapter, dtype = self.active_adapters[0], x.dtype
    y = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
    if not (self.disable_adapters or self.merged):
        h = self.lora_dropout[adapter](x.to(self.lora_A[adapter].weight.dtype))
        y += self.lora_B[adapter](self.default_lora_latent_mapping(self.lora_A[adapter](h))) * self.scaling[adapter]
    return y.to(dtype)


def original(model, peft_config, reconstruct_config):
    """The same by the reference's own code."""
    sys.path.insert(0, os.environ["LORAXS_REFERENCE_REPO"])
    try:
        own = importlib.import_module("utils.initialization_utils")
    finally:
        sys.path.pop(0)
    reconstruct_config = copy.deepcopy(reconstruct_config)
    reconstruct_config["svd"]["rank"] = peft_config["default"].r
    own.find_and_initialize(model, peft_config, "default", "svd", reconstruct_config, None)


@pytest.fixture(params=[restated, original], ids=lambda f: f.__name__)
def initialise(request):
    if request.param is original and "LORAXS_REFERENCE_REPO" not in os.environ:
        pytest.skip("needs LORAXS_REFERENCE_REPO, a checkout of the reference implementation")
    return request.param


def bert(dtype=torch.float32):
    torch.manual_seed(3)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    config = transformers.BertConfig(**size, initializer_range=0.2)  # W of order 1, so that adapters count
    return transformers.BertForSequenceClassification(config).to(dtype).eval()


def trained(initialise=restated, model=None, config=CONFIG, r=4, **options):
    """A PEFT model as the reference leaves it after training."""
    model = bert() if model is None else model
    dtype = model.dtype
    lora = peft.LoraConfig(r=r, **{"target_modules": TARGETS, "task_type": "SEQ_CLS", "lora_alpha": 16} | options)
    model = peft.get_peft_model(model, lora)
    initialise(model, {"default": lora}, config)
    for p in model.parameters():
        p.data = p.data.contiguous()  # as its scripts do, for safetensors
    model.to(dtype)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p += torch.randn(p.shape, generator=g).to(p) / 4
    return model.eval()


def saved(model, tmp_path, config=CONFIG):
    """A checkpoint folder, as the reference's scripts lay it out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model that has no name on the hub
        model.save_pretrained(tmp_path / "ft")
    if config:
        (tmp_path / "reconstr_config.json").write_text(json.dumps(config))
    return tmp_path / "ft"


def respelled(folder):
    """The checkpoint as PEFT up to 0.17 spells it: seen with 0.10 and 0.17."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    old = {key.replace(".default_lora_latent", "_lora_latent"): t for key, t in tensors.items()}
    assert old.keys() != tensors.keys()
    safetensors.torch.save_file(old, path)
    return folder


def reference_layers(model):
    return {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if hasattr(m, "default_lora_latent_mapping")
    }


def passes(model, R):
    """Logits, and the gradients of the input embeddings and of every R, which is `R(name)` of them."""
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(5)).to(model.dtype).requires_grad_()
    y = model(inputs_embeds=x).logits
    names, Rs = zip(*sorted(R.items()), strict=True)
    gX, *gR = torch.autograd.grad(y.square().sum(), (x, *Rs))
    return {"y": y.detach(), "gX": gX, **dict(zip(names, gR, strict=True))}


def assert_same(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, t in got.items():
        assert relative_error(t, expected[name]) < tolerance, name


def snapshot(model):
    return (
        [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        sorted(model.__dict__),
    )


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_a_checkpoint_is_the_trained_model(initialise, dtype, tolerance, tmp_path):
    theirs = trained(initialise, bert(dtype))
    layers = reference_layers(theirs)
    expected = passes(theirs, {name: m.default_lora_latent_mapping.weight for name, m in layers.items()})
    model = load_reference_adapter(bert(dtype), saved(theirs, tmp_path))
    ours = dict(adapted_layers(model))
    assert len(ours) == 8 and all(layer.scaling == 4 for layer in ours.values())
    assert_same(passes(model, {name: layer.R for name, layer in ours.items()}), expected, tolerance)
    for name, layer in ours.items():
        assert torch.equal(layer.R, layers[name].default_lora_latent_mapping.weight)
        assert torch.equal(layer.A, layers[name].lora_A.default.weight) and layer.recipe.init == "given"
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.R" for name in ours} | {"classifier.weight", "classifier.bias"}
    lx.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(lx.load_adapter(bert(dtype), tmp_path / "a.safetensors")(IDS).logits, model(IDS).logits)


def as_bin(folder):
    path = folder / "adapter_model.safetensors"
    torch.save(safetensors.torch.load_file(path), folder / "adapter_model.bin")
    path.unlink()
    return folder


def of_peft_0_10(folder):
    """The configuration says nothing of the head, which is in the file because the task is a classification."""
    configured(modules_to_save=None)(folder, None)
    return as_bin(respelled(folder))


@pytest.mark.parametrize("form", [respelled, as_bin, of_peft_0_10])
def test_every_form_of_a_checkpoint(form, tmp_path):
    theirs = trained()
    model = load_reference_adapter(bert(), form(saved(theirs, tmp_path)))
    assert torch.equal(model(IDS).logits, load_reference_adapter(bert(), saved(theirs, tmp_path))(IDS).logits)
    assert relative_error(model(IDS).logits, theirs(IDS).logits) < 1e-5


def test_peft_itself_loads_a_checkpoint_without_R_and_says_nothing(tmp_path):
    theirs = trained()
    folder = saved(theirs, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = peft.PeftModel.from_pretrained(bert(), folder)
    expected = theirs(IDS).logits
    assert relative_error(plain(IDS).logits, expected) > 0.1
    assert relative_error(load_reference_adapter(bert(), folder)(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize("options", [dict(rank_pattern={}), dict(alpha_pattern={"query": 2, r"1\.output\.dense": 12})])
@pytest.mark.parametrize("rslora", [False, True])
def test_scales_are_pefts(options, rslora, tmp_path):
    theirs = trained(r=5, lora_alpha=7, use_rslora=rslora, **options)
    model = load_reference_adapter(bert(), saved(theirs, tmp_path))
    expected = {name: m.scaling["default"] for name, m in reference_layers(theirs).items()}
    assert {name: layer.scaling for name, layer in adapted_layers(model)} == pytest.approx(expected)
    assert relative_error(model(IDS).logits, theirs(IDS).logits) < 1e-5


def test_a_basis_of_our_own(tmp_path):
    theirs = trained()
    folder = saved(theirs, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_reference_adapter(bert(), folder, factors="recompute")
    with pytest.warns(FutureWarning, match="is now called") as warned:
        former = load_reference_adapter(bert(), folder, basis="recompute", workspace=2**31)
    assert {str(each.message).partition(": ")[2] for each in warned} == {
        *("basis is now called factors", "workspace is now called workspace_gib")
    }
    assert all(each.filename == __file__ for each in warned)
    with pytest.raises(ValueError, match="workspace_gib: got 0, must be a number of GiB"):
        load_reference_adapter(bert(), folder, workspace_gib=0)
    assert torch.equal(former(IDS).logits, model(IDS).logits)
    assert relative_error(model(IDS).logits, theirs(IDS).logits) < 1e-4
    lx.save_adapter(model, tmp_path / "a.safetensors")
    assert not any(key.startswith("A/") for key in safetensors.torch.load_file(tmp_path / "a.safetensors"))
    assert torch.equal(lx.load_adapter(bert(), tmp_path / "a.safetensors")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])  # the first and the last that scikit-learn takes
def test_scikit_learn_makes_their_basis_again(seed, tmp_path, monkeypatch):
    """Two iterations at rank 16, far from converged: no other SVD gives this basis, and the file holds R alone."""
    config = CONFIG | {"svd": {"n_iter": 2, "random_state": seed}}
    theirs = trained(config=config, r=16)
    folder, expected = saved(theirs, tmp_path, config), theirs(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = load_reference_adapter(bert(), folder, factors="recompute", tolerance=1e-5)
    assert relative_error(model(IDS).logits, expected) < 1e-5
    for name, layer in adapted_layers(model):
        A, B = (
            reference_layers(theirs)[name].lora_A.default.weight,
            reference_layers(theirs)[name].lora_B.default.weight,
        )
        assert layer.recipe == Recipe("sklearn", seed, name, n_iter=2, weight_dtype="float32")
        assert torch.equal(layer.A.abs(), A.abs()) and torch.equal(layer.B.abs(), B.abs())
    file = tmp_path / "a.safetensors"
    lx.save_adapter(model, file)
    assert not any(key.startswith("A/") for key in safetensors.torch.load_file(file))
    assert torch.equal(lx.load_adapter(bert(), file)(IDS).logits, model(IDS).logits)
    broken = bert()
    nn.init.constant_(broken.bert.encoder.layer[1].output.dense.weight, torch.nan)
    with pytest.raises(ValueError, match=r"module 'bert.*1\.output\.dense': W: has NaN"):
        lx.load_adapter(broken, file)
    for missing in ("sklearn", "sklearn.decomposition"):
        monkeypatch.setitem(sys.modules, missing, None)
    plain = bert()
    before = snapshot(plain)
    with pytest.raises(ImportError, match="scikit-learn makes them, which is not installed: pip install"):
        lx.load_adapter(plain, file)
    with pytest.raises(AdapterMismatch, match=r'not quite those it was trained on; factors="file"'):
        load_reference_adapter(plain, folder, factors="recompute", tolerance=1e-5)
    assert snapshot(plain) == before


def test_a_model_whose_basis_scikit_learn_does_not_make_falls_back(tmp_path):
    folder = saved(trained(), tmp_path)
    with pytest.warns(UserWarning, match="not quite those it was trained on"):
        model = load_reference_adapter(bert(torch.bfloat16), folder, factors="recompute")
    assert {layer.recipe.init for _, layer in adapted_layers(model)} == {"svd"}
    other = bert()  # one weight of many, not the smallest, is another
    W = other.bert.encoder.layer[1].output.dense.weight.data
    W += 1e-3 * torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"module 'bert\.encoder\.layer\.1\.output\.dense'.*not quite those"):
        load_reference_adapter(other, folder, factors="recompute")
    assert {layer.recipe.init for _, layer in adapted_layers(other)} == {"svd"}


def test_a_basis_that_does_not_span_theirs_is_refused(tmp_path):
    """Without SVD, as in the paper's ablation: the checkpoint's own A and B still serve, ours cannot stand in."""
    config = CONFIG | {"replacement_module_random_init": True}
    theirs = trained(config=config)
    folder = saved(theirs, tmp_path, config)
    assert relative_error(load_reference_adapter(bert(), folder)(IDS).logits, theirs(IDS).logits) < 1e-5
    model = bert()
    before = snapshot(model)
    with pytest.raises(
        AdapterMismatch, match=r"error of delta W in module 'bert.* is \d.*tolerance of 3e-02.*\"file\""
    ):
        load_reference_adapter(model, folder, factors="recompute")
    assert snapshot(model) == before


def test_a_weight_of_zeros_is_no_other_base_model(tmp_path):
    def base():
        model = bert()
        model.bert.encoder.layer[0].attention.self.query.weight.data.zero_()
        return model

    theirs = trained(model=base())
    model = load_reference_adapter(base(), saved(theirs, tmp_path))
    assert relative_error(model(IDS).logits, theirs(IDS).logits) < 1e-5


def test_an_imprecise_basis_is_taken_with_a_warning_within_the_tolerance(tmp_path):
    folder = saved(trained(config=CONFIG | {"svd": {"n_iter": 1, "random_state": 42}}, r=16), tmp_path)
    with pytest.raises(AdapterMismatch, match="tolerance of 1e-04"):
        load_reference_adapter(bert(), folder, factors="recompute", tolerance=1e-4)
    with pytest.warns(
        UserWarning, match=r"error of delta W in module '.*' is .*not quite those it was trained on"
    ) as w:
        load_reference_adapter(bert(), folder, factors="recompute", tolerance=1.0)
    assert w[0].filename == __file__


def test_bf16_models(tmp_path):
    """numpy has no bf16, so that the reference cannot start from such a model; its checkpoints fit one all the same."""
    with pytest.raises(TypeError, match="BFloat16"):
        trained(model=bert(torch.bfloat16))
    lx.attach(bert(torch.bfloat16), 4, target_modules=TARGETS)
    theirs = trained()
    folder, expected = saved(theirs, tmp_path), theirs(IDS).logits
    with pytest.warns(
        UserWarning, match=r"is [1-9]\.\de-03: its A and B are rounded .*dtype=torch\.float32 keeps them"
    ):
        model = load_reference_adapter(bert(torch.bfloat16), folder)
    assert all(layer.A.dtype == torch.bfloat16 for _, layer in adapted_layers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exact = load_reference_adapter(bert(torch.bfloat16), folder, dtype=torch.float32)
        load_reference_adapter(bert(torch.bfloat16), folder, dtype="bf16")
    for name, layer in adapted_layers(exact):
        assert torch.equal(layer.A, reference_layers(theirs)[name].lora_A.default.weight)
    for ours in (model, exact):
        assert relative_error(ours(IDS).logits, expected) < 0.1 < relative_error(bert()(IDS).logits, expected)


def other_weights(folder, model):
    nn.init.normal_(model.bert.encoder.layer[1].attention.self.query.weight)


def changed(change):
    """Edit the tensors of a checkpoint."""

    def edit(folder, model):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    return edit


def configured(**entries):
    def edit(folder, model):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return edit


def without(*parts):
    return changed(lambda t: [t.pop(key) for key in list(t) if any(part in key for part in parts)])


LAST = "base_model.model.bert.encoder.layer.1.output.dense"
FAILURES = {  # by which change, with which words and, where it is no plain ValueError, of which kind
    "another base": (
        other_weights,
        r"A of module '.*1\.attention\.self\.query' is not B\^T W .*error \d",
        AdapterMismatch,
    ),
    "no R": (without("latent"), r"has no R \(lora_latent_mapping\); load a plain LoRA adapter by PEFT"),
    "no A and B": (without("lora_A", "lora_B"), r"has no A and B for module 'bert.*exact A and B"),
    "one R missing": (without("1.output.dense.default_lora"), r"has no R for module '.*1\.output\.dense'"),
    "R of another rank": (
        changed(lambda t: t.update({f"{LAST}.default_lora_latent_mapping.weight": torch.ones(3, 3)})),
        r"A, R and B of module '.*' have shapes \(4, 48\), \(3, 3\), \(32, 4\)",
    ),
    "NaN": (changed(lambda t: t[f"{LAST}.lora_B.weight"].mul_(torch.nan)), "lora_B.weight' has NaN or Inf"),
    "NaN in the head": (
        changed(lambda t: t["base_model.model.classifier.bias"].fill_(torch.nan)),
        r"adapter_model\.safetensors: is damaged: tensor 'base_model\.model\.classifier\.bias' has NaN or Inf",
    ),
    "integers": (
        changed(lambda t: t.update({f"{LAST}.lora_A.weight": torch.ones(4, 48, dtype=torch.int64)})),
        r"A, R and B of module '.*1\.output\.dense' are of torch\.int64",
    ),
    "numbers": (
        changed(lambda t: t.update({f"{LAST}.lora_{x}.weight": torch.ones(()) for x in "AB"})),
        r"have shapes \(\), \(4, 4\), \(\), which do not fit",
    ),
    "R twice": (
        changed(lambda t: t.update({f"{LAST}_lora_latent_mapping.weight": torch.ones(4, 4)})),
        r"has R for module '.*1\.output\.dense' twice",
    ),
    "zeros": (
        changed(lambda t: [t[f"{LAST}.lora_{x}.weight"].zero_() for x in "AB"]),
        r"A of module '.*1\.output\.dense' is not B\^T W .*error inf",
        AdapterMismatch,
    ),
    "alpha": (configured(lora_alpha=float("inf")), r"adapter_config\.json does not say .*alpha is inf"),
    "dropout": (configured(lora_dropout="x"), r"lora_dropout in adapter_config\.json is 'x', must be in"),
    "heads": (configured(modules_to_save="classifier"), r"modules_to_save in adapter_config\.json is 'cla"),
    "no head": (without("classifier.bias"), r"/ft: classifier\.bias: is missing in the file"),
    "deep JSON": (
        lambda f, m: (f / "adapter_config.json").write_text("[" * 10**5),
        r"adapter_config\.json: is damaged, no JSON",
    ),
    "deep description": (
        lambda f, m: (f.parent / "reconstr_config.json").write_text("[1]"),
        r"reconstr_config\.json: is damaged, no JSON object but a list",
    ),
    "another layer": (
        changed(lambda t: t.update({key.replace("layer.1", "layer.2"): t.pop(key) for key in list(t)})),
        r"model: has no module 'bert\.encoder\.layer\.2\..*another base model",
    ),
    "another shape": (
        lambda folder, model: setattr(model.bert.encoder.layer[1].output, "dense", nn.Linear(48, 40)),
        r"'bert\.encoder\.layer\.1\.output\.dense' has a weight of shape 40 x 48, .* is for 32 x 48",
    ),
    "another head": (
        lambda folder, model: setattr(model, "classifier", nn.Linear(32, 3)),
        r"classifier\.weight: is of shape \(2, 32\) in the file, must be of shape \(3, 32\)",
    ),
    "a tensor of nothing": (
        changed(lambda t: t.update({"base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(50, 32)})),
        r"tensor 'bert\.embeddings\.word_embeddings\.weight' belongs neither",
    ),
    "DoRA": (
        changed(lambda t: t.update({f"{LAST}.lora_magnitude_vector": torch.ones(32)})),
        "lora_magnitude_vector' belongs neither",
    ),
    "a head of no task": (configured(modules_to_save=None, task_type=None), r"'classifier\.bias' belongs neither"),
    "another method": (configured(peft_type="IA3"), "peft_type is 'IA3', must be 'LORA'"),
    "no rank": (configured(r=None), "adapter_config.json does not say r and lora_alpha"),
    "no JSON": (lambda f, m: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json: is damaged, no JSON"),
    "cut": (lambda f, m: (f / "adapter_model.safetensors").write_bytes(b"123456789"), "is not a whole file of tensors"),
    "no config": (lambda f, m: (f / "adapter_config.json").unlink(), "has no adapter_config", FileNotFoundError),
    "no tensors": (lambda f, m: (f / "adapter_model.safetensors").unlink(), "or adapter_model.bin", FileNotFoundError),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_changes_nothing(case, tmp_path):
    spoil, message, *error = FAILURES[case]
    folder, model = saved(trained(), tmp_path), bert()
    spoil(folder, model)
    before = snapshot(model)
    with pytest.raises((*error, ValueError)[0], match=message):
        load_reference_adapter(model, folder)
    assert snapshot(model) == before


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = as_bin(saved(trained(), tmp_path))
    torch.save({"x": Code()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="is not a whole file of tensors"):
        load_reference_adapter(bert(), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [[1], {"x": 1}, {0: torch.ones(1)}, {"x": torch.ones(1).to_sparse()}],
    ids=["list", "number", "key", "sparse"],
)
def test_a_pickle_of_something_else_is_refused(content, tmp_path):
    file = as_bin(saved(trained(), tmp_path)) / "adapter_model.bin"
    torch.save(content, file)
    model = bert()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: is (not a whole file of tensors|damaged: )"):
        load_reference_adapter(model, file.parent)
    assert snapshot(model) == before


@pytest.mark.parametrize("bad", [dict(n_iter=10**6), dict(random_state=-1), dict(random_state=2**32)], ids=str)
def test_a_description_out_of_bounds_is_not_followed(bad, tmp_path):
    folder = saved(trained(), tmp_path, CONFIG | {"svd": CONFIG["svd"] | bad})
    model = load_reference_adapter(bert(), folder, factors="recompute")
    assert {layer.recipe.init for _, layer in adapted_layers(model)} == {"svd"}


def chain():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)).eval()
    model.dtype = torch.float32
    return model


def reference_chain():
    return trained(model=chain(), r=2, target_modules=["0", "2"], modules_to_save=["3"], task_type=None)


def outcome(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()],
        [(name, t.requires_grad, t.detach().numpy().tobytes()) for name, t in tensors],
        model(torch.arange(24.0).view(3, 8)).detach().numpy().tobytes(),
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", ["load", "recompute", "replace"])
def test_an_interruption_leaves_all_or_nothing(operation, tmp_path):
    folder, make = saved(reference_chain(), tmp_path), reference_chain if operation == "replace" else chain
    factors = "recompute" if operation == "recompute" else "file"

    def call(model):
        if operation == "replace":
            replace_reference_layers(model)
        else:
            load_reference_adapter(model, folder, factors=factors, progress=False)

    assert_all_or_nothing(make, call, outcome, undone=20, within="/loraxs_kernels/integrations/")


def test_a_warning_raised_as_an_error_changes_nothing(tmp_path):
    folder, model = saved(trained(), tmp_path), bert(torch.bfloat16)
    head = model.classifier.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(UserWarning, match="its A and B are rounded"):
            load_reference_adapter(model, folder)
    assert not any(isinstance(m, LoraXSLinear) for m in model.modules()) and torch.equal(model.classifier.weight, head)


def test_arguments_and_models_that_do_not_fit(tmp_path):
    folder = saved(trained(), tmp_path, config=None)
    with pytest.raises(ValueError, match="folder: got ''"):
        load_reference_adapter(bert(), "")
    with pytest.raises(ValueError, match="factors: got 'svd'"):
        load_reference_adapter(bert(), folder, factors="svd")
    for value in ("0.1", -1.0, math.nan):
        with pytest.raises(ValueError, match=f"tolerance: got {value!r}"):
            load_reference_adapter(bert(), folder, tolerance=value)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        load_reference_adapter(bert(), folder, dtype=torch.int8)
    with pytest.raises(ValueError, match="already has LoRA-XS adapters"):
        load_reference_adapter(lx.attach(bert(), 4, target_modules=TARGETS), folder)
    for wrapped in (trained(), trained().base_model.model, replace_reference_layers(trained())):
        with pytest.raises(ValueError, match=f"got a {type(wrapped).__name__} with PEFT in it, must be the plain base"):
            load_reference_adapter(wrapped, folder)
    with pytest.raises(ValueError, match="is on the meta device"):
        load_reference_adapter(bert().to("meta"), folder)
    model = bert()
    other_weights(folder, model)
    with pytest.warns(UserWarning, match=r"not B\^T W .* no reconstr_config.json to say whether") as w:
        load_reference_adapter(model, folder)  # random factors cannot be told from another model's
    assert w[0].filename == __file__


# Export.


def gpt2(dtype=torch.float32):
    torch.manual_seed(3)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, initializer_range=0.2)
    return transformers.GPT2LMHeadModel(config).to(dtype).eval()


EXPORTS = {
    "one rank": (bert, dict(target_modules=["query", "value"], alpha=8)),
    "ranks and scales": (
        bert,
        dict(
            target_modules=["query", "output.dense"],
            rank_pattern={r"layer\.1\.output\.dense": 7, "query": 2},
            alpha_pattern={"query": 5},
            alpha=9,
            init="random",
            modules_to_save=["classifier"],
        ),
    ),
    "Conv1D": (gpt2, dict(target_modules="all-linear")),
    "a few of one name": (bert, dict(target_modules=r".*layer\.1.*(query|dense)")),
}


def adapted(make, options, dtype=torch.float32):
    model = lx.attach(make(dtype), 4, **options)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.R, std=0.3)
    if "modules_to_save" in options:
        nn.init.normal_(model.classifier.weight)
    return model


@pytest.mark.parametrize("case", EXPORTS)
@pytest.mark.parametrize(
    "dtype, stored, tolerance",
    [
        (torch.float64, None, 1e-6),  # PEFT makes its layers in fp32
        (torch.float32, None, 1e-5),
        (torch.float32, "bf16", 5e-2),
        (torch.bfloat16, None, 5e-2),
    ],
    ids=str,
)
def test_an_export_is_the_model_to_peft(case, dtype, stored, tolerance, tmp_path):
    make, options = EXPORTS[case]
    model = adapted(make, options, dtype)
    export_as_lora(model, tmp_path / "new" / "lora", dtype=stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(make(dtype), tmp_path / "new" / "lora")
    assert relative_error(loaded(IDS).logits, model(IDS).logits) < tolerance
    assert relative_error(make(dtype)(IDS).logits, model(IDS).logits) > 4 * tolerance
    lora = {name: m for name, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for name, layer in adapted_layers(model):
        delta = lora[name].lora_B.default.weight @ lora[name].lora_A.default.weight
        assert relative_error(delta, layer.delta_weight()) < (5e-3 if stored else 1e-6)
    rank = max(layer.rank for _, layer in adapted_layers(model))  # llama.cpp divides lora_alpha by each layer's own
    assert {(m.r["default"], m.scaling["default"], len(m.lora_A.default.weight)) for m in lora.values()} == {
        (rank, 1.0, rank)
    }


def test_a_head_whose_state_dict_is_changed_by_a_hook_is_exported(tmp_path):
    model = adapted(*EXPORTS["ranks and scales"])

    def add_one(module, state, prefix, metadata):
        state[prefix + "bias"] = torch.from_numpy(state[prefix + "bias"].numpy() + 1)

    model.classifier.register_state_dict_post_hook(add_one)
    export_as_lora(model, tmp_path)
    written = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(written["base_model.model.classifier.bias"], model.classifier.bias.detach() + 1)


def test_what_an_export_says(tmp_path):
    model = adapted(*EXPORTS["ranks and scales"])
    model.config._name_or_path = "some/bert"
    export_as_lora(model, tmp_path, task_type="SEQ_CLS")
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 7 and not {"rank_pattern", "alpha_pattern"} & config.keys()
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/bert", "SEQ_CLS")
    assert config["modules_to_save"] == ["classifier"] and config["fan_in_fan_out"] is False
    export_as_lora(adapted(*EXPORTS["one rank"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["query", "value"]
    assert len(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")) == 8


def test_an_export_that_fails_writes_nothing(tmp_path):
    model = adapted(*EXPORTS["one rank"])
    layer = dict(adapted_layers(model))["bert.encoder.layer.1.attention.self.value"]
    with pytest.raises(ValueError, match="has no LoRA-XS adapters"):
        export_as_lora(bert(), tmp_path / "lora")
    with pytest.raises(ValueError, match="is itself a LoraXSLinear"):
        export_as_lora(layer, tmp_path / "lora")
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8"):
        export_as_lora(model, tmp_path / "lora", dtype=torch.int8)
    layer.R.data.mul_(1e6)
    with pytest.raises(
        ValueError, match=r"layer\.1\.attention\.self\.value': lora_B has NaN or Inf values in torch\.fl"
    ):
        export_as_lora(model, tmp_path / "lora", dtype=torch.float16)
    linear = nn.Linear(8, 8)
    twice = lx.attach(nn.ModuleDict({"a": linear, "b": linear}), 2, target_modules="all-linear")
    with pytest.raises(ValueError, match="module 'a' is also module 'b'"):
        export_as_lora(twice, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(ValueError, match="folder: got ''"):
        export_as_lora(model, "")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, must be a folder"):
        export_as_lora(model, tmp_path / "file")


def test_what_is_tied_to_modules_to_save_is_exported_with_them(tmp_path):
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    model = lx.attach(copy.deepcopy(base), 2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    nn.init.normal_(model.lm_head.weight)
    export_as_lora(model, tmp_path)
    ids = torch.arange(8)[None]
    assert relative_error(peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits, model(ids).logits) < 1e-5


def test_a_head_that_is_tied_takes_no_copy_of_peft(tmp_path):
    model = bert()
    model.tied = nn.Linear(*reversed(model.classifier.weight.shape), bias=False)
    model.tied.weight = model.classifier.weight
    with pytest.raises(ValueError, match=r"has values for classifier, which PEFT trained as copies, .* 'tied' shares"):
        load_reference_adapter(model, saved(trained(), tmp_path))
    assert model.tied.weight is model.classifier.weight


def test_an_export_takes_the_place_of_no_R(tmp_path):
    """The folder that the adapter was saved to is at hand, and the export has no R to train on from."""
    for which in (trained(), replace_reference_layers(trained())):  # the reference's layers, and those of our method
        file = saved(which, tmp_path) / "adapter_model.safetensors"
        before = file.read_bytes()
        with pytest.raises(ValueError, match=f"folder: {file} holds R of a LoRA-XS adapter"):
            export_as_lora(adapted(*EXPORTS["one rank"]), file.parent)
        assert file.read_bytes() == before


def test_an_export_that_stops_in_between_is_not_half_of_another(tmp_path, monkeypatch):
    export_as_lora(adapted(*EXPORTS["ranks and scales"]), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = adapted(*EXPORTS["one rank"])
    real = reference_repo.lora.write_atomically

    def stopped(at):
        def write(path, *parts):
            if path.name == at and b"unfinished" not in parts[0]:
                raise KeyboardInterrupt
            real(path, *parts)

        return write

    monkeypatch.setattr(reference_repo.lora, "write_atomically", stopped("adapter_config.json"))
    with pytest.raises(KeyboardInterrupt):
        export_as_lora(model, tmp_path)
    assert "unfinished" in json.loads((tmp_path / "adapter_config.json").read_text())  # new weights, and no old config
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.setattr(reference_repo.lora, "write_atomically", stopped("adapter_model.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        export_as_lora(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_checkpoint_becomes_plain_lora_without_peft(tmp_path, monkeypatch):
    theirs = trained()
    folder = saved(theirs, tmp_path)
    with monkeypatch.context() as patch:
        for module in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
            patch.setitem(sys.modules, module, None)
        export_as_lora(load_reference_adapter(bert(), folder), tmp_path / "lora", task_type="SEQ_CLS")
    loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / "lora")
    assert relative_error(loaded(IDS).logits, theirs(IDS).logits) < 1e-5
    assert not any(isinstance(m, LoraXSLinear) for m in loaded.modules())


def test_an_adapter_of_the_peft_method_is_exported_too(tmp_path):
    model = replace_reference_layers(trained())
    expected = model(IDS).logits
    from_peft = peft.PeftConfig.from_pretrained(saved(model, tmp_path))
    model.add_adapter("other", from_peft)
    model.set_adapter("other")
    nn.init.normal_(model.get_base_model().classifier.modules_to_save["other"].weight)
    for layer in replaced_layers(model).values():
        for t in (layer.loraxs_A, layer.loraxs_R, layer.loraxs_B):
            nn.init.normal_(t["other"])
    for adapter, y in (("default", expected), ("other", model(IDS).logits)):
        export_as_lora(model, tmp_path / adapter, adapter=adapter)
        loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / adapter)
        assert type(loaded) is type(model) and relative_error(loaded(IDS).logits, y) < 1e-5
    model.peft_config["other"].bias = "all"
    with pytest.raises(ValueError, match=r"adapter 'other' trains biases \(bias='all'\), which are not written"):
        export_as_lora(model, tmp_path / "x", adapter="other")
    with pytest.raises(ValueError, match="has no LoRA-XS adapter 'third'"):
        export_as_lora(model, tmp_path / "x", adapter="third")
    with pytest.raises(ValueError, match="has no LoRA-XS adapter 'default' of our PEFT method"):
        export_as_lora(trained(), tmp_path / "x")
    next(iter(replaced_layers(model).values())).unchecked.add("other")  # as what transformers has just loaded
    with pytest.raises(ValueError, match="adapter 'other': the fingerprint of A and B for module 'bert"):
        export_as_lora(model, tmp_path / "x", adapter="other")


# Models in memory.


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_replaced_layers_are_the_trained_model(initialise, dtype, tolerance):
    model = trained(initialise, bert(dtype), lora_alpha=9, rank_pattern={}, alpha_pattern={r"1\.output\.dense": 5})
    layers = reference_layers(model)
    Rs = {name: m.default_lora_latent_mapping.weight for name, m in layers.items()}
    inner, trains = model.get_base_model(), [p for p in model.parameters() if p.requires_grad]
    expected = passes(model, Rs)
    assert replace_reference_layers(model) is model and model.get_base_model() is inner
    ours = replaced_layers(model)
    assert ours.keys() == layers.keys() and not reference_layers(model)
    for name, layer in ours.items():
        assert layer.loraxs_R["default"] is Rs[name] and layer.base_layer is layers[name].base_layer
        assert layer.scaling == layers[name].scaling
        assert torch.equal(layer.loraxs_A["default"], layers[name].lora_A.default.weight)
        assert torch.equal(layer.loraxs_B["default"], layers[name].lora_B.default.weight)
    assert_same(passes(model, Rs), expected, tolerance)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trains}


def replaced_layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "loraxs_R")}


def test_a_replaced_model_drops_out_in_training_alone():
    model = replace_reference_layers(trained(lora_dropout=0.5))
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_training_goes_on_with_the_same_optimizer():
    def losses(replace):
        model = trained()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(6):
            if step == 3 and replace:
                replace_reference_layers(model)
            optimizer.zero_grad()
            loss = model(IDS, labels=torch.tensor([0, 1])).loss
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert found[-1] < found[0] / 2
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-4)


@pytest.mark.parametrize("head", [dict(), dict(task_type=None, modules_to_save=["classifier"])], ids=str)
def test_a_replaced_model_is_saved_and_loaded_by_peft(head, tmp_path):
    model = trained(lora_alpha=9, alpha_pattern={r"1\.output\.dense": 5}, **head)
    expected = model(IDS).logits
    folder = saved(replace_reference_layers(model), tmp_path)
    assert model.peft_type == "LORAXS" and json.loads((folder / "adapter_config.json").read_text())["init"] == "given"
    loaded = peft.PeftModel.from_pretrained(bert(), folder)
    assert relative_error(loaded(IDS).logits, expected) < 1e-5
    assert len(replaced_layers(loaded)) == 8
    assert "classifier" in loaded.peft_config["default"].modules_to_save


def test_A_and_B_stay_frozen_after_disable_adapter(initialise):
    def frozen(model):
        return {name for name, p in model.named_parameters() if not p.requires_grad}

    model = trained(initialise)
    with model.disable_adapter():
        pass
    assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad), "the reference's trap"
    model = replace_reference_layers(trained(initialise))
    before = frozen(model)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, bert()(IDS).logits)
    assert frozen(model) == before
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == 10 and all("loraxs_R" in name or "classifier" in name for name in trains)


def test_replacing_in_half_precision_widens_R(tmp_path):
    """fp32 at the start and bf16 from there on is the way round the reference's lack of bf16."""
    model = trained().bfloat16()
    x = torch.randn(3, 32).bfloat16()
    name, theirs = next(iter(reference_layers(model).items()))
    expected, R = theirs(x), theirs.default_lora_latent_mapping.weight
    model(IDS).logits.sum().backward()
    replace_reference_layers(model)
    layer = replaced_layers(model)[name]
    assert layer.loraxs_R["default"] is R and R.dtype == R.grad.dtype == torch.float32
    assert layer.loraxs_A["default"].dtype == torch.bfloat16
    assert relative_error(layer(x), expected) < 1e-2
    torch.optim.AdamW([R]).step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = peft.PeftModel.from_pretrained(bert(torch.bfloat16), saved(model, tmp_path))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_factors_wider_than_the_weight_stay_so(tmp_path):
    model = trained().bfloat16()
    for layer in reference_layers(model).values():
        for part in (layer.lora_A.default, layer.lora_B.default, layer.default_lora_latent_mapping):
            part.float().weight.data.mul_(1.001)  # no bf16 numbers any more
    expected = {name: m.lora_A.default.weight for name, m in reference_layers(model).items()}
    replace_reference_layers(model)
    loaded = peft.PeftModel.from_pretrained(bert(torch.bfloat16), saved(model, tmp_path))
    for each in (model, loaded):
        assert all(torch.equal(m.loraxs_A["default"], expected[name]) for name, m in replaced_layers(each).items())


# Checkpoints of the reference, loaded into such models the way its scripts and the Trainer do.


def started(**options):
    """A model before training, in our layers: what a script has when it loads a checkpoint to start from."""
    model = peft.get_peft_model(bert(), lora := peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, **options))
    restated(model, {"default": lora}, CONFIG)
    return replace_reference_layers(model)


def as_method(**options):
    return peft.get_peft_model(bert(), LoraXSConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS} | options))


def tensors_of(folder):
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def without_prefix(tensors):
    """By the names in the base model, whose layers then have no tuner around them."""
    return {key.removeprefix("base_model.model."): t for key, t in tensors.items()}


def renamed(tensors):
    """As main_glue_from_pretrained.py and merge_adapter_to_base_model.py do before their load_state_dict."""
    for old, new in (
        ("lora_A", "lora_A.default"),
        ("lora_B", "lora_B.default"),
        ("_lora_latent", ".default_lora_latent"),
    ):
        tensors = {key.replace(old, new): t for key, t in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "start", [started, as_method, lambda: as_method(save_factors=True)], ids=["given", "svd", "kept"]
)
@pytest.mark.parametrize("spelling", [lambda folder: folder, respelled], ids=["since 0.18", "up to 0.17"])
def test_a_checkpoint_of_the_reference_loads_into_our_layers(start, spelling, tmp_path):
    theirs = trained(task_type=None)
    folder = spelling(saved(theirs, tmp_path))
    expected, own = theirs(IDS).logits, {k: t for k, t in theirs.state_dict().items() if "lora" in k}
    for load in (
        lambda model: model.load_state_dict(own, strict=False),
        lambda model: model.load_state_dict(tensors_of(folder), strict=False),
        lambda model: model.load_state_dict(renamed(tensors_of(folder)), strict=False),
        lambda model: peft.set_peft_model_state_dict(model, tensors_of(folder)),
        lambda model: model.load_adapter(folder, "default", is_trainable=True),
        lambda model: model.get_base_model().load_state_dict(without_prefix(tensors_of(folder)), strict=False),
    ):
        model = start()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load(model)
        assert relative_error(model(IDS).logits, expected) < 1e-4 < relative_error(bert()(IDS).logits, expected)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == names
        if start is started:
            for name, layer in replaced_layers(model).items():
                assert torch.equal(layer.loraxs_A["default"], reference_layers(theirs)[name].lora_A.default.weight)
    assert len(own) == 24 and all("lora" in key for key in own), "the caller's state dict stays as it was"


def test_a_strict_load_of_the_reference_model_s_own_state_dict():
    theirs, model = trained(), started(task_type="SEQ_CLS")
    model.load_state_dict(theirs.state_dict())
    assert relative_error(model(IDS).logits, theirs(IDS).logits) < 1e-5


def key_of(letter):
    return f"{LAST}.{'default_lora_latent_mapping' if letter == 'R' else f'lora_{letter}'}.weight"


WHERE = r"module 'base_model\.model\.bert\.encoder\.layer\.1\.output\.dense'"
NOT_WHOLE = {
    "no R": (lambda t: t.pop(key_of("R")), f"{WHERE}: has an adapter, but no R in the state dict"),
    "LoRA": (lambda t: [t.pop(k) for k in list(t) if "latent" in k], "each is useless without the other two"),
    "no A": (lambda t: t.pop(key_of("A")), WHERE + r": the state dict has \['default_.*', 'lora_B\.weight'\], must"),
    "R alone": (lambda t: [t.pop(key_of(letter)) for letter in "AB"], r"has \['default_.*'\], must .*the other two"),
    "R twice": (lambda t: t.update({key_of("R").replace(".default_", "_"): t[key_of("R")]}), r"has \[.*\], must"),
    "R by both": (
        lambda t: t.update({f"{LAST}.loraxs_R.default": torch.ones(4, 4)}),
        f"{WHERE}: the state dict has R by the reference's key and by PEFT's",
    ),
    "another rank": (lambda t: t.update({key_of("R"): torch.ones(3, 3)}), r"\(3, 3\).*must have \[.*\(4, 4\)"),
    "NaN": (lambda t: t[key_of("B")].mul_(torch.nan), f"{WHERE}: A, R or B of the state dict has NaN"),
    "another layer": (
        lambda t: t.update({key.replace("layer.1.", "layer.2."): t[key] for key in list(t)}),
        r"layer\.2\..*': has an R in the state dict, but no adapter",
    ),
}


@pytest.mark.parametrize("case", NOT_WHOLE)
def test_what_is_not_whole_is_refused_before_anything_is_loaded(case, tmp_path):
    tensors = tensors_of(saved(trained(), tmp_path))
    change, message = NOT_WHOLE[case]
    change(tensors)
    model = started()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(tensors, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_an_adapter_with_a_basis_of_its_own_refuses_another_delta(tmp_path):
    random = trained(config=CONFIG | {"replacement_module_random_init": True})
    with pytest.raises(AdapterMismatch, match=r"module 'base.*another delta W .*save_factors=True"):
        as_method().load_state_dict(random.state_dict(), strict=False)
    imprecise = trained(config=CONFIG | {"svd": {"n_iter": 2, "random_state": 42}}, r=16)
    with pytest.warns(UserWarning, match=r"module 'base.*': the estimated relative error of delta W is \d"):
        as_method(r=16).load_state_dict(imprecise.state_dict(), strict=False)


def test_the_reference_s_keys_name_no_adapter(tmp_path):
    model = as_method()
    model.add_adapter("other", model.peft_config["default"])
    with pytest.raises(ValueError, match=r"has the adapters \['default', 'other'\], must have one"):
        model.load_adapter(saved(trained(), tmp_path), "other")


def test_layers_of_attach_refuse_them(tmp_path):
    folder = respelled(saved(trained(), tmp_path))
    tensors = without_prefix(tensors_of(folder))
    attached = lx.attach(bert(), 4, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"module 'bert.*': got a state dict with .* load_reference_adapter"):
        attached.load_state_dict(tensors, strict=False)


def test_trainer_resumes_from_a_checkpoint_of_the_reference(tmp_path):
    """Three steps by the reference and three in our layers are six steps by the reference."""
    pytest.importorskip("accelerate")

    def trainer(model, steps, **options):
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=steps, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True, **options
        )
        data = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(IDS.repeat(12, 1))]
        return transformers.Trainer(model, arguments, train_dataset=data)

    def rs(model):
        return torch.stack([p.detach() for name, p in model.named_parameters() if p.shape == (4, 4)])

    options = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    expected = trained()
    trainer(expected, 6, **options).train()
    first = trainer(trained(), 3, **options)
    first.args.save_strategy = "steps"
    first.train()
    first._save_checkpoint(first.model, None)
    folder = respelled(tmp_path / "checkpoint-3")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = started(task_type="SEQ_CLS")
    trainer(model, 6, **options).train(resume_from_checkpoint=str(folder))
    assert rs(model).shape == (8, 4, 4) and relative_error(rs(model), rs(expected)) < 1e-3
    assert relative_error(model.eval()(IDS).logits, expected.eval()(IDS).logits) < 1e-3


def plain(model):
    return peft.get_peft_model(bert(), peft.LoraConfig(target_modules=TARGETS))


def one_without_R(model):
    del reference_layers(model)["bert.encoder.layer.1.output.dense"].default_lora_latent_mapping


def with_another(model):
    model.add_adapter("other", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))


def shared(model):
    inner = model.get_base_model()
    inner.twin = inner.bert.encoder.layer[1].output.dense.base_layer


def misshapen(model):
    next(iter(reference_layers(model).values())).default_lora_latent_mapping = nn.Linear(3, 3, bias=False)


IN_THE_WAY = {
    "plain LoRA": (plain, ValueError, r"module 'bert\..*query': is a Linear of PEFT without R"),
    "no PEFT": (lambda model: bert(), TypeError, "got a BertForSequenceClassification, must be a PeftModel"),
    "LoRA-XS": (replace_reference_layers, TypeError, "must be a PeftModel with LoRA"),
    "one without R": (one_without_R, ValueError, r"module 'bert\.encoder\.layer\.1\.output\.dense': is a Linear"),
    "another adapter": (with_another, ValueError, r"has the adapters \['default', 'other'\]"),
    "merged": (lambda model: model.merge_adapter(), ValueError, r"module 'bert\..*query': is merged"),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), ValueError, "is disabled or not active"),
    "shared": (shared, ValueError, r"1\.output\.dense': also stands in another place"),
    "misshapen": (misshapen, ValueError, r"module 'bert\..*query': A, R and B have shapes \(4, 32\), \(3, 3\) and"),
    "DoRA": (lambda model: setattr(model.peft_config["default"], "use_dora", True), ValueError, "with use_dora=True"),
    "biases": (lambda model: setattr(model.peft_config["default"], "bias", "all"), ValueError, "with bias='all'"),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_cannot_be_replaced_is_left_alone(case):
    change, error, message = IN_THE_WAY[case]
    model = trained()
    model = change(model) or model
    before = snapshot(model)
    with pytest.raises(error, match=message):
        replace_reference_layers(model)
    assert snapshot(model) == before


def test_a_failure_in_peft_leaves_the_model_as_it_was(monkeypatch):
    from loraxs_kernels.integrations.peft import LoraXSModel

    model = trained()
    before, config, expected = snapshot(model), model.peft_config["default"], model(IDS).logits
    monkeypatch.setattr(LoraXSModel, "_create_and_replace", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replace_reference_layers(model)
    assert snapshot(model) == before and model.peft_config["default"] is config
    assert model.get_base_model().peft_config is model.peft_config and torch.equal(model(IDS).logits, expected)
