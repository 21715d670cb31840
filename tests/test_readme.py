"""The README's commands exist with the flags it gives them, and its files are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pix2mass.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = "".join(block for block in README.split("```")[1::2] if block.startswith("\n"))
COMMANDS = re.findall(r"^pix2mass (.+?)(?:\s+#.*)?$", BLOCKS, re.MULTILINE)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    function, _, _ = app.parse_args(shlex.split(command), exit_on_error=False, print_error=False)
    assert function.__module__ == "pix2mass.cli"


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_python_example_uses_public_names():
    import pix2mass

    names = re.findall(r"pix2mass\.(\w+)\(", "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))
    assert names and set(names) <= set(pix2mass.__all__)


@pytest.mark.parametrize("target", re.findall(r"^make (\w+)", BLOCKS, re.MULTILINE))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
