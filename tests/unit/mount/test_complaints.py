from __future__ import annotations

import logging

import pytest

from silofs import limits
from silofs.daemon import _Seldom


def record(at: float) -> logging.LogRecord:
    made = logging.LogRecord("trio.serve_listeners", logging.ERROR, __file__, 1, "accept returned EMFILE", (), None)
    made.created = at
    made.exc_info = (OSError, OSError("too many open files"), None)
    return made


def test_a_daemon_without_descriptors_says_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    seldom = _Seldom()
    said = [one for one in (record(1000 + number / 10) for number in range(1300)) if seldom.filter(one)]
    assert [one.created for one in said] == [1000, 1000 + limits.SAME_COMPLAINT_S, 1000 + 2 * limits.SAME_COMPLAINT_S]
    assert not any(one.exc_info for one in said)
