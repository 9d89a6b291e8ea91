"""Every code block of README.md, CONTRIBUTING.md and docs/ works.

The python blocks of a page run one after another, in one namespace and an empty folder, with tiny models in the place
of those from the Hugging Face Hub.  Commands of bash blocks are taken down by a shell in which each is a function that
only writes its arguments; then the cheap ones run, and the others are parsed by their own parsers.  A block that cannot
run here has a comment above it that says why, `<!-- not run: ... -->`, and is counted in NOT_RUN.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import pydoc
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from markdown_it import MarkdownIt
from test_reference_repo import CONFIG, restated
from torch import nn

import loraxs_kernels as lx
from loraxs_kernels import cli
from loraxs_kernels.integrations.reference_repo import replace_reference_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("lmdb")

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "docs/attach.md": 1,
    "docs/internals-frameworks.md": 1,
    "docs/parallel.md": 2,
    "docs/serving.md": 1,
    "docs/support.md": 2,
}
LANGUAGES = {"python", "bash", "json", "text"}
COMMANDS = ("accelerate", "curl", "deepspeed", "loraxs", "make", "pip", "python", "torchrun")
CHEAP = {"bank", "info", "init", "inspect", "params", "roofline"}  # of loraxs


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int  # of its first line of text, from 0
    why_not: str | None


def blocks(page: str) -> list[Block]:
    found, why_not = [], None
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type in ("fence", "code_block"):
            found.append(Block(token.info.strip(), token.content, token.map[0] + 1, why_not))
        marker = re.fullmatch(r"<!-- not run: (.+) -->", token.content.strip(), re.S)
        why_not = marker and marker[1]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_known(page):
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block in {block.language!r}, must be one of {LANGUAGES}"
        if block.language == "json":
            json.loads(block.text)
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language == "text":
            assert not re.search(rf"^\s*(\$ )?({'|'.join(COMMANDS)}) ", block.text, re.M), f"{where}: a command in text"
    assert sum(block.why_not is not None for block in blocks(page)) == NOT_RUN.get(page, 0)


# The stand-ins.

TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
ROBERTA = {**TINY, "max_position_embeddings": 32, "pad_token_id": 1}


def tiny(config: transformers.PretrainedConfig, kind: type, **options: object) -> torch.nn.Module:
    """A small model: the same weights at every call, as a checkpoint gives them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.from_config(config)
    return model.to(options.get("dtype") or torch.float32).eval()


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "LoRA", "XS", "trains", "R", "alone", "A", "and", "B", "Who", "Where", "is", "?"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def page_folder(tmp_path, monkeypatch, fresh_accelerate):
    """An empty folder with a model and adapters as the pages name them; the Hub's models are tiny ones."""
    monkeypatch.chdir(tmp_path)
    configs = {
        transformers.AutoModelForCausalLM: transformers.LlamaConfig(**TINY),
        transformers.AutoModelForSequenceClassification: transformers.RobertaConfig(**ROBERTA),
    }
    for kind, config in configs.items():

        def from_pretrained(name, *, real=kind.from_pretrained, kind=kind, config=config, **options):
            if Path(name).is_dir():
                return real(name, **options)
            return tiny(config, kind, **options)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **options: real(name, **options) if Path(name).is_dir() else tokenizer(),
    )
    kind = transformers.AutoModelForCausalLM
    model = tiny(configs[kind], kind, dtype=torch.bfloat16)
    model.save_pretrained("path/to/model")
    lx.attach(model, 16, target_modules="all-linear", progress=False)
    for name in ("alice", "bob"):
        lx.save_adapter(model, f"{name}.safetensors")
    return tmp_path


def the_reference(space: dict) -> None:
    """What a training script of the reference implementation has when its initialisation begins, and its checkpoint."""
    from peft import LoraConfig, get_peft_model

    def find_and_initialize(model, peft_config, adapter_name, reconstr_type, reconstr_config, writer):
        restated(model, peft_config, reconstr_config)

    def model():
        base = transformers.AutoModelForCausalLM.from_pretrained("base")
        return get_peft_model(base, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"]))

    space |= {"find_and_initialize": find_and_initialize, "model": model(), "reconstr_config": CONFIG}
    space |= {"peft_config_dict": space["model"].peft_config, "adapter_name": "default", "reconstr_type": "svd"}
    space["writer"] = None
    trained = model()
    restated(trained, trained.peft_config, CONFIG)
    for p in trained.parameters():
        p.data = p.data.contiguous()
    trained.save_pretrained("output/ft")
    replace_reference_layers(trained).save_pretrained("output/replaced")


SETUPS = {"docs/migration.md": the_reference}


# Commands.


class Parsed(Exception):
    """What parses a script's arguments is done, and the script need not run."""


def taken_down(text: str, folder: Path) -> list[list[str]]:
    """The commands that bash runs for a block, each with its arguments."""
    log = folder / "commands"
    log.touch()
    functions = "".join(
        f"{name}() {{ printf '%s\\x1f' {name} \"$@\" >> {log}; printf '\\x1e' >> {log}; }}\n" for name in COMMANDS
    )
    run = subprocess.run(
        [shutil.which("bash"), "-eu", "-c", f"{functions}{text}"],
        cwd=folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stderr}\nin a shell that knows only {', '.join(COMMANDS)}:\n{text}"
    commands = log.read_text().split("\x1e")[:-1]
    log.unlink()
    assert commands, f"no command in:\n{text}"
    return [command.split("\x1f")[:-1] for command in commands]


def script(name: str, arguments: list[str], monkeypatch) -> None:
    """Parse the arguments of a script of this repository, by the script."""
    path = ROOT / name
    assert path.is_file(), f"there is no {name}"
    module = sys.modules.get(path.stem)
    if module is None:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        monkeypatch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    real = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args, **options):
        _, others = real(self, *args, **options)
        assert not others, f"{name} does not know {others}"
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(Parsed):
            module.main()


