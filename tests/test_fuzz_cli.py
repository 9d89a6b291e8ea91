"""Whatever `loraxs` is given, it does it, or it says in one line why not and leaves nothing behind.

Hypothesis makes up the arguments, and folders of models whose config.json, index or weights are damaged.  The calls are
the same each time; LORAXS_FUZZ=20000 makes up that many new ones.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import fuzzing
import pytest
import safetensors.torch
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from loraxs_kernels.basis_file import read_basis
from loraxs_kernels.cli import main

INTEGERS = [-(10**30), -1, 0, 1, 2, 3, 7, 16, 33, 2**31, 10**12, 2**63, 10**30]
FLOATS = ["inf", "nan", "-1", "0", "1e-300", "0.5", "4", "1e300", "1e400", "x", ""]
NUMBERS = [*map(str, INTEGERS), "9" * 400, "9" * 5000, "1e6", "0x1", "", "x", "é"]
NAMES = ["q_proj", "query", "layers.0", "norm", "embed_tokens", "all-linear", "", ".", "(", "*", "é", "\udcff"]
# "model" is the damaged folder, "taken" a file where a folder should be.
MODELS = [*["model"] * 6, "model/model.safetensors", "model/config.json", "nowhere", "", "é", "taken"]
OUTS = [*["out.safetensors"] * 3, "new/é.safetensors", "model", "taken/x", "", "x" * 300, "\udcff"]

BASE = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "bert": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
}
KEYS = [*BASE["llama"], *BASE["gpt2"], "model_type", "architectures", "vocab_size", "num_labels", "id2label", "dtype"]
KEYS += ["torch_dtype", "rope_scaling", "hidden_act", "quantization_config", "_name_or_path", "auto_map", "head_dim"]
KEYS += ["pad_token_id", "tie_word_embeddings", "attn_implementation", "transformers_version", "layer_types"]

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(INTEGERS),
    st.sampled_from([0.0, -1.5, 1e300, float("nan"), float("inf")]),
    st.sampled_from([*NAMES, *BASE, "LlamaModel", "pipeline", "__dict__", "bfloat16", "model.safetensors"]),
)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(KEYS), v, max_size=3))


@st.composite
def configs(draw) -> bytes:
    """A config.json: a good one of which some values are odd, anything else that is JSON, or damaged bytes."""
    kind = draw(st.sampled_from([*BASE]))
    good = {"model_type": kind, "vocab_size": 50} | BASE[kind]
    changes = draw(st.dictionaries(st.sampled_from(KEYS), values, max_size=2))
    config = draw(st.one_of(st.just(good | changes), st.just(good | changes), values))
    return draw(damaged(json.dumps(config).encode()))


@st.composite
def weights(draw) -> bytes:
    """A safetensors file, whole or damaged."""
    shapes = draw(st.lists(st.sampled_from([(6, 5), (3, 7), (0, 4), (5,), ()]), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8]))
    names = ["layers.0.q_proj.weight", "embed_tokens.weight", ".weight"]
    tensors = {
        name: torch.arange(1, 1 + math.prod(shape)).view(shape).to(dtype)
        for name, shape in zip(names, shapes, strict=False)
    }
    return draw(damaged(safetensors.torch.save(tensors)))


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    how = draw(st.sampled_from(["whole"] * 6 + ["cut", "flipped", "deep", "other"]))
    if how == "cut":
        return whole[: draw(st.integers(0, len(whole)))]
    if how == "flipped":
        place = draw(st.integers(0, len(whole) - 1))
        return whole[:place] + bytes([whole[place] ^ (1 << draw(st.integers(0, 7)))]) + whole[place + 1 :]
    return {"whole": whole, "deep": b'{"a":' * 100_000, "other": draw(st.binary(max_size=20))}[how]


@st.composite
def folders(draw) -> dict[str, bytes | None]:
    """The files of a model's folder; None: a folder in the place of a file."""
    files = {"config.json": draw(configs()), "model.safetensors": draw(weights())}
    index = {"weight_map": draw(st.one_of(values, st.just({"layers.0.q_proj.weight": "model.safetensors"})))}
    if draw(st.integers(0, 3)) == 0:
        files["model.safetensors.index.json"] = draw(damaged(json.dumps(index).encode()))
    for name in draw(st.sets(st.sampled_from([*files]), max_size=1)) if draw(st.integers(0, 3)) == 0 else ():
        files[name] = None
    return files


