"""release.py and what PyPI is told of the package: versions, requirements, links, whom to cite."""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import loraxs_kernels as lx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import release  # noqa: E402
import setup  # noqa: E402

PROJECT = (ROOT / "pyproject.toml").read_text()
# Modules by another name than their package's, and those of vLLM's environment, which has versions of its own.
PACKAGES = {"sklearn": "scikit-learn", "pynvml": "nvidia-ml-py"}
OF_VLLM = {"fastapi", "vllm"}


def test_the_version_is_that_of_the_changelog_and_of_the_tag():
    assert setup.assigned("__version__", "loraxs_kernels/__init__.py") == lx.__version__
    release.check_version(lx.__version__, (ROOT / "CHANGELOG.md").read_text(), [])
    release.check_version("1.2.0", "# Changelog\n\n## 1.2.0 (2027-01-31)\n\n## 1.1.0 (unreleased)\n", ["v1.2.0"])


@pytest.mark.parametrize(
    ("heading", "tags", "message"),
    [
        ("1.2 (unreleased)", [], "CHANGELOG.md: got '1.2 (unreleased)' first, must be for 1.2.0, "),
        ("1.2.0 (2027-01-31)", ["v1.2"], "tag: got v1.2, must be v1.2.0, "),
        ("1.2.0 (2027-01-31)", ["v1.2.0", "v1.3.0"], "tag: got v1.2.0 and v1.3.0, must be v1.2.0, "),
        ("1.2.0 (unreleased)", ["v1.2.0"], "CHANGELOG.md: got '1.2.0 (unreleased)' first, must have the date "),
    ],
)
def test_a_version_that_disagrees_is_refused(heading, tags, message):
    with pytest.raises(release.ReleaseError, match=f"^{re.escape(message)}"):
        release.check_version("1.2.0", f"# Changelog\n\n## {heading}\n", tags)


def requirements(lists: str) -> list[Requirement]:
    return [Requirement(each) for each in re.findall(r'"([^"\n]+)"', re.sub(r" # .*", "", lists))]


def declared() -> tuple[list[Requirement], list[Requirement]]:
    """What pyproject.toml requires always, and by extras.  Read as text, since Python 3.10 has no tomllib."""
    always = re.search(r"^dependencies = \[(.*?)^\]", PROJECT, re.M | re.S)[1]
    extras = re.search(r"^\[project.optional-dependencies\](.*?)^\[", PROJECT, re.M | re.S)[1]
    return requirements(always), requirements(extras)


def test_what_is_imported_is_required():
    """By the package or one of its extras; modules that every import loads need no extra."""
    always, extras = ({each.name for each in found} for found in declared())
    for path in (ROOT / "loraxs_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - {"__future__", "loraxs_kernels", *OF_VLLM}:
                if top not in sys.stdlib_module_names:
                    assert PACKAGES.get(top, top) in always | extras, f"{path} imports {top}"


def test_a_package_has_one_oldest_version():
    found = {}
    for each in [*declared()[0], *declared()[1]]:
        assert found.setdefault(each.name, each.specifier) == each.specifier, each


def test_what_a_package_requires_is_found_with_its_extras():
    found = release.required(["safetensors[torch]>=0.4", "nowhere; python_version < '3'"])
    assert {"safetensors", "torch", "numpy"} <= found and not {"nowhere", "pytest"} & found


def wheel(folder: Path, name: str, *files: str) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file in files:
            archive.writestr(file, "")
    return folder / name


def test_a_wheel_must_hold_the_package_and_no_more(tmp_path):
    pure, manylinux = "a-1-py3-none-any.whl", "a-1-cp311-cp311-manylinux_2_28_x86_64.whl"
    files = {"loraxs_kernels/a.py", "loraxs_kernels/b.json", "tests/test_a.py"}
    inside = ["loraxs_kernels/a.py", "loraxs_kernels/b.json", "loraxs_kernels/_build.json", "a-1.dist-info/METADATA"]
    core = "loraxs_kernels/_core.cpython-311-x86_64-linux-gnu.so"
    release.check_wheel(wheel(tmp_path, pure, *inside), files)
    release.check_wheel(wheel(tmp_path, manylinux, "loraxs_kernels/", *inside, core), files)
    refused = {
        r"left out \['loraxs_kernels/b.json'\], must hold them; took in \[\]": (pure, inside[:1] + inside[2:]),
        r"left out \[\], must hold them; took in \['loraxs_kernels/c.py'\]": (pure, [*inside, "loraxs_kernels/c.py"]),
        r"got \['loraxs_kernels/_core": (pure, [*inside, core]),
        "got no core, which its name denies": (manylinux, inside),
    }
    for message, (name, names) in refused.items():
        with pytest.raises(release.ReleaseError, match=message):
            release.check_wheel(wheel(tmp_path, name, *names), files)


TEXT = """[Docs](docs/index.md#start), [paper](https://arxiv.org/abs/1), [here](#why), `x[i](y)`
![A plot](bench/plot.png)
```python
layers[0](x)
```
"""


def test_links_lead_to_the_repository_where_its_address_is_known():
    made = setup.readme(TEXT, "https://example.org/a/b", "1.0")
    changed = (
        "(https://example.org/a/b/blob/v1.0/docs/index.md#start)",
        "(https://example.org/a/b/raw/v1.0/bench/plot.png)",
    )
    assert made == TEXT.replace("(docs/index.md#start)", changed[0]).replace("(bench/plot.png)", changed[1])


def test_links_become_words_where_it_is_not():
    expected = TEXT.replace("[Docs](docs/index.md#start)", "Docs").replace("![A plot](bench/plot.png)", "")
    assert setup.readme(TEXT, None, "1.0") == expected


def test_the_citation_names_the_repository_that_the_metadata_name():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == "loraxs_kernels" and citation["license"] == "Apache-2.0"
    assert citation.get("repository-code") == setup.assigned("Repository", "pyproject.toml")
    assert setup.assigned("Paper", "pyproject.toml") == citation["preferred-citation"]["url"]
