"""PEFT's own tests, of the version that is installed, with LoraXSConfig in the place of its methods' configurations.

    python tests/peft_suite.py -n 2        (options of pytest)

The tests come from that version's sdist, by pip, and are kept beside the environment; where pip cannot get it nothing
is run, and it says so.  Their modules hold lists of models and configurations: here those lists hold
LoraXSConfig alone.  Models that they would load from the Hub are small ones of the same architecture, made here.

Rows that do not apply to LoRA-XS stand in DOES_NOT_APPLY with the reason.  They are run, too: one that passes fails the
run, as does any other row that fails, and a pattern that no row matches.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

MODULES = ("test_custom_models", "test_decoder_models", "test_tuners_utils", "test_quantization")

# Why rows do not apply: patterns of "module::class::test[row] fixtures".
DOES_NOT_APPLY = {
    "it adapts nn.Conv2d and nn.Embedding, which LoRA-XS refuses": ["test_tuners_utils.py::* large_model*"],
    "two adapters of one configuration start with the same R, which its svd_seed draws": [
        "test_decoder_models.py::*::test_merge_layers_multi*"
    ],
    "target_parameters: LoRA-XS adapts modules": ["test_tuners_utils.py::TestTargetedParameterNames::*"],
    "trainable_token_indices: PEFT has them for LoRA alone": [
        "test_tuners_utils.py::*trainable_tokens*",
        "test_tuners_utils.py::*::test_prefixes_tuner_layer_inside_auxiliary_module_not_included*",
    ],
    "PeftMixedModel has a list of the methods it takes": ["test_tuners_utils.py::*::test_mixed_model_raises*"],
    "it counts the parameters of LoRA's A and B": ["test_tuners_utils.py::*::test_nb_params_small*"],
    "it looks for names of LoRA's: lora_A, lora.Linear, LoraModel, LORA": [
        "test_tuners_utils.py::*::test_adapter_model_type_small*",
        "test_tuners_utils.py::*::test_add_second_adapter_with_all_linear_works*",
        "test_tuners_utils.py::*::test_model_status_with_modules_to_save*",
        "test_tuners_utils.py::*::test_module_type_small*",
        "test_tuners_utils.py::*::test_peft_types_small*",
        "test_tuners_utils.py::*::test_prefixes_lora*",
        "test_tuners_utils.py::*::test_prefixes_model_with_injected_layers_only*",
        "test_tuners_utils.py::*::test_prefixes_multiple_adapters_and_adapter_name_narrowing*",
        "test_tuners_utils.py::*::test_prefixes_select_correct_state_dict_keys*",
    ],
}

SIZES = dict(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GPT_SIZES = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
T5_SIZES = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
LLAMA = "LlamaConfig", dict(**SIZES, intermediate_size=64)
MODELS = {  # name on the Hub: configuration of the small model in its place
    "google/flan-t5-small": ("T5Config", T5_SIZES),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        dict(**SIZES, intermediate_size=64, head_dim=8, num_key_value_heads=2),
    ),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2Config", GPT_SIZES),
    "peft-internal-testing/opt-125m": (
        "OPTConfig",
        dict(SIZES, hidden_size=64, num_hidden_layers=12, ffn_dim=64, word_embed_proj_dim=64),
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2Config",
        dict(**SIZES, intermediate_size=64, num_key_value_heads=2),
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomConfig",
        dict(vocab_size=128, hidden_size=32, n_layer=5, n_head=4),
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", GPT_SIZES),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", dict(**GPT_SIZES, rotary_dim=4)),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": ("GPTNeoXConfig", dict(**SIZES, intermediate_size=64)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTConfig",
        dict(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    ),
    "peft-internal-testing/tiny-random-t5": ("T5Config", T5_SIZES),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LLAMA,
}


def put_rows() -> None:
    """Import PEFT's test modules and fill their lists, which the marks of their tests hold, with LoRA-XS."""
    from loraxs_kernels.integrations.peft import LoraXSConfig, LoraXSLinearLayer

    @dataclass
    class LoraXS(LoraXSConfig):
        """For tests that know the class alone; some load an adapter into other random weights, which is refused."""

        r: int = 4
        check_fingerprint: bool = False

    utils = import_module("tests.testing_utils")
    utils.hub_online_once = lambda _: nullcontext()
    theirs = utils.set_init_weights_false
    utils.set_init_weights_false = lambda cls, kwargs: (
        {**kwargs, "init_std": 0.5} if issubclass(cls, LoraXSConfig) else theirs(cls, kwargs)
    )

    def mixed_rows(first: dict, changes: dict) -> list:
        return [("LoRA-XS", LoraXSConfig(**first), LoraXSConfig(**first | changes))]

    custom = import_module("tests.test_custom_models")
    mlp = [  # its layers are 10 to 20 and 20 to 2
        dict(target_modules="lin0"),
        dict(target_modules=["lin0"]),
        dict(target_modules=["lin1"], r=2),
        dict(target_modules=["lin0", "lin1"], r=2, lora_alpha=4),
        dict(target_modules=["lin0"], modules_to_save=["lin1"]),
        dict(target_modules="all-linear", rank_pattern={"lin1": 1}, alpha_pattern={"lin0": 8}),
        dict(target_modules=["lin0"], save_factors=True),
        dict(target_modules=["lin0"], init="random", loraxs_dropout=0.05),
    ]
    rows = [(f"Vanilla MLP {i} LoRA-XS", "MLP", kwargs) for i, kwargs in enumerate(mlp, 1)]
    conv1d = dict(target_modules=["conv1d"], r=1)
    rows += [
        ("Embedding + transformers Conv1D 1 LoRA-XS", "EmbConv1D", conv1d),
        ("Embedding + transformers Conv1D 2 LoRA-XS", "EmbConv1D", dict(**conv1d, modules_to_save=["emb"])),
    ]
    identity = dict(r=4, init_std=0.0)  # where there is such an option PEFT's tests want it
    custom.TEST_CASES[:] = [(name, model, LoraXSConfig, identity | kwargs) for name, model, kwargs in rows]
    custom.ALL_PEFT_CONFIG_CLASSES[:] = [LoraXS]
    lin0, lin1 = (dict(target_modules=[name], r=2, init_std=0.5) for name in ("lin0", "lin1"))
    custom.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
        ("LoRA-XS Same", "loraxs", LoraXSConfig, lin0, lin0 | {"svd_seed": 1}),
        ("LoRA-XS Different", "loraxs", LoraXSConfig, lin0, lin1),
    ]
    seed1, both, head = {"svd_seed": 1}, dict(target_modules=["lin0", "lin1"]), dict(modules_to_save=["lin1"])
    gru, conv1d_emb = dict(modules_to_save=["gru"]), dict(r=1, target_modules=["conv1d"], init_std=0.5)
    custom.MIXED_ADAPTER_TEST_CASES[:] = mixed_rows(lin0, seed1)
    tests = custom.TestMixedAdapterBatches
    for test, first, changes in [
        (tests.test_mixed_adapter_batches_different_target_layers, lin0, lin1),
        (tests.test_mixed_adapter_batches_multiple_modules_to_save, lin0 | head, seed1),
        (tests.test_mixed_adapter_batches_unsupported_layer_raises, lin0 | gru, seed1),
        (tests.test_mixed_adapter_batches_partly_overlapping_target_layers, lin0, both | seed1),
        (tests.test_mixed_adapter_batches_lora_conv1d_emb, conv1d_emb, seed1),
        (
            tests.test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save,
            conv1d_emb | {"modules_to_save": ["lin0"]},
            seed1,
        ),
    ]:
        test.pytestmark[0].args[1][:] = mixed_rows(first, changes)
    wrong_name = tests.test_mixed_adapter_batches_lora_wrong_adapter_name_raises
    wrong_name.pytestmark[0].args[1][:] = [("LoRA-XS", LoraXSConfig(**lin0))]
    tests = custom.TestPeftCustomModel
    for test, value in [
        (tests.test_adapter_name_makes_no_difference, LoraXS(target_modules=["lin0"], init_std=0.5)),
        (tests.test_multiple_adapters_mixed_modules_to_save, LoraXS),
        (tests.test_multiple_adapters_mixed_modules_to_save_order_switched, LoraXS),
    ]:
        test.pytestmark[0].args[1][:] = [value]

    decoders = import_module("tests.test_decoder_models")
    decoder = dict(**identity, task_type="CAUSAL_LM", target_modules=None)
    decoders.ALL_CONFIGS[:] = [
        (LoraXSConfig, decoder | {"loraxs_dropout": 0.05}),
        (LoraXSConfig, decoder | {"init": "random", "save_factors": True, "lora_alpha": 8}),
    ]

    quantization = import_module("tests.test_quantization")
    quantization.TEST_CASES[:] = [(LoraXSConfig, {"r": 8, "target_modules": ["q_proj", "v_proj"]})]
    backends = quantization.QUANTIZATION_BACKENDS  # what 4-bit layers do on a CPU depends on the CPU
    backends[:] = [each for each in backends if each.name != "bnb_4bit"]

    def like_lora(init_lora_weights: bool = True, **kwargs: object) -> LoraXSConfig:
        # Random factors take ranks beyond the layers' sizes, too; without target_modules LoRA takes PEFT's choice.
        return LoraXSConfig(**{"r": 8, "lora_alpha": 8, "init": "random", "target_modules": None} | kwargs)

    tuners = import_module("tests.test_tuners_utils")
    tuners.LoraConfig, tuners.LoraLayer = like_lora, LoraXSLinearLayer


