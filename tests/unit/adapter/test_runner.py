"""What is read of vLLM's runners that needs no vLLM to test."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glassbox.adapter.runner import TokenCopy

PROMPT = [11, 12, 13]
EOS, STOP = 2, 7


def copied(generated: list[int], behind: list[int] | None = None, **params: Any) -> TokenCopy:
    """A runner's row: the request's tokens, and behind them what is left of another request."""
    ids = np.array([*PROMPT, *generated, *(behind or [99, 98])], dtype=np.int32)
    given = {"eos_token_id": EOS, "stop_token_ids": [STOP], **params}
    return TokenCopy(None, ids, np.int64(len(PROMPT) + len(generated)), len(PROMPT), SimpleNamespace(**given))


class TestTokenCopy:
    def test_prompt_and_answer(self) -> None:
        """As long as the runner says, and no longer."""
        tokens = copied([5, 6, EOS]).tokens()
        assert (tokens.prompt, tokens.generated) == (PROMPT, [5, 6, EOS])

    @pytest.mark.parametrize("end", [EOS, STOP])
    def test_a_token_after_the_end(self, end: int) -> None:
        """Asynchronous scheduling may have computed one more step: the client never got its token."""
        assert copied([5, end, 8]).tokens().generated == [5, end]

    def test_ends_that_are_none(self) -> None:
        """With ignore_eos vLLM gives no end token."""
        assert copied([EOS, 5, 6], eos_token_id=None, stop_token_ids=[]).tokens().generated == [EOS, 5, 6]

    def test_a_pooling_request(self) -> None:
        """It has no sampling parameters and generates nothing."""
        tokens = TokenCopy(None, np.array(PROMPT), np.int64(3), 3, None).tokens()
        assert (tokens.prompt, tokens.generated) == (PROMPT, [])