@st.composite
def calls(draw) -> list[str]:
    def some(options: dict[str, list[str]], most: int = 2) -> list[str]:
        names = draw(st.lists(st.sampled_from([*options]), max_size=most, unique=True))
        return [each for name in names for each in (name, draw(st.sampled_from(options[name])))]

    rank = draw(st.sampled_from(["1", "2", "3"]) | st.sampled_from(["1", "2", "3", *NUMBERS]))
    targets = {"--target-modules": NAMES, "--exclude-modules": NAMES}
    devices = ["cpu", "cpu:1", "cuda:99", "meta", "", "x", "\udcff"]
    command = draw(st.sampled_from(["init", "init", "params", "params", "roofline", "other"]))
    if command == "init":
        options = targets | {"--seed": NUMBERS, "--n-iter": NUMBERS, "--workspace": FLOATS, "--device": devices}
        options |= {"--dtype": ["bfloat16", "float32", "x"]}
        out = draw(st.sampled_from(OUTS))
        return ["init", draw(st.sampled_from(MODELS)), "-r", rank, "-o", out, *some(options, 3)]
    if command == "params":
        options = targets | {"--modules-to-save": NAMES, "--adapters": NUMBERS, "--dtype": ["float16", "x"]}
        return ["params", "--model", draw(st.sampled_from([*MODELS, "tiny"])), "-r", rank, *some(options)]
    if command == "roofline":
        shapes = ["4x4", "0x4", "9", "x", f"{'9' * 400}x1"]
        options = {"--gpu": ["H200", "x"], "--ceilings": [*MODELS, "model/config.json"], "--shape": shapes}
        return ["roofline", *some(options | {"--model": ["tiny", *MODELS], "--tokens": NUMBERS, "--rank": NUMBERS})]
    # These stop before anything is measured or trained.
    others = [["demo", "--device", "meta"], ["demo", "--model", "x"], ["bench", "--seconds", "nan"], ["bench", "x"]]
    others += [["bench", "--device", device, "--seconds", "0"] for device in devices]
    others += [["bench", "--model", model, "--seconds", "0"] for model in MODELS]
    return draw(st.sampled_from([*others, ["info"], ["--help"], ["x"], []]))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@fuzzing.cases(250)
@given(folders(), calls())
@pytest.mark.filterwarnings("ignore")
def test_done_or_refused_in_one_line(capsys, folder, call):
    pytest.importorskip("transformers")
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        here = Path(temporary)
        patch.chdir(here)
        (here / "model").mkdir()
        (here / "taken").touch()
        for name, content in folder.items():
            (here / "model" / name).mkdir() if content is None else (here / "model" / name).write_bytes(content)
        before = files(here)
        try:
            status, allowed = main(call), (0, 1)
        except SystemExit as end:
            status, allowed = end.code, (0, 2)
        event(f"{call[:1]} {status}")
        printed = capsys.readouterr()
        assert status in allowed
        assert "Traceback" not in printed.err
        if status:
            *_, last = printed.err.splitlines()
            assert last.startswith("loraxs") and ": " in last
            assert status == 2 or sum(line.startswith("loraxs ") for line in printed.err.splitlines()) == 1
            assert files(here) == before
        elif call[0] == "init":
            (out,) = files(here).keys() - before.keys()
            assert read_basis(out).modules
            assert files(here).items() >= before.items()
