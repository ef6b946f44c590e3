"""Logging of every process: lines for people on a terminal, JSON elsewhere, always on stderr.

stdout belongs to results (join strings, tables, generated text).
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str = "info", *, role: str = "") -> None:
    """Set up structlog once per process. `role` (node, coordinator, …) goes with every line."""
    renderer: structlog.typing.Processor
    if sys.stderr.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    if role:
        structlog.contextvars.bind_contextvars(role=role)
    # hivemind logs to the root handler of its own; its warnings are about peers that left, which we report.
    logging.getLogger("hivemind").setLevel(logging.ERROR)
