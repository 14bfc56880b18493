"""A back end as configurations name it; apart from its client, so that whoever only reads them loads no client."""

import msgspec


class BackEndConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A back end in a configuration. `key_file` holds the key to show there, where it wants one."""

    url: str
    key_file: str = ""
