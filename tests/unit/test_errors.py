import pytest

from hubpeer import errors
from hubpeer.errors import BadRequest, Busy, DocumentRejected, HubError, StoreError, Unavailable, shown


def test_a_code_is_a_lower_case_word_and_never_longer_than_a_header_needs():
    assert [code for code in errors.STATUS if not code.isascii() or code != code.lower() or len(code) > 32] == []


@pytest.mark.parametrize(
    ("code", "status"),
    [
        # The numbers the contract promises, one code for each.
        ("bad_json", 400),
        ("identity_mismatch", 403),
        ("not_found", 404),
        ("deadline_passed", 408),
        ("conflict", 409),
        ("payload_too_large", 413),
        ("field_too_long", 422),
        ("queue_full", 429),
        ("internal", 500),
        ("draining", 503),
    ],
)
def test_a_code_carries_the_status_of_the_contract(code, status):
    assert HubError(code, "").status == status


def test_every_status_is_one_of_the_contract():
    assert set(errors.STATUS.values()) == {400, 403, 404, 408, 409, 413, 422, 429, 500, 503}


def test_an_error_with_a_code_outside_the_contract_cannot_be_made():
    with pytest.raises(KeyError):
        HubError("oops", "a code nobody knows")


def test_an_error_carries_its_facts_and_its_text_is_made_from_them():
    error = BadRequest("out_of_range", "limit is 1..200", field="limit")
    assert (error.code, error.message, error.field, error.retry_after_ms) == ("out_of_range", "limit is 1..200", "limit", None)
    assert str(error) == "out_of_range: limit is 1..200"


def test_busy_always_says_when_to_come_back():
    assert Busy("queue_full", "256 wait", retry_after_ms=1500).retry_after_ms == 1500
    with pytest.raises(TypeError):
        Busy("queue_full", "256 wait")


@pytest.mark.parametrize("kind", [BadRequest, Busy, DocumentRejected, StoreError, Unavailable])
def test_every_coded_error_is_caught_as_a_hub_error_and_a_wrong_setting_is_not(kind):
    assert issubclass(kind, HubError)
    assert not issubclass(errors.SettingsError, HubError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("it's", "it's"),
        ("two\nlines", r"two\nlines"),
        ("\x1b[2J", r"\x1b[2J"),
        ("ä\u202e", r"\xe4\u202e"),
        ("\ud800", r"\ud800"),
        (b"\xff", r"b'\xff'"),
        (None, "None"),
        ("x" * 64, "x" * 64),
        ("x" * 65, "x" * 61 + "..."),
        ("\0" * 100, r"\x00" * 15 + r"\..."),
    ],
)
def test_what_is_echoed_is_one_short_line_of_plain_ascii(value, text):
    assert shown(value) == text
