"""The native handoff as lines: what is read is what was written, and nothing else is."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postcopyd.wire import handoff
from postcopyd.wire.errors import ProtocolError

UNSIGNED = st.integers(0, (1 << 63) - 1)
# A lone surrogate is no text that JSON in UTF-8 could carry.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
BLOCKS = st.builds(
    handoff.BlockDescription,
    name=TEXT,
    address=UNSIGNED,
    length=UNSIGNED,
    page_size=UNSIGNED,
    memory_file=st.none() | UNSIGNED,
    file_offset=UNSIGNED,
)
HANDOFFS = st.builds(
    handoff.Handoff,
    version=st.just(handoff.VERSION),
    name=TEXT,
    blocks=st.lists(BLOCKS, max_size=5).map(tuple),
    listen=st.none() | TEXT,
)
EVENTS = st.one_of(
    st.builds(handoff.Registered, name=TEXT, listen=st.lists(TEXT, max_size=3).map(tuple)),
    st.builds(handoff.Run, length=UNSIGNED),
    st.builds(handoff.Failed, reason=TEXT),
    st.sampled_from(
        [
            handoff.InhibitBalloon(),
            handoff.Advise(),
            handoff.Discard(),
            handoff.Listening(),
            handoff.AllowBalloon(),
            handoff.Complete(),
        ]
    ),
)
ANSWERS = st.one_of(
    st.builds(handoff.Refused, reason=TEXT),
    st.sampled_from([handoff.Advised(), handoff.Discarded(), handoff.Loaded()]),
)
# (strategy of one kind of message, reader of that kind)
KINDS = [
    (HANDOFFS, handoff.handoff_reader),
    (EVENTS, handoff.event_reader),
    (ANSWERS, handoff.answer_reader),
]

VALID = {
    "postcopyd": 1,
    "name": "vm0",
    "blocks": [
        {
            "name": "pc.ram",
            "address": 0x7F0000000000,
            "length": 1 << 30,
            "page_size": 4096,
            "memory_file": 1,
            "file_offset": 8192,
        }
    ],
    "listen": "tcp:127.0.0.1:0",
}


def line(message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def changed(**fields: Any) -> dict[str, Any]:
    return VALID | fields


def changed_block(**fields: Any) -> dict[str, Any]:
    return changed(blocks=[VALID["blocks"][0] | fields])  # type: ignore[index]


@pytest.mark.parametrize(("messages", "reader"), KINDS)
@given(data=st.data())
def test_messages_come_back_from_any_split_of_their_lines(
    messages: st.SearchStrategy[Any], reader: Any, data: st.DataObject
) -> None:
    sent = data.draw(st.lists(messages, min_size=1, max_size=4))
    text = b"".join(map(handoff.encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    lines = reader()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        received += lines.feed(text[start:end])
    assert received == sent
    assert lines.pending == 0


def test_a_handoff_as_the_documentation_writes_it_is_read() -> None:
    (message,) = handoff.handoff_reader().feed(line(VALID))
    assert message == handoff.Handoff(
        version=1,
        name="vm0",
        blocks=(
            handoff.BlockDescription(
                name="pc.ram",
                address=0x7F0000000000,
                length=1 << 30,
                page_size=4096,
                memory_file=1,
                file_offset=8192,
            ),
        ),
        listen="tcp:127.0.0.1:0",
    )


def test_memory_file_offset_and_listen_may_be_left_out() -> None:
    block = {"name": "pc.ram", "address": 4096, "length": 4096, "page_size": 4096}
    (message,) = handoff.handoff_reader().feed(
        line({"postcopyd": 1, "name": "vm0", "blocks": [block]})
    )
    assert (message.blocks[0].memory_file, message.blocks[0].file_offset) == (None, 0)
    assert message.listen is None


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            handoff.Registered("vm0", ("tcp:127.0.0.1:40123",)),
            {"event": "registered", "name": "vm0", "listen": ["tcp:127.0.0.1:40123"]},
        ),
        (handoff.InhibitBalloon(), {"event": "inhibit-balloon"}),
        (handoff.Advise(), {"event": "advise"}),
        (handoff.Discard(), {"event": "discard"}),
        (handoff.Listening(), {"event": "listening"}),
        (handoff.Run(12), {"event": "run", "length": 12}),
        (handoff.AllowBalloon(), {"event": "allow-balloon"}),
        (handoff.Complete(), {"event": "complete"}),
        (handoff.Failed("why"), {"event": "failed", "reason": "why"}),
        (handoff.Advised(), {"event": "advised"}),
        (handoff.Discarded(), {"event": "discarded"}),
        (handoff.Loaded(), {"event": "loaded"}),
        (handoff.Refused("why"), {"event": "refused", "reason": "why"}),
    ],
)
def test_each_line_is_written_as_the_documentation_says(
    event: handoff.Event | handoff.Answer, text: dict[str, Any]
) -> None:
    encoded = handoff.encode(event)
    assert encoded.endswith(b"}\n")
    assert json.loads(encoded) == text


@pytest.mark.parametrize(
    ("message", "names"),
    [
        (changed(postcopyd=2), "version 2"),
        (changed(postcopyd="1"), "postcopyd"),
        (changed(name=5), "name"),
        (changed(blocks=None), "blocks"),
        (changed(block=[]), "block"),
        (changed(blocks=[{}] * 4097), "blocks"),
        (changed(listen=["tcp"]), "listen"),
        (changed_block(address=-1), "address"),
        (changed_block(address=1 << 63), "address"),
        (changed_block(length=10**40), "length"),
        (changed_block(length=4096.0), "length"),
        (changed_block(page_size=True), "page_size"),
        (changed_block(memory_file="1"), "memory_file"),
        (changed_block(pagesize=4096), "pagesize"),
        ({"name": "vm0", "blocks": []}, "postcopyd"),
        ({"postcopyd": 1, "blocks": []}, "name"),
        ({"postcopyd": 1, "name": "vm0"}, "blocks"),
        ([], "array"),
    ],
)
def test_a_wrong_handoff_is_refused_by_the_name_of_what_is_wrong(
    message: object, names: str
) -> None:
    with pytest.raises(ProtocolError, match=names):
        list(handoff.handoff_reader().feed(line(message)))


@pytest.mark.parametrize(
    "text",
    [
        b"\n",
        b"{\n",
        b'{"postcopyd":1\n',
        b"\xff\xfe{}\n",
        b'{"postcopyd":1,"name":"\xff","blocks":[]}\n',
        b'{"postcopyd":1,"name":"\\ud800","blocks":[]}\n',
        b'{"postcopyd":1,"name":"vm0","blocks":[]}\0\n',
        b'{"postcopyd":1,"name":' + b"[" * 100_000 + b"\n",
        b'{"postcopyd":1,"name":"vm0","x":' + b'{"a":' * 100_000 + b"\n",
    ],
)
def test_what_is_no_message_is_a_protocol_error(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(handoff.handoff_reader().feed(text))


def test_an_error_tells_where_its_line_begins() -> None:
    reader = handoff.answer_reader()
    received = reader.feed(handoff.encode(handoff.Advised()) + b"{}\n")
    assert next(received) == handoff.Advised(), "what came before the error is given"
    with pytest.raises(ProtocolError) as caught:
        next(received)
    assert caught.value.position == len(handoff.encode(handoff.Advised()))


def test_an_answer_with_a_field_too_many_is_refused_but_an_event_may_grow_one() -> None:
    with pytest.raises(ProtocolError, match="why"):
        list(handoff.answer_reader().feed(b'{"event":"advised","why":1}\n'))
    (event,) = handoff.event_reader().feed(b'{"event":"advise","why":1}\n')
    assert event == handoff.Advise()


@pytest.mark.parametrize("piece", [1 << 16, 1 << 21])
def test_a_line_without_end_is_refused_at_the_limit(piece: int) -> None:
    reader = handoff.handoff_reader()
    with pytest.raises(ProtocolError, match="more than 1048576 bytes"):
        for _ in range(17):
            list(reader.feed(b" " * piece))
            assert reader.pending <= handoff.FIRST_MESSAGE_LIMIT


def test_a_complete_line_that_is_too_long_is_refused_as_well() -> None:
    with pytest.raises(ProtocolError, match="more than 65536 bytes"):
        list(handoff.event_reader().feed(handoff.encode(handoff.Failed("x" * (1 << 16)))))


def test_the_largest_handoff_is_accepted() -> None:
    blocks = VALID["blocks"] * 4096  # type: ignore[operator]
    text = msgspec.json.encode(changed(blocks=blocks))
    filler = b" " * (handoff.FIRST_MESSAGE_LIMIT - len(text))
    (message,) = handoff.handoff_reader().feed(text + filler + b"\n")
    assert len(message.blocks) == handoff.BLOCK_LIMIT


@pytest.mark.parametrize(("_messages", "reader"), KINDS)
@given(data=st.data())
def test_any_bytes_give_messages_or_the_protocol_error(
    _messages: st.SearchStrategy[Any], reader: Any, data: st.DataObject
) -> None:
    text = data.draw(st.binary(max_size=200) | mutated(st.just(line(VALID))))
    lines = reader()
    try:
        for place in range(0, len(text), 7):
            list(lines.feed(text[place : place + 7]))
    except ProtocolError as error:
        assert str(error)


@st.composite
def mutated(draw: st.DrawFn, texts: st.SearchStrategy[bytes]) -> bytes:
    """Return a text with a piece of it replaced, doubled or dropped."""
    text = draw(texts)
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, len(text)))
    piece = draw(st.sampled_from([b"", text[start:end] * 2]) | st.binary(max_size=8))
    return text[:start] + piece + text[end:]
