"""GLASSBOX_DISABLE switches the plugin off."""

import pytest

from glassbox.core.kill_switch import is_disabled


class TestIsDisabled:
    @pytest.mark.parametrize(
        ("value", "disabled"),
        [
            ("1", True),
            ("true", True),
            ("yes", True),
            ("0", False),
            ("", False),
            ("false", False),
            ("Off", False),
        ],
    )
    def test_values(self, value: str, disabled: bool) -> None:
        """GLASSBOX_DISABLE=1 switches off."""
        assert is_disabled({"GLASSBOX_DISABLE": value}) is disabled

    def test_unset(self) -> None:
        """Without the variable glassbox is on."""
        assert not is_disabled({})
