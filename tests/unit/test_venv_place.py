"""Where `make` puts the virtual environment of a clone."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "venv_place.sh"


def place(clone: Path, **variables: str) -> str:
    """What the script prints in a clone there."""
    folder = clone / "tools"
    folder.mkdir(parents=True)
    copy = shutil.copy(SCRIPT, folder)
    environ = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run([copy], env=environ, capture_output=True, text=True, check=True).stdout.rstrip("\n")


class TestPlace:
    @pytest.mark.parametrize("name", ["glassbox", "wéb/glassbox"])
    def test_is_within_the_clone(self, tmp_path: Path, name: str) -> None:
        """As long as torch.compile can work there."""
        assert ".venv" == place(tmp_path / name, HOME=str(tmp_path))

    def test_is_in_the_cache_if_the_path_has_a_blank(self, tmp_path: Path) -> None:
        """One for each clone, in a folder that nobody else may write to."""
        home = tmp_path / "home"
        first, second = (Path(place(tmp_path / name / "glassbox", HOME=str(home))) for name in ("wé b", "c d"))
        cache = home / ".cache" / "glassbox"
        assert (cache, cache) == (first.parent, second.parent)
        assert first != second
        assert 0o700 == cache.stat().st_mode & 0o777

    def test_the_cache_may_lie_elsewhere(self, tmp_path: Path) -> None:
        """Where XDG_CACHE_HOME says, unless that has a blank as well."""
        cache = tmp_path / "cache"
        found = place(tmp_path / "a b", HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(cache))
        assert cache / "glassbox" == Path(found).parent

    def test_blanks_everywhere(self, tmp_path: Path) -> None:
        """Then it is a folder of this user's below /var/tmp."""
        parent = Path(f"/var/tmp/glassbox-{os.geteuid()}")
        was_there = parent.exists()
        found = Path(place(tmp_path / "a b", HOME=str(tmp_path / "my home")))
        assert (parent, os.geteuid()) == (found.parent, parent.stat().st_uid)
        if not was_there:
            parent.rmdir()
