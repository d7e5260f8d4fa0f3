"""The fixture that both files share."""

from walls import whole  # noqa: F401
