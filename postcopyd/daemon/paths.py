"""Where things are unless somebody says otherwise; quick to import."""

from __future__ import annotations

from typing import Final

CONFIGURATION: Final = "/etc/postcopyd/postcopyd.toml"
CONTROL: Final = "/run/postcopyd/control.sock"
RECORDS: Final = "/var/lib/postcopyd"
HANDOFF: Final = "/run/postcopyd/handoff.sock"
