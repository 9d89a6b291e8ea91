"""For mkdocs.yml: files of the repository outside docs/ that belong on the site, at their own paths."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = ("bench/results/README.md", "bench/results/STATUS.md", "bench/results/NOTES.md", "bench/results/*/*")
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "bench/README.md", *RESULTS)
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are right in the repository, where docs/ is a folder, made right on the site, where it is none."""
    name = page.file.src_uri
    outside = files.get_file_from_path(name).generated_by is not None
    here = posixpath.dirname(name if outside else f"docs/{name}")

    def moved(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, match[2])).removeprefix("docs/")
        return match[1] + posixpath.relpath(target, posixpath.dirname(name) or ".")

    return LINK.sub(moved, markdown)
