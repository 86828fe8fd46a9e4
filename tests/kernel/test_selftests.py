"""Where the behaviour is shown that the kernel's own tests assert.

The names are those of the table ``uffd_tests`` in tools/testing/selftests/mm/uffd-unit-tests.c of Linux 6.18; each is crossed
here with the kinds of memory that it names there. No line of them is here: the tests are written from the behaviour.
"""

import re
from pathlib import Path

import pytest

SHOWN = {
    "register-ioctls": ["test_registering.py::test_advertised_ioctls"],
    "zeropage": ["test_resolving.py::test_zeropage", "test_registering.py::test_advertised_ioctls"],
    "move": ["test_moving.py::test_move_takes_the_page_away", "test_moving.py::test_move_of_a_range"],
    "move-pmd": ["test_moving.py::test_huge_page_moves_whole"],
    "move-pmd-split": ["test_moving.py::test_huge_page_is_split_where_it_must"],
    "wp-fork": ["test_forking.py::test_child_inherits_protection_with_the_event_alone"],
    "wp-fork-with-event": ["test_forking.py::test_child_inherits_protection_with_the_event_alone"],
    "wp-fork-pin": ["test_forking.py::test_pinned_pages_and_fork"],
    "wp-fork-pin-with-event": ["test_forking.py::test_pinned_pages_and_fork"],
    "wp-unpopulated": [
        "test_write_protecting.py::test_page_that_is_not_there",
        "test_write_protecting.py::test_marker_of_anonymous_memory",
    ],
    "minor": ["test_minor_faults.py::test_every_page_faults_once_and_minor"],
    "minor-wp": ["test_minor_faults.py::test_mapped_write_protected"],
    "minor-collapse": ["test_minor_faults.py::test_collapsing_keeps_content"],
    "sigbus": ["test_write_protecting.py::test_sigbus_of_an_absent_page", "test_forking.py::test_sigbus_in_a_child"],
    "sigbus-wp": [
        "test_write_protecting.py::test_sigbus_of_a_protected_page",
        "test_write_protecting.py::test_sigbus_feature_tells_nothing",
    ],
    "events": ["test_forking.py::test_guest_that_forks_moves_and_discards"],
    "events-wp": ["test_forking.py::test_guest_that_forks_moves_and_discards"],
    "poison": ["test_resolving.py::test_poison_wakes_into_an_error", "test_resolving.py::test_touch_of_poison_is_sigbus"],
    "mmap-changing": ["test_events.py::test_while_an_event_is_unread_every_fill_is_eagain"],
}


@pytest.mark.parametrize("name", SHOWN)
def test_selftest_is_shown(name: str) -> None:
    for test in SHOWN[name]:
        file, function = test.split("::")
        source = Path(__file__).with_name(file).read_text()
        assert re.search(rf"^@case\(.*\)\ndef {function}\(|^\)\ndef {function}\(", source, re.MULTILINE), test
