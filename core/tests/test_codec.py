"""Bodies to bytes and back: what is accepted, what is refused and with which remedy, and what is loaded for it."""

from __future__ import annotations

import pytest

from umbel.errors import ContentRefused, DecodeError, EncodeError, PluginError

from .conftest import MakeApp
from .fakes import Fakes, Squeezer

JSON = "application/json"


def test_what_is_encoded_decodes_to_the_same(make_app: MakeApp) -> None:
    codec = make_app().codec
    encoded = codec.encode([1, {"a": None}])
    assert (encoded.content_type, encoded.content_encoding, encoded.compression) == (JSON, "utf-8", None)
    assert codec.decode(encoded.body, encoded.content_type) == [1, {"a": None}]


def test_a_content_type_that_is_not_in_the_accept_list_is_refused_with_the_setting_that_would_accept_it(
    make_app: MakeApp,
) -> None:
    with pytest.raises(ContentRefused, match=r'"pickle" to \[codec\] accept'):
        make_app().codec.decode(b"", "application/x-python-serialize")


def test_a_content_type_that_nobody_knows_is_refused_by_name(make_app: MakeApp) -> None:
    with pytest.raises(
        ContentRefused, match=r"'text/odd' is not accepted: no plugin that reads it is in \[codec\] accept"
    ):
        make_app().codec.decode(b"", "text/odd")


def test_sending_with_a_serializer_does_not_accept_it(make_app: MakeApp) -> None:
    codec = make_app({"codec.serializer": "repr"}).codec
    encoded = codec.encode([1])
    assert encoded.content_type == "application/x-repr"
    with pytest.raises(ContentRefused):
        codec.decode(encoded.body, encoded.content_type)


def test_every_serializer_of_the_accept_list_reads(make_app: MakeApp) -> None:
    codec = make_app({"codec.accept": ["json", "repr"]}).codec
    assert codec.decode(b"(1, 2)", "application/x-repr") == (1, 2)
    assert codec.decode(b"[1]", JSON) == [1]


def test_an_unreadable_body_is_a_decode_error(make_app: MakeApp) -> None:
    with pytest.raises(DecodeError, match="not JSON"):
        make_app().codec.decode(b"{", JSON)


def test_a_call_may_choose_its_serializer_and_its_compression(make_app: MakeApp) -> None:
    encoded = make_app().codec.encode([1] * 100, serializer="repr", compression="squeeze")
    assert (encoded.content_type, encoded.compression) == ("application/x-repr", "application/x-squeeze")


def test_compression_is_restored_by_its_encoding_its_name_and_its_aliases(make_app: MakeApp) -> None:
    codec = make_app({"codec.accept_compression": ["squeeze"]}).codec
    body = codec.encode("x" * 500, compression="squeeze").body
    assert len(body) < 100
    for word in (Squeezer.encoding, Squeezer.name, *Squeezer.aliases):
        assert codec.decode(body, JSON, word) == "x" * 500


def test_what_an_app_sends_compressed_it_reads(make_app: MakeApp) -> None:
    codec = make_app({"codec.compression": "squeeze"}).codec
    encoded = codec.encode("x" * 500)
    assert codec.decode(encoded.body, encoded.content_type, encoded.compression) == "x" * 500


def test_a_call_may_turn_compression_off(make_app: MakeApp) -> None:
    assert make_app({"codec.compression": "squeeze"}).codec.encode("x", compression="none").compression is None


@pytest.mark.parametrize(
    ("word", "remedy"), [("application/x-gzip", '"zlib" to'), ("application/x-squeeze", "no plugin that reads it")]
)
def test_a_compression_that_is_not_accepted_is_refused_with_its_setting(
    make_app: MakeApp, word: str, remedy: str
) -> None:
    with pytest.raises(ContentRefused, match=rf"{remedy}.*\[codec\] accept_compression"):
        make_app().codec.decode(b"", JSON, word)


def test_a_body_too_large_is_refused_at_the_call_and_on_arrival_naming_the_setting(make_app: MakeApp) -> None:
    codec = make_app({"codec.max_body_size": 100}).codec
    assert codec.decode(codec.encode("x" * 98).body, JSON) == "x" * 98
    with pytest.raises(EncodeError, match=r"101 bytes long; \[codec\] max_body_size allows 100"):
        codec.encode("x" * 99)
    with pytest.raises(ContentRefused, match=r"101 bytes long; \[codec\] max_body_size allows 100"):
        codec.decode(b"x" * 101, JSON)


def test_a_compressed_body_is_measured_after_decompression(make_app: MakeApp) -> None:
    codec = make_app({"codec.max_body_size": 100, "codec.accept_compression": ["squeeze"]}).codec
    with pytest.raises(ContentRefused, match="100 bytes after decompression"):
        codec.decode(Squeezer().compress(b"1" * 5000), JSON, "squeeze")


def test_damaged_compression_is_a_decode_error(make_app: MakeApp) -> None:
    codec = make_app({"codec.accept_compression": ["squeeze"]}).codec
    with pytest.raises(DecodeError, match="damaged"):
        codec.decode(b"no zlib", JSON, "squeeze")


def test_a_refusal_quotes_no_more_than_a_little_of_a_strangers_words(make_app: MakeApp) -> None:
    with pytest.raises(ContentRefused) as caught:
        make_app().codec.decode(b"", "x" * 100_000)
    assert len(str(caught.value)) < 300


def test_only_the_plugins_that_are_named_are_made_and_each_once(make_app: MakeApp, fakes: Fakes) -> None:
    app = make_app({"codec.accept": ["json", "repr"]})
    codec = app.codec
    assert fakes.made == []
    codec.encode([1])
    codec.encode([2])
    assert fakes.made == ["json"]
    codec.decode(b"[1]", JSON)
    codec.decode(b"[1]", JSON)
    assert fakes.made == ["json", "repr"]


def test_a_serializer_that_nobody_offers_is_a_plugin_error_naming_the_setting(make_app: MakeApp) -> None:
    with pytest.raises(PluginError, match=r"'jsno'.*\[codec\]"):
        make_app({"codec.serializer": "jsno"}).codec.encode([1])


def test_results_are_read_with_their_own_serializer_only(make_app: MakeApp) -> None:
    app = make_app({"results.serializer": "repr", "codec.compression": "squeeze"})
    encoded = app.result_codec.encode([1])
    assert (encoded.content_type, encoded.compression) == ("application/x-repr", None)
    with pytest.raises(ContentRefused):
        app.result_codec.decode(b"[1]", JSON)
