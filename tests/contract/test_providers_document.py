"""The providers in docs/OPERATIONS.md can be used as they stand there."""

import json
import re
from pathlib import Path

import msgspec
from hive_common.inference.providers import ProviderConfig, check_providers

DOCUMENT = Path(__file__).parents[2] / "docs" / "OPERATIONS.md"


def test_the_examples_of_providers_are_taken() -> None:
    section = DOCUMENT.read_text().partition("### Providers")[2]
    found = re.search(r"^```json\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert found is not None
    providers = msgspec.convert(json.loads(found[1])["providers"], tuple[ProviderConfig, ...], strict=False)
    # There is nobody's key here.
    check_providers(providers, "docs/OPERATIONS.md", keys=False)
    assert len(providers) == 4
