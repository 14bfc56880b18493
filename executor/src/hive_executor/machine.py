"""Which machine this is, so that results of executors on one machine are not taken for results of two.

The machine's own id names it everywhere and should not leave it (machine-id(5)). Told is a keyed hash, which fits
no hash that other programs make, as `sd_id128_get_machine_app_specific` does it.
"""

import hashlib
import hmac
import logging
import subprocess
import sys
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

APPLICATION: Final = b"hivefabric device v1"
MACHINE_ID_FILES: Final = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
IOREG: Final = ("/usr/sbin/ioreg", "-rd1", "-c", "IOPlatformExpertDevice")
IOREG_S_MAX: Final = 5.0
UNINITIALIZED: Final = "uninitialized"
"""What stands in the file between the first boot's beginning and the id."""
_HEX_DIGITS: Final = 32


def device() -> str:
    """Return what names this machine among the devices of an installation; empty where nothing does.

    On Linux it is made of the machine's id, and without one, as in most containers, of the id of the boot, which
    containers of one kernel share and which changes with each boot. On macOS it is made of the platform's UUID.
    """
    found = _platform_uuid() if sys.platform == "darwin" else _linux_id((*MACHINE_ID_FILES, BOOT_ID_FILE))
    if not found:
        log.warning(
            "nothing tells this machine from others, and its results count as of one machine with all such; "
            "`device` in the configuration would tell"
        )
        return ""
    return digest_of(found)


def digest_of(machine: str) -> str:
    """Return the hash that is told in place of a machine's own id: 32 hexadecimal digits."""
    # The id is the key, not the message: it is what has to stay unknown.
    return hmac.new(machine.encode(), APPLICATION, hashlib.sha256).hexdigest()[:_HEX_DIGITS]


def _linux_id(files: tuple[Path, ...]) -> str:
    """Return the first id that one of these files holds."""
    for file in files:
        try:
            text = file.read_text(encoding="ascii").strip().lower()
        except (OSError, UnicodeDecodeError):
            continue
        if text and text != UNINITIALIZED:
            return text
    return ""


def _platform_uuid() -> str:
    try:
        done = subprocess.run(IOREG, capture_output=True, text=True, timeout=IOREG_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.info("%s: %s", IOREG[0], error)
        return ""
    return uuid_in(done.stdout)


def uuid_in(text: str) -> str:
    """Return the platform's UUID from what `ioreg` printed: a line `"IOPlatformUUID" = "…"`."""
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name.strip().strip('"') == "IOPlatformUUID":
            return value.strip().strip('"').lower()
    return ""
