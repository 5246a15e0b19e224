"""Which app a name means, and why a name means none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from umbel import Umbel
from umbel.app import MAIN_MODULES
from umbel.errors import UmbelError
from umbel.finding import find_app, import_module_or_explain, locate

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module that can be imported; afterwards none of it is left."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)

    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.write_text(dedent(source))
        return path

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


APP = "from umbel import Umbel\napp = Umbel('found')\n"


def test_a_module_with_an_app_named_app(write: Write) -> None:
    write("shop_a.py", APP + "other = Umbel('other')\n")
    app = find_app("shop_a")
    assert (app.name, app.reference) == ("found", "shop_a")
    assert find_app("shop_a") is app


def test_a_module_with_exactly_one_app_of_any_name(write: Write) -> None:
    write("shop_b.py", "from umbel import Umbel\nqueue = Umbel('found')\nalias = queue\n")
    assert find_app("shop_b").name == "found"


def test_an_attribute_of_a_module(write: Write) -> None:
    write("shop_c.py", APP + "other = Umbel('other')\n")
    assert find_app("shop_c:other").name == "other"


def test_an_attribute_of_an_attribute(write: Write) -> None:
    write("shop_g.py", APP + "class config:\n    celery = Umbel('deep')\n")
    assert find_app("shop_g:config.celery").name == "deep"
    with pytest.raises(UmbelError, match=r"'shop_g:config\.none\.celery' is not there"):
        find_app("shop_g:config.none.celery")


def test_a_module_with_no_app_or_several_says_what_to_do(write: Write) -> None:
    write("shop_d.py", "x = 1\n")
    with pytest.raises(UmbelError, match="module 'shop_d' holds no Umbel app"):
        find_app("shop_d")
    write("shop_e.py", "from umbel import Umbel\none, two = Umbel(), Umbel()\n")
    with pytest.raises(UmbelError, match="holds 2 apps; name one as shop_e:attribute"):
        find_app("shop_e")


def test_an_attribute_that_is_missing_or_no_app_says_which(write: Write) -> None:
    write("shop_f.py", APP + "x = 3\n")
    with pytest.raises(UmbelError, match="'shop_f:nothing' is not there"):
        find_app("shop_f:nothing")
    with pytest.raises(UmbelError, match="'shop_f:x' is not an Umbel app"):
        find_app("shop_f:x")


@pytest.mark.parametrize("relative", [True, False])
def test_a_script_by_its_path_is_run_once_however_it_is_named(write: Write, relative: bool) -> None:
    path = write("script.py", APP + "mine = Umbel('mine')\n")
    place = path.name if relative else str(path)
    app = find_app(f"{place}:mine")
    assert app.name == "mine"
    assert find_app(f"{place}:mine") is app
    assert find_app(f"{path}:mine") is app
    assert find_app(f"{path.name}:mine") is app
    assert find_app(str(path)).name == "found"


def test_a_scripts_tasks_are_named_after_its_app(write: Write) -> None:
    write("script.py", APP + "@app.task\ndef job(): ...\n")
    assert list(find_app("script.py").tasks) == ["found.job"]


def test_the_script_that_is_running_is_not_run_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("script.py", "raise AssertionError('run again')\n")
    main = ModuleType("__main__")
    main.__file__ = str(path)
    main.app = Umbel("running")  # type: ignore[attr-defined]  # as the script would
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert find_app("script.py").name == "running"
    assert find_app(f"{path}:app").name == "running"


def test_a_script_that_is_not_there_says_so(write: Write) -> None:
    with pytest.raises(UmbelError, match=r"there is no script .*nothing\.py"):
        find_app("nothing.py:app")


def test_a_script_that_fails_says_so_in_one_sentence_and_can_be_mended(write: Write) -> None:
    path = write("script.py", "1 / 0\n")
    with pytest.raises(UmbelError, match=r"script\.py.*cannot be run: ZeroDivisionError: division by zero"):
        find_app("script.py")
    path.write_text(APP)
    assert find_app("script.py").name == "found"


def test_a_module_that_is_not_there_says_where_was_looked(write: Write) -> None:
    with pytest.raises(UmbelError, match=r"there is no module 'shop_g' \(-A/--app\); modules are looked for in"):
        find_app("shop_g:app")
    with pytest.raises(UmbelError, match=r"there is no module 'shop_g\.tasks' \(imports\)"):
        import_module_or_explain("shop_g.tasks", "imports")


def test_a_module_that_needs_another_says_which(write: Write) -> None:
    write("shop_h.py", "import not_there_at_all\n")
    with pytest.raises(UmbelError, match=r"module 'shop_h' .* needs 'not_there_at_all', which is not installed"):
        find_app("shop_h")


def test_a_module_that_fails_says_why_in_one_sentence(write: Write) -> None:
    write("shop_i.py", "raise RuntimeError('no database')\n")
    with pytest.raises(UmbelError, match=r"cannot be imported: RuntimeError: no database") as caught:
        find_app("shop_i")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_ours_passes_as_it_is(write: Write) -> None:
    write("shop_j.py", "from umbel.errors import UmbelError\nraise UmbelError('our own sentence')\n")
    with pytest.raises(UmbelError, match=r"^our own sentence$"):
        find_app("shop_j")


# --- the way back ---------------------------------------------------------------------------------


def test_an_app_is_located_as_the_attribute_of_its_module(write: Write) -> None:
    write("shop_k.py", "from umbel import Umbel\nqueue = Umbel()\n")
    import shop_k  # type: ignore[import-not-found]  # written above

    assert locate(shop_k.queue) == "shop_k:queue"
    assert shop_k.queue.reference == "shop_k:queue"


def test_an_app_that_was_found_is_located_as_it_was_named(write: Write) -> None:
    write("shop_l.py", APP)
    assert locate(find_app("shop_l")) == "shop_l"


@pytest.mark.parametrize("name", MAIN_MODULES)
def test_a_scripts_app_is_located_by_its_path(write: Write, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = write("script.py", "")
    module = ModuleType(name)
    module.__file__ = str(path)
    module.app = Umbel()  # type: ignore[attr-defined]  # as the script would
    monkeypatch.setitem(sys.modules, name, module)
    assert locate(module.app) == f"{path.resolve()}:app"


def test_an_app_that_hangs_in_no_module_cannot_be_located_and_the_pool_that_needs_it_not_is_named() -> None:
    with pytest.raises(UmbelError, match=r'app .lonely. is no module.s attribute.*pool = "threads"'):
        locate(Umbel("lonely"))
