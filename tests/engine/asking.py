"""A request as policies see it, for tests without an engine."""

import dataclasses


@dataclasses.dataclass(eq=False)
class Asking:
    """`Servable`."""

    adapter: str | None
    remaining: int = 1
    waiting_since_s: float = 0.0
    new_images: int = 0
