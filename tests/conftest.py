"""What all tests share.

In CI (the variable CI is set) property tests draw the same examples every time, so that a red run
means that the change is wrong; anywhere else they look for new ones.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
