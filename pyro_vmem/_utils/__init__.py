"""Small tools that know nothing of models."""

__all__: list[str] = []
