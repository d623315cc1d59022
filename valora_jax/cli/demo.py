"""`valora demo`: the demo model answers a question, looks at photographs, and serves adapters.

It says what it shows and what it does not: picture answers and adapters are untrained.
"""

import dataclasses
import sys
import time
from pathlib import Path

from rich.console import Console

from valora_jax.cli.settings import model_folder
from valora_jax.config import EngineConfig
from valora_jax.engine.sampling_params import SamplingParams

# In a clone; an installed package has no examples beside it.
PHOTOGRAPHS = Path(__file__).parents[2] / "examples" / "images"

# Few shapes, compiled when first met, so that the first token comes soon; too few requests for a
# merge to pay.
ENGINE = EngineConfig(
    max_requests=4,
    max_tokens_per_step=64,
    max_request_tokens=1024,
    image_slots=4,
    max_adapters=4,
    lora_pages=4,
    projector_lora_pages=4,
    merge="off",
    warm_up=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Make the demo model once, then let it answer, look at photographs and serve adapters."""

    max_tokens: int = 32
    """Most tokens of an answer."""
    image: tuple[Path, ...] = ()
    """Photographs to look at; the project's own where none are given."""


def run(command: Demo) -> int:
    """Runs the demo; returns the exit code."""
    began_s = time.monotonic()
    console = Console(highlight=False)
    console.print(
        "[bold]The valora_jax demo[/bold]\n"
        "SmolLM2-135M-Instruct and a ViT-S/14 as one LLaVA-1.5 model. Steps compile as they are "
        "first met, which takes a while once; the next start finds them in the cache.\n"
    )
    shown = sys.stderr.isatty()
    folder = model_folder("demo", show_progress=shown)
    ready_s = time.monotonic()
    # Late: these bring jax, seconds that `--help` should not take.
    from valora_jax.cli.showcase import Showcase
    from valora_jax.engine.engine import Engine

    with Engine(folder, ENGINE, show_progress=shown) as engine:
        show = Showcase(
            engine, console, SamplingParams(temperature=0.0, max_tokens=command.max_tokens)
        )
        started_s = time.monotonic()
        first_token_s = show.text()
        show.photographs(command.image or sorted(PHOTOGRAPHS.glob("c*.jpg")))
        show.adapters(folder)
    console.print(
        f"[dim]checkpoint {ready_s - began_s:.1f} s · engine {started_s - ready_s:.1f} s · first "
        f"token {first_token_s - began_s:.1f} s after the start · all of it "
        f"{time.monotonic() - began_s:.1f} s[/dim]\n"
        'Ask it yourself: [bold]valora generate demo --prompt "Why is the sky blue?"[/bold]'
    )
    return 0
