"""One file per tab: what it shows, and its handlers as plain functions of the session and values."""

from typing import Any

# Events that only move things on the page: no spinner, no place in the published API.
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
WATCH: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}  # any number of pages at once
# Events that use the pipeline wait for each other; "multiple": the page would swallow one right after a cancel.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "trigger_mode": "multiple"}
ONE_AT_A_TIME["show_progress"] = "hidden"
