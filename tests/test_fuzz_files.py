"""Whatever happens to a file, it is loaded as it was written, or refused by name and the model is as it was.

Hypothesis damages basis files, adapter files of the current format and of earlier ones, PEFT folders with a checksum
and without, and checkpoints of the reference implementation: bytes are flipped, zeroed, cut out, put in, moved; fields
and tensors are changed, in files whose checksum is then made right again, as no accident would leave them.  The damages
are the same each time; LORAXS_FUZZ=20000 makes up that many new ones.
"""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import safetensors.torch
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from test_adapter_file import mlp

import loraxs_kernels as lx
from loraxs_kernels.basis_file import make_basis
from loraxs_kernels.files import FORMAT_VERSION, sealed, tensors_of, unsealed

OPTIONS = dict(target_modules=["0", "2"], rank_pattern={"2": 3})
KINDS = {"adapter": "loraxs", "basis": "loraxs_basis"}
OLD = {version: Path(__file__).parent / "data" / f"adapter_v{version}.safetensors" for version in (1, 2)}

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, -1, 1, 3, 4, 5, 17, 10**6, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("-inf")]
    ),
    st.sampled_from(
        ["", "0", "2", "3", "svd", "given", "random", "sklearn", "float16", "bfloat16", "\u00e4", "../x", "a" * 300]
    ),
    st.sampled_from([[], {}, [[]], {"rank": 3}, ["bfloat16"], ["3"]]),
)


BYTES = ["flip", "zero", "cut", "insert", "move"]
PLACE = st.floats(0, 1, exclude_max=True)
PLACES = st.fixed_dictionaries({"at": PLACE, "to": PLACE, "size": st.integers(1, 200)})


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[tuple[str, int], bytes]:
    """Whole files of each kind and version, all for `mlp()`."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = lx.attach(mlp(), 4, modules_to_save=["3"], alpha=8, **OPTIONS)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    lx.save_adapter(model, folder / "adapter.safetensors", portable=True)
    safetensors.torch.save_file(mlp().state_dict(), folder / "model.safetensors")
    make_basis(folder / "model.safetensors", 4, folder / "basis.safetensors", target_modules=["0", "2"])
    new = {(kind, FORMAT_VERSION): (folder / f"{kind}.safetensors").read_bytes() for kind in KINDS}
    return new | {("adapter", version): path.read_bytes() for version, path in OLD.items()}


@st.composite
def damages(draw) -> dict[str, Any]:
    adapters = [("adapter", version) for version in (FORMAT_VERSION, FORMAT_VERSION, *OLD)]
    kind = draw(st.sampled_from([*adapters, ("basis", FORMAT_VERSION)]))
    how = draw(st.sampled_from([*BYTES, "field", "field", "tensor"]))
    damage = {"kind": kind, "how": how} | draw(PLACES)
    if how == "field":
        damage["path"] = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
        damage["value"] = draw(st.one_of(st.just("removed"), VALUES))
    if how == "tensor":
        damage["change"] = draw(
            st.sampled_from(["removed", "zero", "nan", "int", "double", "half", "row", "1-d", "renamed"])
        )
    return damage


def changed_bytes(whole: bytes, damage: dict[str, Any]) -> bytes:
    at, to = (int(damage[key] * len(whole)) for key in ("at", "to"))
    end, how = at + damage["size"], damage["how"]
    if how == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << damage["size"] % 8]) + whole[at + 1 :]
    if how == "zero":
        return whole[:at] + bytes(len(whole[at:end])) + whole[end:]
    if how == "cut":
        return whole[:at] + whole[end:]
    if how == "insert":
        return whole[:at] + whole[to : to + damage["size"]] + whole[at:]
    rest = whole[:at] + whole[end:]
    return rest[:to] + whole[at:end] + rest[to:]


def damaged(whole: bytes, damage: dict[str, Any], path: Path) -> bytes:
    """The bytes of the file after the damage; the path is written to on the way."""
    how = damage["how"]
    if how in BYTES:
        return changed_bytes(whole, damage)
    path.write_bytes(whole)
    header, f = unsealed(path, KINDS[damage["kind"][0]], "file")
    tensors = tensors_of(f, path)
    if how == "field":
        _set(header, damage["path"], damage["value"])
    else:
        _change(tensors, sorted(tensors)[int(damage["at"] * len(tensors))], damage["change"])
    if damage["kind"][1] == 1 or not tensors:
        return safetensors.torch.save(tensors, {KINDS[damage["kind"][0]]: json.dumps(header)})
    return b"".join(sealed(tensors, KINDS[damage["kind"][0]], header))


def _set(header: dict[str, Any], path: list[int], value: Any) -> None:
    for i, step in enumerate(path):
        key = list(header)[step % len(header)]
        if i + 1 < len(path) and isinstance(header[key], dict) and header[key]:
            header = header[key]
        elif value == "removed":
            del header[key]
            return
        else:
            header[key] = value
            return


def _change(tensors: dict[str, torch.Tensor], key: str, change: str) -> None:
    t = tensors.pop(key)
    changed = {
        "zero": lambda: t * 0,
        "nan": lambda: t * torch.nan,
        "int": lambda: t.int(),
        "double": lambda: t.double(),
        "half": lambda: t.half(),
        "row": lambda: t[1:],
        "1-d": lambda: t.flatten(),
        "renamed": lambda: t,
    }
    if change in changed:
        tensors[f"{key}.x" if change == "renamed" else key] = changed[change]().contiguous()


@fuzzing.cases(700)
@given(damages(), st.booleans())
def test_a_damaged_file_is_loaded_right_or_refused(files, tmp_path_factory, damage, attached):
    kind, version = damage["kind"]
    path = tmp_path_factory.getbasetemp() / f"{kind}.safetensors"
    whole = files[kind, version]
    data = damaged(whole, damage, path)
    path.write_bytes(data)
    model = mlp()
    if attached and kind == "adapter":
        lx.attach(model, 4, **OPTIONS)
    state = copy.deepcopy(model.state_dict())
    scalings = [getattr(m, "scaling", None) for m in model]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "adapter":
                lx.load_adapter(model, path, progress=False)
            else:
                lx.attach(model, 4, target_modules=["0"], basis=path, progress=False)
    except ValueError as refusal:
        event(f"{kind} {version} {damage['how']} refused")
        assert str(path) in str(refusal), refusal
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], t) for key, t in state.items())
        assert scalings == [getattr(m, "scaling", None) for m in model]
        assert all(p.requires_grad for p in model.parameters()) or attached
    else:
        event(f"{kind} {version} {damage['how']} loaded")
        # By accident, a file of the current format is not another one that passes for it.
        assert version == 1 or data == whole or damage["how"] in ("field", "tensor")
        assert (
            all(t.isfinite().all() for t in model.state_dict().values()) and model(torch.randn(2, 20)).isfinite().all()
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of whole folders by their names: of our PEFT method for `mlp()`, of the reference for `bert()`."""
    peft = pytest.importorskip("peft")
    import test_reference_repo as reference

    from loraxs_kernels.integrations.peft import LoraXSConfig

    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    config = LoraXSConfig(r=4, target_modules=["0", "2"], rank_pattern={"2": 3}, modules_to_save=["3"], lora_alpha=8)
    model = peft.get_peft_model(mlp(), config)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "peft")
    made = {"peft": folder / "peft", "reference": reference.saved(reference.trained(), folder)}
    made["peft, earlier"] = Path(__file__).parent / "data" / "peft_tier"
    made["reference .bin"] = reference.saved(reference.trained(), folder / "bin")
    reference.as_bin(made["reference .bin"])
    found = {kind: {f.name: f.read_bytes() for f in at.iterdir() if "adapter" in f.name} for kind, at in made.items()}
    old = json.loads(found["peft"]["adapter_config.json"])
    del old["sha256"]
    return found | {"peft, no checksum": found["peft"] | {"adapter_config.json": json.dumps(old).encode()}}


