"""A back end as configurations name it; apart from its client, so that whoever only reads them loads no client."""

import msgspec


class BackEndConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A back end in a configuration.

    Attributes:
        url: base URL, with or without `/v1` at its end.
        key_file: file of mode 0600 with the key to show there, where it wants one.
        ca_file: certificates in PEM of whom to trust where `url` is `https`; empty trusts whom the system trusts.
    """

    url: str
    key_file: str = ""
    ca_file: str = ""


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A cache of answers in a configuration.

    Attributes:
        url: of a server that speaks Redis's protocol: `redis://host:port/db`, `rediss://…` with TLS, or `unix://…`.
        ttl: seconds for which an answer is kept.
        key_file: file of mode 0600 with the password, where it wants one.
    """

    url: str
    ttl: int = 3_600
    key_file: str = ""