def check(command: list[str], monkeypatch) -> None:
    """Run a cheap command, and see that any other is one that its program would take."""
    name, *arguments = command
    if name == "loraxs":
        if arguments[0] in CHEAP:
            assert cli.main(arguments) == 0, f"{command} failed"
        else:
            cli._arguments(arguments)
    elif name == "python":
        script(arguments[0], arguments[1:], monkeypatch)
    elif name in ("torchrun", "accelerate", "deepspeed"):
        at = next(i for i, each in enumerate(arguments) if each.endswith(".py"))
        if name == "torchrun":
            from torch.distributed.run import get_args_parser

            get_args_parser().parse_args(arguments)
        script(arguments[at], arguments[at + 1 :], monkeypatch)
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text()
        for each in arguments:
            variable, given, _ = each.partition("=")
            assert re.search(rf"^{variable} \?=" if given else rf"^\.PHONY:.* {each}\b", makefile, re.M), each
    elif name == "pip":
        extras = [extra for each in arguments for extra in re.findall(r"^\.\[(.*)\]$", each)]
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), f"no extra {extra!r}"
    elif name == "curl":
        url = next(each for each in arguments if "localhost" in each)
        assert urlparse(f"//{url}").port == 8000
        if "-d" in arguments:
            json.loads(arguments[arguments.index("-d") + 1])


@pytest.mark.parametrize(
    "page", [page for page in PAGES if re.search("^ *```(python|bash)$", (ROOT / page).read_text(), re.M)]
)
def test_blocks_run(page, page_folder, monkeypatch):
    space = {"__name__": "page"}
    SETUPS.get(page, lambda space: None)(space)
    for block in blocks(page):
        if block.why_not is not None:
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, page, "exec"), space)
        if block.language == "bash":
            for command in taken_down(block.text, page_folder):
                check(command, monkeypatch)


def test_tinylora_trains_v_in_place_of_r():
    (code,) = [block.text for block in blocks("docs/migration.md") if "class Tiny" in block.text]
    space = {"base_model": "", "AutoModelForCausalLM": nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8))}
    space["AutoModelForCausalLM"].from_pretrained = lambda name: space["AutoModelForCausalLM"]
    exec(code, space)
    model = space["model"]
    assert [p.shape for p in model.parameters() if p.requires_grad] == [(3,), (3,)]
    model(torch.randn(3, 12)).sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_every_command_is_on_its_page():
    page = (ROOT / "docs" / "command-line.md").read_text()
    (commands,) = [a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert {*re.findall(r"^\| `loraxs (\w+)` \|", page, re.M)} == {*commands.choices}
    called = " ".join(block.text for block in blocks("docs/command-line.md"))
    assert all(f"loraxs {name}" in called for name in commands.choices)


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = re.findall(r"^::: ([\w.]+)$", page, re.M)
    for name in listed:
        found = pydoc.locate(name)
        assert found is not None and inspect.getdoc(found), f"{name}: the page would show nothing"
    assert {*lx.__all__} - {"functional", "integrations"} <= {name.rpartition(".")[2] for name in listed}


def texts_of_the_package() -> str:
    """All string constants of the sources, those of f-strings in parts."""
    found = []
    for path in (ROOT / "loraxs_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_errors_of_the_troubleshooting_page_are_raised_somewhere():
    page, texts = (ROOT / "docs" / "troubleshooting.md").read_text(), texts_of_the_package()
    quoted = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(quoted) >= 10
    for text in quoted:
        for part in text.split("..."):
            assert part.strip() in texts, f"no error text has {part.strip()!r}"


def test_links_of_the_front_page_lead_somewhere():
    """mkdocs checks those of all other pages."""
    links = re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    for target, anchor in links:
        assert (ROOT / target).exists(), f"README.md links to {target}"
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.M) if anchor else ()
        assert anchor in ("", *(re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings)), anchor


def test_the_front_page_quotes_figures_of_reports():
    """Every number below "Why" stands in a table that bench/render.py has made of a report."""
    figures = "".join(
        block
        for page in ("paper", "performance")
        for block in re.findall(
            r"<!-- figures: .*?<!-- end of figures -->", (ROOT / f"docs/{page}.md").read_text(), re.S
        )
    )
    (why,) = re.findall(r"^## Why$(.*?)^\*\*Status", (ROOT / "README.md").read_text(), re.M | re.S)
    why = re.sub(r"\]\([^)]*\)", "]", why)

    def numbers(text):
        return {*re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))}

    assert len(numbers(why)) > 10 and numbers(why) <= numbers(figures), numbers(why) - numbers(figures)
