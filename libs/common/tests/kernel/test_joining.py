import base64

import pytest
from hive_common.contracts.joining import JoinToken, parse_token
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id

TOKEN = JoinToken(
    url="https://192.0.2.1:8500", fingerprint="a" * 64, token_id=new_id(), secret="s3cret", expires_us=1
)


def test_a_token_survives_being_copied() -> None:
    assert TOKEN.text().startswith("hivejoin1.")
    assert parse_token(f"  {TOKEN.text()}\n") == TOKEN


def test_a_token_does_not_show_its_secret_where_it_is_printed_by_accident() -> None:
    assert "s3cret" not in repr(TOKEN)
    assert TOKEN.text() not in repr(TOKEN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hivejoin1.",
        TOKEN.text()[:-5],
        TOKEN.text().removeprefix("hive"),
        "hivejoin1.****",
        "hivejoin1." + "A" * 5000,
        "hivejoin1." + base64.urlsafe_b64encode(b'{"u":"ftp://x","f":"","i":"x","s":"","e":1}').decode(),
    ],
)
def test_half_a_token_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(InvalidArgument, match="not a token for joining") as error:
        parse_token(text)
    assert TOKEN.secret not in error.value.message