def stand_in(name: str, **attributes: object) -> None:
    """A module that PEFT's tests import, where it is not installed."""
    if find_spec(name) is None:
        module = ModuleType(name)
        module.__spec__, module.__version__ = ModuleSpec(name, None), "0"
        vars(module).update(attributes)
        sys.modules[name] = module


class Parameterized:
    """Of the package parameterized, by pytest's own means."""

    @staticmethod
    def expand(rows: list) -> object:
        return lambda test: pytest.mark.parametrize(list(inspect.signature(test).parameters)[1:], rows)(test)


def pytest_configure(config: pytest.Config) -> None:
    os.chdir(config.rootpath / "models")
    sys.path.insert(0, str(config.rootpath))
    stand_in("diffusers", StableDiffusionPipeline=type("StableDiffusionPipeline", (), {}))
    stand_in("parameterized", parameterized=Parameterized)
    put_rows()


def is_ours(item: pytest.Item) -> bool:
    """Whether LoRA-XS takes part in a test."""
    from loraxs_kernels.integrations.peft import LoraXSConfig

    if item.path.stem == "test_tuners_utils":
        fixtures = {"small_model", "large_model"}.intersection(item.fixturenames)
        return bool(fixtures) or "LoraConfig" in inspect.getsource(item.function)
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(isinstance(v, LoraXSConfig) or (isinstance(v, type) and issubclass(v, LoraXSConfig)) for v in values)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if is_ours(item)]
    names = [f"{item.nodeid.removeprefix('tests/')} {' '.join(item.fixturenames)}" for item in items]
    for reason, patterns in DOES_NOT_APPLY.items():
        for pattern in patterns:
            matched = [item for item, name in zip(items, names, strict=True) if fnmatchcase(name, pattern)]
            if not matched:
                print(f"DOES_NOT_APPLY: no test matches {pattern!r}", file=sys.stderr)  # xdist would not show the error
                raise pytest.UsageError("see above")
            for item in matched:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


