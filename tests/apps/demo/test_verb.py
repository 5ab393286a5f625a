"""What the verb of the page says where a package is missing."""

import sys

import pytest

from tests.conftest import Run


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("gradio", "pip install 'contracap[demo]'"),
        ("contracap.apps.demo.server", "import of contracap.apps.demo.server halted"),
    ],
)
def test_only_a_package_of_others_is_said_to_be_installable(
    run: Run, monkeypatch: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    for module in [name for name in sys.modules if name.startswith("contracap.apps.demo")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run("demo", "none", "--port", "0")
    assert status == 1 and said in err
    assert ("pip install" in err) == (missing == "gradio")
