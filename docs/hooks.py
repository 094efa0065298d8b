"""Hooks of the site's build: add a page for each strategy and wrapper of the library, and lists of them."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pages import DOCS, KINDS, ours, page, refreshed


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages to their sections of the nav."""
    for section in config.nav:
        for title, entries in section.items():
            folder = title.lower()
            if folder in KINDS:
                entries += [{name: f"{folder}/{name}.md"} for name in ours(KINDS[folder])]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages."""
    for folder, kind in KINDS.items():
        for name in ours(kind):
            files.append(File.generated(config, f"{folder}/{name}.md", content=page(name)))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: object) -> str:
    """Write the marked regions again."""
    return refreshed(markdown, DOCS / page.file.src_uri)