class NoSdist(Exception):
    """pip cannot get the sources of the installed PEFT; the message is pip's."""


def fetch() -> Path:
    """The folder with the tests of the installed PEFT."""
    name = f"peft-{version('peft')}"
    kept = Path(sys.prefix) / "peft-suite"
    if (kept / name / "pytest.ini").exists():
        return kept / name
    kept.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as new:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        pip += ["--no-deps", "--no-binary", "peft", "--dest", new, name.replace("-", "==")]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise NoSdist(done.stderr.strip())
        with tarfile.open(Path(new) / f"{name}.tar.gz") as sdist:
            sdist.extractall(new, [m for m in sdist if m.name.startswith(f"{name}/tests/")], filter="data")
        folder = Path(new) / name
        (folder / "tests" / "__init__.py").touch()
        (folder / "pytest.ini").touch()  # so that no other configuration counts
        if not (kept / name).exists():  # another run may have been faster
            folder.rename(kept / name)
    return kept / name


def make_models(folder: Path) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name, (config, sizes) in MODELS.items():
        model = transformers.AutoModelForSeq2SeqLM if config == "T5Config" else transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        model.from_config(getattr(transformers, config)(**sizes)).save_pretrained(folder / name)


def main(options: list[str]) -> int:
    try:
        folder = fetch()
    except NoSdist as reason:
        print(f"PEFT'S OWN TESTS WERE NOT RUN: no sdist of peft {version('peft')} from pip: {reason}")
        return 0
    here = Path(__file__).resolve()
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # the same rows everywhere
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    make_models(folder / "models")
    files = [str(folder / "tests" / f"{module}.py") for module in MODULES]
    suite = [sys.executable, "-m", "pytest", "-q", "--disable-warnings", "-p", here.stem, "-p", "no:cacheprovider"]
    print(f"PEFT's own tests with LoraXSConfig, from the sdist of peft {version('peft')}", flush=True)
    return subprocess.run([*suite, *options, *files]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
