"""PROTOCOL.md against the code: whoever writes a peer from it alone gets the same bytes."""

import re
import struct
from pathlib import Path

import pytest
from pydantic import BaseModel

from migrate import destination, source
from proto import PROTOCOL_MAJOR, PROTOCOL_MINOR, frame, messages, preamble
from proto.frame import FrameKind

FOLDER = Path(__file__).parents[2] / "proto"
TEXT = (FOLDER / "PROTOCOL.md").read_text()


def section(heading: str) -> str:
    """From a second-level heading to the next."""
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def layout(text: str) -> list[tuple[int, int, str]]:
    """The first table of (offset, bytes, field) in the text."""
    found = [(int(row[0]), int(row[1]), row[2]) for row in rows(text) if row[0].isdigit() and len(row) == 4 and row[1].isdigit()]
    return found[: next((i for i in range(1, len(found)) if found[i][0] == 0), len(found))]


def sizes(format_text: str) -> list[int]:
    return [struct.calcsize("<" + part) for part in re.findall(r"\d*[a-zA-Z]", format_text)]


@pytest.mark.parametrize(
    ("text", "packed"),
    [
        (section("Preamble"), preamble._PREAMBLE),
        (section("Preamble").split("accepting side answers with")[1], preamble._ANSWER),
        (section("Data frames"), frame._FRAME),
    ],
    ids=["preamble", "answer", "frame"],
)
def test_layouts(text: str, packed: struct.Struct) -> None:
    table = layout(text)
    assert [size for _, size, _ in table] == sizes(packed.format.lstrip("<"))
    at = 0
    for offset, size, field in table:
        assert offset == at, field
        at += size
    assert at == packed.size


def test_frame_fields_are_named_as_in_c() -> None:
    header = (FOLDER / "frame.h").read_text()
    body = header.split("struct frame_header {")[1].split("};")[0]
    assert [name for _, _, name in layout(section("Data frames"))] == re.findall(r"uint\d+_t (\w+);", body)


def test_codes_and_kinds() -> None:
    codes = {int(row[0]): row[1].strip("`") for row in rows(section("Preamble")) if row[0].isdigit() and len(row) == 3}
    assert codes == {code.value: code.name.lower().replace("_", "-") for code in preamble.AnswerCode}
    kinds = {int(row[0]): row[1] for row in rows(section("Data frames")) if row[0].isdigit() and len(row) == 5}
    assert kinds == {kind.value: kind.name for kind in FrameKind}
    assert f"# The protocol, version {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}\n" in TEXT


CONTROL = [
    messages.Offer, messages.Accept, messages.Refused, messages.ClockPing, messages.ClockPong, messages.Ready, messages.Round,
    messages.Quiesced, messages.Prepare, messages.Prepared, messages.Switchover, messages.Running, messages.Aborted,
    messages.Progress, messages.Complete, messages.Released, messages.Cancel, messages.Recover, messages.Recovered,
    messages.Heartbeat,
]  # fmt: skip
GUEST = [
    messages.Hello, messages.Welcome, messages.Refused, messages.GuestPrepare, messages.GuestPrepared, messages.Track,
    messages.Tracking, messages.TrackFailed, messages.Untrack, messages.Keep, messages.Pause, messages.Paused,
    messages.PauseFailed,
    messages.Resume, messages.ResumeFailed, messages.Running, messages.Stepped, messages.Discard, messages.Discarded,
    messages.GuestComplete, messages.GuestReleased, messages.GuestFailed,
]  # fmt: skip


@pytest.mark.parametrize(("heading", "kinds"), [("Control connection", CONTROL), ("Guest socket", GUEST)])
def test_messages_and_their_fields(heading: str, kinds: list[type[BaseModel]]) -> None:
    table = {row[0].strip("`"): row[2] for row in rows(section(heading)) if row[0].startswith("`")}
    assert list(table) == [kind.model_fields["type"].default for kind in kinds]
    for kind in kinds:
        words = table[kind.model_fields["type"].default].split(" · ")
        fields = [re.match(r"`(\w+)`", word) for word in words if word != "–"]
        assert [field[1] for field in fields if field] == [name for name in kind.model_fields if name != "type"], kind.__name__


def test_bounds() -> None:
    assert f"at most {messages.MESSAGE_BYTES_MAX} (1 MiB)" in section("Messages")
    assert f"0 … {messages.STATE_BYTES_MAX} bytes" in section("Messages")
    assert f"1 … {messages.REGIONS_MAX} maps" in section("Control connection")
    assert f"array of 1 … {messages.DISCARD_RANGES_MAX} page ranges" in section("Guest socket")
    assert f"{messages.DISCARD_PAGES_MAX} pages in all" in section("Guest socket")
    for page_bytes in messages.PAGE_BYTES:
        assert str(page_bytes) in section("Messages")


def test_every_code_that_this_package_raises_is_explained() -> None:
    raised = {code for path in FOLDER.glob("*.py") for code in re.findall(r'ProtocolError\(\s*"([a-z-]+)"', path.read_text())}
    raised |= {code.name.lower().replace("_", "-") for code in preamble.AnswerCode if code.value}
    explained = set(re.findall(r"`([a-z-]+)`", section("Error codes")))
    assert raised - explained == set()


def test_how_long_a_source_waits_for_huge_pages() -> None:
    text = section("Control connection")
    assert f"waits for `accept` {source.ANSWER_DEADLINE_SECONDS:.0f} s, and a second more" in text
    assert f"for each {source.HUGE_BYTES_A_SECOND >> 20} MiB of huge pages" in text


def test_how_long_a_daemon_waits_for_its_guest() -> None:
    text = section("Guest socket")
    assert source.ANSWER_DEADLINE_SECONDS == destination.PREPARED_DEADLINE_SECONDS
    assert f"waits {source.ANSWER_DEADLINE_SECONDS:.0f} s for `prepared`" in text
    assert f"{destination.RESUME_DEADLINE_SECONDS:.0f} s for `running`" in text
