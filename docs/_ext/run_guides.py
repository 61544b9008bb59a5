"""Run every command of a guide and put what it printed below it: `python docs/_ext/run_guides.py serve ...`.

All ```bash blocks of a guide are one shell session in an empty folder; a ```text block behind one is its
output and is replaced. So a guide cannot show a command that fails, or a figure that nobody measured.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

GUIDES = Path(__file__).resolve().parents[1] / "guides"
BLOCK = re.compile(r"```bash\n(?P<code>.*?)```\n(?P<gap>\n*)(?P<old>```text\n.*?```\n)?", re.DOTALL)
LIMIT_S = 600


def run(page: Path) -> None:
    """Rewrite `page` with fresh outputs; exits with the shell's own message where a command fails."""
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / f".output-{index}" for index in range(len(blocks))]
        script = "".join(
            f"{{\n{block['code']}}} >{output}\n" for block, output in zip(blocks, outputs, strict=True)
        )
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "COLUMNS": "100", "TMPDIR": folder}
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            check=True,
            timeout=LIMIT_S,
        )
        shown = iter([output.read_text() for output in outputs])

    def with_output(block: re.Match[str]) -> str:
        printed = "\n".join(line.rstrip() for line in next(shown).rstrip().splitlines())
        code = f"```bash\n{block['code']}```\n"
        after = "" if block["old"] else block["gap"]
        return code + (f"\n```text\n{printed}\n```\n{after}" if printed.strip() else block["gap"])

    page.write_text(BLOCK.sub(with_output, text))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(GUIDES / f"{name}.md")
