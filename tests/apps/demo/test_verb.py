"""What the verb of the page says where a package is missing."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("gradio", "pip install 'contracap[demo]'"),
        ("contracap.apps.demo.server", "import of contracap.apps.demo.server halted"),
    ],
)
def test_only_a_package_of_others_is_said_to_be_installable(missing: str, said: str) -> None:
    blocked = f"import sys; sys.modules[{missing!r}] = None; from contracap.cli import main"
    program = f"{blocked}; sys.exit(main(['demo', 'none', '--port', '0']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and said in done.stderr, done.stderr
    assert ("pip install" in done.stderr) == (missing == "gradio")
