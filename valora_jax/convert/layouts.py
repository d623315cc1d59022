"""How the files of a model family spell tensor names."""

from collections.abc import Iterable

from valora_jax.models.llava15 import names as llava15

_NAMES = {"llava": llava15}


def layout_of(model_type: str, names: Iterable[str]) -> str | None:
    """The layout that all `names` are written in; None if there is none, or the family has none."""
    try:
        return _NAMES[model_type].layout_of(names)
    except (KeyError, ValueError):
        return None


def written_like(model_type: str, name: str, names: Iterable[str]) -> str:
    """What the file that holds `names` would call the canonical `name`."""
    if (layout := layout_of(model_type, names)) is None:
        return name  # every reader of mixed layouts knows the canonical one
    return _NAMES[model_type].written(name, layout)
