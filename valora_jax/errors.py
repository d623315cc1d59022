"""The errors a caller can act on; each message has the values and the way out.

Plain mistakes in arguments raise `ValueError`; what is legal but not implemented here raises
`NotImplementedError`. A class of its own exists only where a front end must tell it apart.
"""

import os
from collections.abc import Sequence


class ValoraError(Exception):
    """Base of this package's own errors."""


class AdapterNotFoundError(ValoraError, KeyError):
    """A request names an adapter that is not loaded."""

    def __init__(self, name: str, loaded: Sequence[str]):
        super().__init__(f"no adapter {name!r}; loaded: {', '.join(sorted(loaded)) or 'none'}")

    __str__ = Exception.__str__  # KeyError's puts quotes around the message


class RequestTooLongError(ValoraError, ValueError):
    """The prompt, or prompt and output together, can never fit this engine."""

    def __init__(self, *, prompt_tokens: int, image_tokens: int, limit: int):
        super().__init__(
            f"the prompt is {prompt_tokens} tokens ({image_tokens} from images) and needs one more "
            f"to answer, the engine holds {limit} a request; "
            "raise EngineConfig.max_request_tokens or shorten it"
        )


class OutOfCapacityError(ValoraError):
    """The request is fine; the engine is full. Safe to retry."""


class ImageError(ValoraError, ValueError):
    """An image cannot be read, or is refused for its size."""


class CheckpointError(ValoraError, ValueError):
    """A checkpoint does not fit the model; lists every fault found."""

    def __init__(self, problems: Sequence[str]):
        lines = ["the checkpoint does not fit the model:", *sorted(problems)]
        super().__init__("\n  ".join(lines))


class AdapterError(ValoraError, ValueError):
    """An adapter does not fit the model; lists every fault found."""

    def __init__(self, name: str, problems: Sequence[str]):
        lines = [f"adapter {name!r} does not fit the model:", *sorted(problems)]
        super().__init__("\n  ".join(lines))


class TensorFileError(ValoraError, ValueError):
    """A file of tensors is missing, damaged or of an unknown kind; names file and fault."""

    def __init__(self, path: str | os.PathLike[str], *faults: str):
        super().__init__("\n  ".join([f"{os.fspath(path)}: {faults[0]}", *faults[1:]]))