@st.composite
def folder_damages(draw) -> dict[str, Any]:
    how = draw(st.sampled_from([*BYTES, "field", "field"]))
    kind = draw(st.sampled_from(["peft", "peft, earlier", "peft, no checksum", "reference", "reference .bin"]))
    file = "adapter_config.json" if how == "field" else draw(st.sampled_from(["adapter_config.json", "adapter_model"]))
    damage = {
        "kind": kind,
        "how": how,
        "file": file,
        "path": draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)),
    }
    return damage | {"value": draw(st.one_of(st.just("removed"), VALUES))} | draw(PLACES)


@fuzzing.cases(500)
@given(folder_damages())
def test_a_damaged_folder_is_loaded_right_or_refused(folders, tmp_path_factory, damage):
    import peft
    import test_reference_repo as reference

    from loraxs_kernels.integrations.peft import LoraXSConfig
    from loraxs_kernels.integrations.reference_repo import load_reference_adapter

    whole = folders[damage["kind"]]
    name = next(each for each in whole if each.startswith(damage["file"]))
    if damage["how"] == "field":
        fields = json.loads(whole[name])
        _set(fields, damage["path"], damage["value"])
        data = json.dumps(fields).encode()
    else:
        data = changed_bytes(whole[name], damage)
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, content in (whole | {name: data}).items():
        (folder / file).write_bytes(content)
    ours = damage["kind"].startswith("peft")
    model = mlp() if ours else reference.bert()
    state = copy.deepcopy(model.state_dict())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ours:
                config = LoraXSConfig.from_pretrained(folder)
                model = peft.PeftModel.from_pretrained(model, folder) if isinstance(config, LoraXSConfig) else model
            else:
                load_reference_adapter(model, folder, progress=False)
    except (ValueError, FileNotFoundError, KeyError) as refusal:
        event(f"{damage['kind']} {damage['how']} refused")
        if damage["kind"] == "peft, no checksum":  # some by PEFT, in its words, when the adapter is there already
            return
        if "peft_type" in str(refusal):  # PEFT reads that before it knows whose the folder is
            return
        assert str(folder) in str(refusal) and not isinstance(refusal, KeyError), refusal
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], t) for key, t in state.items())
    else:
        event(f"{damage['kind']} {damage['how']} loaded")
        has_checksum = damage["kind"] in ("peft", "peft, earlier")
        assert not has_checksum or data == whole[name] or damage["file"] == "adapter_config.json"
        assert all(t.isfinite().all() for t in model.state_dict().values())
